"""The benchmark of the plugin's own cost: equal work or an error, costs of pairs, adapters that change nothing."""

from __future__ import annotations

import math
import random

import bench_adapters
import click
import numpy as np
import overhead
import pytest
from overhead import BARE, OURS

from ppow_train.serving_eval import Run
from vllm_ppow.merge import Merger
from vllm_ppow.metrics import SpecDecodeCounts


def run(tokens=((1, 2),), accepted=3, steps=2, seconds=1.0):
    counts = SpecDecodeCounts(2, 10, accepted, (2, 1, 0, 0, 0))
    return Run(
        [list(t) for t in tokens],
        seconds,
        counts,
        cpu_seconds=2 * seconds,
        step_seconds=[seconds / steps] * steps,
    )


def test_unequal_work_is_an_error():
    overhead.check_same_work({BARE: run(), OURS: run()})
    for other in (run(tokens=((1, 3),)), run(accepted=4), run(steps=3)):
        with pytest.raises(click.ClickException, match="the same work"):
            overhead.check_same_work({BARE: run(), OURS: other})


def test_costs_are_of_pairs():
    pairs = [(1.0, 1.01), (2.0, 2.0), (10.0, 10.3)]
    result = overhead.summarise([overhead.cost_of(pair) for pair in pairs], 0.01, pairs=pairs)
    assert result["pairs"] == pairs
    assert result["cost"] == pytest.approx(0.01)
    assert result["cost_interval"] is None, "three pairs are too few for one"
    assert result["met"] == (result["cost"] <= 0.01)
    assert not overhead.summarise([0.2], 0.05)["met"]
    assert "MISSED" in overhead.show("step", overhead.summarise([0.2], 0.05))


def test_a_median_below_the_aim_is_not_enough_to_show_it():
    noisy = [-0.05, -0.04, 0.0, 0.005, 0.03, 0.04, 0.05]
    result = overhead.summarise(noisy, 0.01)
    assert (result["met"], result["shown"]) == (True, False)
    assert overhead.show("step", result).endswith("met, not shown")
    quiet = overhead.summarise([cost / 10 for cost in noisy], 0.01)
    assert quiet["shown"]
    assert overhead.show("step", quiet).endswith(": met")


@pytest.mark.parametrize("cost", [0.0, 0.005, 0.03])
def test_disturbed_steps_hide_no_cost_and_make_none(cost):
    """Half the passes run at another pace, and every fifth step of the others is interrupted."""
    draw = np.random.default_rng(1)
    work = draw.uniform(0.01, 0.03, size=40)

    def rounds() -> np.ndarray:
        seconds = work * draw.uniform(1.0, 1.02, size=(200, 40))
        seconds *= np.where(draw.random((200, 1)) < 0.5, draw.uniform(1.0, 1.5, size=(200, 1)), 1.0)
        return seconds + np.where(draw.random((200, 40)) < 0.2, draw.exponential(0.01, size=(200, 40)), 0.0)

    found = overhead.undisturbed_cost(rounds(), rounds() * (1 + cost))
    assert found == pytest.approx(cost, abs=0.002)


def test_every_pair_of_engines_counts_once_however_many_rounds_it_made():
    """Eight pairs that differ by chance more than their rounds do: the interval is theirs, not that of 80 rounds."""
    draw = random.Random(2)
    pairs = []
    for start in range(8):
        pair, luck = overhead.EnginePair(), (start - 3.5) * 0.01
        for _ in range(10):
            pace = draw.uniform(1.0, 1.001)
            pair.add({BARE: run(seconds=1.0), OURS: run(seconds=(1.02 + luck) * pace)})
        pairs.append(pair)
    figures = overhead.summarise_steps(pairs, 0.01)
    assert set(figures) == {"step", "step_cpu", "step_undisturbed"}
    for figure in figures.values():
        assert figure["cost"] == pytest.approx(0.02, abs=0.002)
        assert (figure["rounds"], len(figure["costs"])) == (80, 8)
        low, high = figure["cost_interval"]
        assert low == pytest.approx(-0.015, abs=0.002)
        assert high == pytest.approx(0.055, abs=0.002)
        assert not figure["shown"]
    assert figures["step"]["drafts_per_pass"] == 2
    assert len(figures["step"]["pairs"]) == 8


def test_the_interval_holds_the_median_of_what_is_drawn_from():
    """Exact ranks from tables of the sign test, and coverage on a skewed law with outliers."""
    assert overhead.median_interval(range(5)) is None
    assert overhead.median_interval(range(6)) == (0, 5)
    assert overhead.median_interval(range(16)) == (3, 12)
    assert overhead.median_interval(range(100)) == (39, 60)
    draw = random.Random(0)
    intervals = [
        overhead.median_interval([draw.expovariate(1.0) ** 3 for _ in range(16)]) for _ in range(2000)
    ]
    covered = sum(low <= math.log(2) ** 3 <= high for low, high in intervals)
    assert 0.95 <= covered / 2000 <= 0.985


def test_the_bare_arm_is_without_the_plugin(tmp_path):
    assert overhead.environment_of(BARE) == {"VLLM_PLUGINS": ""}
    assert overhead.environment_of(OURS) == {}
    adapter = bench_adapters.make_adapter(tmp_path / "zero", 0.0)
    specs = overhead.speculative_configs(adapter, 5)
    assert specs[BARE]["method"] == "eagle3"
    assert specs[BARE]["draft_sample_method"] == "greedy"
    assert specs[OURS]["ppow"] == {"window": "fixed"}


@pytest.mark.parametrize("scale", [0.0, 0.2])
def test_a_made_up_adapter_is_merged_whole_and_changes_what_it_should(tmp_path, scale):
    import torch
    from safetensors.torch import load_file

    adapter = bench_adapters.make_adapter(tmp_path / "adapter", scale)
    merger = Merger(adapter)
    drafter = bench_adapters.TINY / "eagle3"
    merger.check_base(drafter)
    base = load_file(drafter / "model.safetensors")
    merged = dict(merger.wrap(iter(base.items())))
    changed = [name for name, tensor in merged.items() if not torch.equal(tensor, base[name])]
    assert len(changed) == (0 if scale == 0 else 8)
    if scale:
        name = "layers.0.mlp.up_proj.weight"
        share = (merged[name].float() - base[name].float()).std() / base[name].float().std()
        assert share == pytest.approx(scale, rel=0.1)
