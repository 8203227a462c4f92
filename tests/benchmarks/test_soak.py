"""The soak: every violation is found, memory's growth is told from noise, and one minute of it on real servers."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import random
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import aiohttp.web
import pytest
import soak
import soak_report
from aiohttp.test_utils import TestServer
from bench_adapters import make_adapter
from soak_report import Demands, Findings

from vllm_ppow.artifact import read_adapter

BENCHMARKS = Path(soak.__file__).parent


def steady(base=900.0, slope=0.0, seconds=1800, noise=5.0):
    draw = random.Random(0)
    return [(float(t), base + slope * t + draw.uniform(-noise, noise)) for t in range(0, seconds, 2)]


def good(**changes) -> Findings:
    found = Findings(
        completed={"greedy": 90, "sampled": 30},
        aborted=20,
        compared=90,
        swaps=29,
        num_prompts=48,
        preemptions=12,
        drafts=1000,
        memory={"engine 1": steady(), "server 2": steady(400)},
    )
    return dataclasses.replace(found, **changes)


DEMANDS = Demands(swaps=29)


def test_a_good_soak_passes():
    assert soak_report.violations(good(), DEMANDS) == []
    assert soak_report.violations(good(swaps=0), Demands(swaps=0)) == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"errors": ["ServerDisconnectedError: x"]}, "1 errors, the first: ServerDisconnectedError: x"),
        (
            {"different": [(3, 71.0)]},
            "1 of 90 greedy outputs differ from no speculation: prompt 3 after 71 s.",
        ),
        ({"unstable_prompts": list(range(30))}, "Only 18 of 48 prompts can be compared"),
        ({"compared": 0}, "Too few greedy outputs compared: 0, at least 1"),
        ({"completed": {"greedy": 90}}, "Too few sampled requests"),
        ({"aborted": 0}, "Too few requests aborted"),
        ({"drafts": 0}, "Too few verified drafts"),
        ({"preemptions": 0}, "Too few preemptions (give fewer --kv-blocks)"),
        ({"swaps": 28}, "Too few hot swaps: 28, at least 29"),
        ({"memory": {"engine 1": steady(slope=0.1)}}, "Memory of engine 1 grew by 13"),
        ({"memory": {"engine 1": steady()[:2]}}, "Memory of engine 1 grew by nan"),
    ],
)
def test_each_violation_is_found(change, sentence):
    found = soak_report.violations(good(**change), DEMANDS)
    assert len(found) == 1
    assert found[0].startswith(sentence)


def test_growth_is_the_slope_after_warming_up():
    assert soak_report.growth_mib(steady(slope=0.1)) == pytest.approx(0.1 * 1800 * 0.75, rel=0.05)
    warming = [(t, 500 + min(t, 400)) for t in range(0, 1800, 2)]
    assert soak_report.growth_mib(warming) == 0, "what is gained while warming up is no leak"
    peaks = [(t, 900.0 + (300 if t % 50 == 0 else 0)) for t in range(0, 1800, 2)]
    assert soak_report.growth_mib(peaks) == 0
    assert math.isnan(soak_report.growth_mib([]))


def test_error_lines_of_a_log():
    log = "(EngineCore pid=1) ERROR 11-24 15:44:49 [core.py:1] x\nINFO 11-24 no ERROR here\nERROR 11-24 15:44:50 y\n"
    assert len(soak._ERROR_LINE.findall(log)) == 2


def test_a_refused_swap_is_an_error_in_the_servers_words(tmp_path):
    """Without a swap the soak would test less than it says."""

    async def refuse(request):
        return aiohttp.web.json_response({"error": "It was trained for another drafter."}, status=409)

    async def swap_once():
        app = aiohttp.web.Application()
        app.router.add_post(soak.SWAP_PATH, refuse)
        async with TestServer(app) as fake, aiohttp.ClientSession() as session:
            client = soak.Client(session, SimpleNamespace(url=str(fake.make_url("")).rstrip("/")), 8)
            load = soak.Soak(client, ["a"], [[1]], Findings(), seed=0, sampled_share=0.25)
            load.deadline = time.monotonic() + 0.3
            await load._swap(lambda: client.swap(tmp_path), every=0.2)
            return load.found

    found = asyncio.run(swap_once())
    assert found.swaps == 0
    assert "It was trained for another drafter." in found.errors[0]


@pytest.mark.parametrize(
    ("values", "layers"),
    [({"step": 1.0, "request": 1.0}, "request, step"), ({"step": 1.0, "request": 0.0}, "step"), ({}, "none")],
)
def test_which_layers_are_active_the_servers_metrics_say(values, layers):
    metrics = {f"ppow:window_layer_active{{layer={name}}}": value for name, value in values.items()}
    assert soak.layers_of({"vllm:num_requests_running": 3.0, **metrics}) == layers


def test_the_plain_server_has_the_bare_drafter_and_no_swaps(tmp_path):
    adapter = make_adapter(tmp_path / "adapter", 0.1).directory
    settings = {"num_speculative_tokens": 8, "swap_every": 0, "plain": True}
    base = read_adapter(adapter).config.base_drafter.name_or_path
    plain = {"num_speculative_tokens": 8, "method": "eagle3", "model": base}
    assert soak.speculative_config(settings, [adapter]) == plain
    ours = soak.speculative_config({**settings, "plain": False, "swap_every": 60.0}, [adapter])
    assert ours["method"] == "ppow"
    assert ours["ppow"]["hot_swap"]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_one_minute_on_real_servers(tmp_path):
    adapters = [make_adapter(tmp_path / f"adapter-{seed}", 0.1, seed=seed).directory for seed in (0, 1)]
    command = [
        sys.executable,
        str(BENCHMARKS / "soak.py"),
        "--output",
        str(tmp_path / "soak"),
        "--minutes",
        "1",
    ]
    command += [
        "--num-prompts",
        "8",
        "--max-tokens",
        "32",
        "--swap-every",
        "15",
        "--kv-blocks",
        "48",
        "--max-growth-mib",
        "300",
    ]
    for adapter in adapters:
        command += ["--adapter", str(adapter)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "soak" / "soak.json").read_text())
    assert report["passed"]
    assert report["compared"] > 0
    assert report["preemptions"] > 0
    assert report["swaps"] == 3
    # Nothing is reported before the first step. Without a cost profile there is one draft length per step.
    assert report["layers"]["step"] > 0
    assert set(report["layers"]) <= {"none", "step"}
    assert len(report["memory"]) >= 2, "API server and engine are watched both"
