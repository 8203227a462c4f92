"""The benchmark of packed windows: both paths agree on small pairs, and it stops where they do not."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from training_pair import K, load

from ppow_train import causal

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmarks" / "packed_speed.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("packed_speed", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", ["causal_lm", "eagle3"])
def test_both_paths_draft_and_differentiate_alike(kind, script, directories, trajectories):
    torch.manual_seed(
        0
    )  # PEFT draws A of LoRA from it: without, the models would depend on which tests ran before
    benchmark = script.Benchmark(load(directories, kind), trajectories, 3, 2, K, seed=0)
    timed = [benchmark.round(12, packed_first=first) for first in (True, False)]
    summary = script.summarise(timed, 12)
    assert summary["same_rollouts"] == 1.0
    assert summary["largest_gradient_difference"] < 1e-3
    for clock in script.CLOCKS:
        for name in ("packed", "unpacked", "ratio"):
            assert 0 < summary[clock][name]["min"] <= summary[clock][name]["max"]


@pytest.mark.parametrize("kind", ["causal_lm", "eagle3"])
def test_the_target_reads_in_the_rollout_only(kind, script, directories, trajectories, monkeypatch):
    """In an update its answer is remembered: a path that had it read again while the clock runs would pay twice."""
    benchmark = script.Benchmark(load(directories, kind), trajectories, 3, 2, K, seed=0)
    target, encode, clocks = benchmark.runner.target.model, causal.encode, script.clocks
    looks, read = [], []

    def look(device):
        looks.append(device)
        return clocks(device)

    def watched(model, *args, **options):
        if model is target and len(looks) % 2:  # between the two looks at a clock
            read.append(len(looks) // 2)
        return encode(model, *args, **options)

    monkeypatch.setattr(script, "clocks", look)
    monkeypatch.setattr(causal, "encode", watched)
    benchmark.round(12, packed_first=False)
    assert len(looks) == 8
    assert set(read) == {0, 1}, "both rollouts, and neither update"


def test_paths_that_disagree_are_an_error(script):
    one, other = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.1])
    with pytest.raises(click.ClickException, match="disagree"):
        script._agreement({"packed": (1.0, one), "unpacked": (1.0, other)})
    with pytest.raises(click.ClickException, match="disagree"):
        script._agreement({"packed": (1.0, one), "unpacked": (1.1, one)})
    assert script._agreement({"packed": (1.0, one), "unpacked": (1.0, one)})["loss_difference"] == 0.0
