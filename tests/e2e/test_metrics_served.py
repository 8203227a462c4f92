"""Our metrics in a real `vllm serve`: beside vLLM's, and in agreement with them."""

from __future__ import annotations

import json
import os
import tempfile
import time
import tomllib
import urllib.request
from pathlib import Path

import pytest
import test_processes
from prometheus_client.parser import text_string_to_metric_families
from serving_engine import PROMPTS, expected
from serving_pair import VOCAB, restoring_adapter
from test_processes import complete, server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

K = 3
ROOT = Path(__file__).parents[2]


@pytest.fixture
def reports(tmp_path, monkeypatch):
    """Servers see our entry points as pyproject.toml declares them, however old the installed metadata are.

    Gives the directory in which they share files.
    """
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    info = tmp_path / "site" / "vllm_ppow-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-ppow\nVersion: 0\n")
    lines = []
    for group, points in groups.items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    environment = test_processes.environment()
    # Short: vLLM's sockets are made there, whose paths may have 107 characters.
    shared = tempfile.TemporaryDirectory(prefix="ppow")
    paths = [str(info.parent), environment["PYTHONPATH"], str(ROOT), str(ROOT / "train")]
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "VLLM_RPC_BASE_PATH": shared.name}
    monkeypatch.setattr(test_processes, "environment", lambda: environment)
    with shared:
        yield Path(shared.name)


def metrics(url: str) -> dict[tuple[str, ...], float]:
    """Samples by name and the values of the labels beyond vLLM's."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    return {
        (
            s.name,
            *(value for label, value in s.labels.items() if label not in ("model_name", "engine")),
        ): s.value
        for family in families
        for s in family.samples
    }


@pytest.mark.parametrize("window", ["fixed", "adaptive"])
def test_metrics_of_a_server_agree_with_vllms(pair, tmp_path, reports, window):
    adapter = restoring_adapter(tmp_path, "causal_lm", pair)[1].directory
    spec = {"method": "ppow", "model": str(adapter), "num_speculative_tokens": K, "ppow": {"window": window}}
    with server(pair.target, tmp_path / "log", "--speculative-config", json.dumps(spec)) as url:
        assert [complete(url, prompt) for prompt in PROMPTS] == expected(VOCAB)
        time.sleep(1.5)  # the window's counts are written once a second, and read with the next message
        complete(url, PROMPTS[0])
        found = metrics(url)
        written = [path.stat().st_size > 0 for path in reports.glob("ppow-window-*.json")]
    lengths = [found["ppow:spec_decode_drafts_total", str(k)] for k in range(K + 1)]
    assert sum(lengths) == found["vllm:spec_decode_num_drafts_total",] > 0
    assert sum(k * n for k, n in enumerate(lengths)) == found["vllm:spec_decode_num_draft_tokens_total",]
    steps = sum(value for name, value in found.items() if name[0] == "ppow:window_steps_total")
    is_adaptive = window == "adaptive"
    assert found["ppow:window_layer_active", "step"] == is_adaptive
    assert (steps > 0) == is_adaptive
    assert written == [is_adaptive], "the server's mark that somebody reads, and what the window wrote there"
    assert not list(reports.glob("*ppow-window-*")), "the report goes with the server"
    if is_adaptive:
        assert found["ppow:predicted_accepted_tokens_total",] > 0
    else:
        assert lengths == [0] * K + [sum(lengths)]
