"""The steps of examples/benchmarks/gpu.sh on a GPU, at tiny scale: they run, and greedy output is the target's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
STEPS = ROOT / "examples" / "benchmarks" / "gpu" / "steps.py"


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """A directory in which the whole loop has run."""
    directory = tmp_path_factory.mktemp("gpu")
    run("loop", directory)
    return directory


def run(step: str, output: Path) -> dict:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([f"{ROOT / 'train'}", f"{ROOT}", *sys.path])}
    arguments = ["--output", output, "--tiny", "--kv-cache-gib", "0.5"]
    subprocess.run([sys.executable, STEPS, step, *arguments], check=True, env=environ)
    return json.loads((output / f"{step}.json").read_text())


@pytest.mark.parametrize("drafter", ["eagle3", "causal_lm"])
def test_training_runs_and_its_acceptance_is_vllms(output, drafter):
    training = run(f"train-{drafter}", output)["training"]
    assert training["parity"]["holds"]


@pytest.mark.parametrize("mode", ["eager", "graphs"])
@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_greedy_output_is_the_targets(output, runner, mode):
    compared = run(f"identity-{runner}-{mode}", output)["compared"]
    assert {name: one["errors"] for name, one in compared.items() if not one["holds"]} == {}


def test_the_random_pair_is_measured(output):
    assert run("profile", output)["backend"] == "cuda"
    names = [arm["name"] for arm in run("arms-1", output)["arms"]]
    figures = [json.loads(line) for line in (output / "arms-1.jsonl").read_text().splitlines()]
    assert {figure["arm"] for figure in figures} == set(names)
    assert {"none", "fixed-01", "adaptive"} <= set(names)
