"""Noise in a cost profile's step times: taken out where turns tell that it is noise, and nothing else is."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from ppow_train import profiling, straight
from ppow_train.turns import Samples, at_one_pace

LENGTHS = (0, 1, 2, 4, 8, 10)
PLACES = [(context, batch) for context in (128, 256) for batch in (1, 2, 4, 8, 16, 32)]


def straight_costs(place):
    """Seconds of a step at a (context, batch)."""
    batch = place[1]
    return {n: 0.04 + 0.003 * batch + n * (0.002 + 0.0014 * batch) for n in LENGTHS}


def curved_costs(place):
    """A GPU's: flat as long as verification is free, steep beyond, and dear at one size."""
    return {n: s * (1 + 0.004 * n**2) * (1.1 if n == 4 else 1.0) for n, s in straight_costs(place).items()}


def measured(costs, sd, turns, seed):
    """(seconds of every point, its variance) as profiling.py hands them over: medians of noisy turns."""
    rng = random.Random(seed)
    points, turns_of_all = {}, []
    for place in PLACES:
        logs = {n: [math.log(s) + rng.gauss(0, sd) for _ in range(turns)] for n, s in costs(place).items()}
        points[place] = {n: math.exp(statistics.median(each)) for n, each in logs.items()}
        turns_of_all += logs.values()
    found = straight.noise(turns_of_all)
    return points, dict.fromkeys(PLACES, straight.median_variance(found, turns)), found


def error(points, costs):
    """Root mean square of the logs that points are off by, of each place's shape alone."""
    squares = []
    for place in PLACES:
        logs = [math.log(points[place][n] / s) for n, s in costs(place).items()]
        squares += [(log - statistics.mean(logs)) ** 2 for log in logs]
    return math.sqrt(statistics.mean(squares))


def corrected(points, variances):
    factors = straight.corrections(points, variances)
    return {place: {n: s * factors[place][n] for n, s in points[place].items()} for place in PLACES}


@pytest.mark.parametrize("turns", [3, 4, 8, 12])
def test_noise_is_found_from_turns_alone(turns):
    found = statistics.mean(measured(curved_costs, 0.1, turns, seed)[2] for seed in range(20))
    assert found == pytest.approx(0.1, rel=0.15)


@pytest.mark.parametrize(("sd", "turns"), [(0.05, 3), (0.1, 3), (0.1, 12)])
def test_a_noisy_profile_of_straight_costs_comes_out_much_nearer_to_them(sd, turns):
    before, after = [], []
    for seed in range(20):
        points, variances, _ = measured(straight_costs, sd, turns, seed)
        before.append(error(points, straight_costs))
        after.append(error(corrected(points, variances), straight_costs))
    assert statistics.mean(after) < 0.7 * statistics.mean(before)


@pytest.mark.parametrize("sd", [0.03, 0.1])
def test_curved_costs_are_not_made_straight_by_more_than_their_noise(sd):
    before, after = [], []
    for seed in range(20):
        points, variances, _ = measured(curved_costs, sd, 4, seed)
        before.append(error(points, curved_costs))
        after.append(error(corrected(points, variances), curved_costs))
    assert statistics.mean(after) < 1.02 * statistics.mean(before)


def test_a_quiet_machines_figures_stay_as_they_are():
    points, variances, _ = measured(curved_costs, 0.001, 3, 0)
    for place, factors in straight.corrections(points, variances).items():
        assert factors == pytest.approx(dict.fromkeys(LENGTHS, 1.0), abs=1e-3), place


def test_nothing_is_moved_where_the_noise_is_not_known():
    points, variances, found = measured(straight_costs, 0.1, 1, 0)
    assert found == 0.0
    assert straight.corrections(points, variances) == {p: dict.fromkeys(LENGTHS, 1.0) for p in PLACES}


def test_two_draft_lengths_lie_on_a_line_and_a_line_below_zero_is_none():
    two = {0: 0.04, 5: 0.07}
    assert straight.line(two) == pytest.approx(two)
    steep = {0: 0.001, 1: 0.5, 2: 4.0}
    assert min(straight.line({0: 1.0, 1: 0.9, 2: 0.8}).values()) == pytest.approx(0.885, abs=0.01), (
        "no falling line"
    )
    places = {(128, 1): two, (128, 2): steep}
    factors = straight.corrections(places, dict.fromkeys(places, 0.01))
    assert factors[128, 1] == {0: 1.0, 5: 1.0}
    assert set(factors[128, 2]) == {0, 1, 2}


def test_a_profile_is_made_of_straightened_turns_whose_parts_keep_their_shares():
    rng = random.Random(3)

    def burst(seconds):
        steps = [seconds * rng.lognormvariate(0, 0.01) for _ in range(5)]
        return Samples([0.6 * s for s in steps], [0.3 * s for s in steps], steps)

    turns = {
        place: [
            {n: burst(s * rng.lognormvariate(0, 0.1)) for n, s in straight_costs(place).items()}
            for _ in range(3)
        ]
        for place in PLACES
    }
    options = profiling.ProfileOptions((1, 2, 4, 8, 16, 32), (128, 256), LENGTHS)
    timed = profiling._pooled(turns, options)
    found = timed.samples
    assert set(found) == {(*place, n) for place in PLACES for n in LENGTHS}
    points = {place: {n: sum(found[*place, n].medians) for n in LENGTHS} for place in PLACES}
    plain = {place: medians(turns[place]) for place in PLACES}
    assert error(points, straight_costs) < 0.8 * error(plain, straight_costs)
    moves = [abs(points[place][n] / plain[place][n] - 1.0) for place in PLACES for n in LENGTHS]
    assert timed.moved == pytest.approx(max(moves))
    assert timed.moved > 0.02
    for samples in found.values():
        target, draft, overhead = samples.medians
        assert (target / draft, target / overhead) == pytest.approx((2.0, 6.0))


def medians(turns):
    return {n: sum(samples.medians) for n, samples in at_one_pace(turns).items()}
