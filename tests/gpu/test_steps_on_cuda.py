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
    environ = {**os.environ, "PYTHONPATH": f"{ROOT / 'train'}:{ROOT}"}
    subprocess.run([sys.executable, STEPS, step, "--output", output, "--tiny"], check=True, env=environ)
    return json.loads((output / f"{step}.json").read_text())


@pytest.mark.parametrize("mode", ["eager", "graphs"])
@pytest.mark.parametrize("runner", ["v1", "v2"])
def test_greedy_output_is_the_targets(output, runner, mode):
    compared = run(f"identity-{runner}-{mode}", output)["compared"]
    assert {name: one["errors"] for name, one in compared.items() if not one["holds"]} == {}


@pytest.mark.parametrize("step", ["profile", "arm-none", "arm-fixed-01", "arm-fixed-02", "arm-adaptive"])
def test_the_random_pair_is_measured(output, step):
    assert run(step, output)["backend"] == "cuda"
