"""Turns over the draft lengths of a cost profile at one pace: what slows a turn, or a part of it, does no harm."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from ppow_train.turns import Samples, at_one_pace, turn_levels

COSTS = {0: 0.037, 1: 0.040, 2: 0.043, 4: 0.050, 8: 0.062, 10: 0.068}  # seconds of a step by draft length


def burst(seconds: list[float]) -> Samples:
    """Nine tenths of a step are the target's, the rest the drafter's."""
    return Samples([0.9 * s for s in seconds], [0.1 * s for s in seconds], seconds)


def turn(
    pace: dict[int, float] | float, rng: random.Random | None = None, steps: int = 5
) -> dict[int, Samples]:
    paces = pace if isinstance(pace, dict) else dict.fromkeys(COSTS, pace)
    return {n: burst([c * paces[n] * _noise(rng) for _ in range(steps)]) for n, c in COSTS.items()}


def _noise(rng: random.Random | None) -> float:
    return rng.lognormvariate(0, 0.03) if rng else 1.0


def test_turns_at_other_paces_are_brought_to_that_of_the_median_turn():
    pooled = at_one_pace([turn(1.0), turn(1.5), turn(0.8)])
    assert list(pooled) == list(COSTS)
    for length, samples in pooled.items():
        assert samples.step == pytest.approx([COSTS[length]] * 15)
        assert samples.medians == pytest.approx((0.9 * COSTS[length], 0.1 * COSTS[length], 0.0), abs=1e-12)
        assert samples.spread == pytest.approx(0.0, abs=1e-12)


def test_what_disturbs_a_part_of_a_turn_moves_neither_the_rest_of_it_nor_the_length_elsewhere():
    disturbed = turn({0: 1.0, 1: 1.0, 2: 1.0, 4: 1.6, 8: 1.7, 10: 1.0})
    pooled = at_one_pace([turn(1.0), disturbed, turn(1.2)])
    for length, samples in pooled.items():
        assert statistics.median(samples.step) == pytest.approx(COSTS[length])
    assert turn_levels([{0: 0.0, 1: 1.0}, {0: 0.5, 1: 1.5}, {0: 0.2, 1: 1.2}]) == pytest.approx(
        [-0.2, 0.3, 0.0]
    )


def test_a_burst_that_measured_nothing_leaves_its_turn_standing():
    partial = {n: s for n, s in turn(1.3).items() if n != 4}
    pooled = at_one_pace([turn(1.0), partial, {}, turn(1.0)])
    assert [len(samples.step) for samples in pooled.values()] == [15, 15, 15, 10, 15, 15]
    assert pooled[10].step == pytest.approx([COSTS[10]] * 15)
    assert at_one_pace([]) == {}


def disturbed_turns(seed: int) -> list[dict[int, Samples]]:
    """Eight turns on a shared machine: each at its own pace, and now and then other work for one to four bursts."""
    rng, turns, left, slow = random.Random(seed), [], 0, 1.0
    for number in range(8):
        level, paces = rng.gauss(0, 0.15), {}
        for length in list(COSTS) if number % 2 == 0 else reversed(COSTS):
            if not left and rng.random() < 0.1:
                left, slow = rng.randint(1, 4), rng.uniform(1.1, 1.5)
            paces[length] = math.exp(level) * (slow if left else 1.0)
            left = max(0, left - 1)
        turns.append(turn(paces, rng))
    return turns


def test_the_shape_of_the_costs_comes_out_nearer_than_from_all_steps_together():
    def error(measured: dict[int, Samples]) -> float:
        """Of the ratios to drafting nothing, mean of the absolute logs."""
        none = statistics.median(measured[0].step)
        logs = [
            math.log(statistics.median(measured[n].step) / none / (COSTS[n] / COSTS[0])) for n in COSTS if n
        ]
        return statistics.mean(map(abs, logs))

    adjusted, pooled = [], []
    for turns in map(disturbed_turns, range(40)):
        adjusted.append(error(at_one_pace(turns)))
        pooled.append(error({n: burst([s for one in turns for s in one[n].step]) for n in COSTS}))
    assert statistics.mean(adjusted) < 0.025
    assert statistics.mean(adjusted) < 0.5 * statistics.mean(pooled)
