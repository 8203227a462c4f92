"""Step times: learned from a noisy clock, corrected against a profile, growing in batch and draft length."""

from __future__ import annotations

import math
import random

import pytest
from simulated_serving import accelerator, processor

from vllm_ppow.step_cost import FIRST_USES, IDENTIFIED, StepCost

COSTS = {"accelerator": accelerator, "processor": processor}
LENGTHS = range(9)


@pytest.fixture(params=COSTS)
def truth(request):
    cost = COSTS[request.param]
    return lambda batch, length: cost(batch, length, length)


class Profile:
    """A cost profile measured on a machine that was faster by a factor."""

    def __init__(self, truth, factor):
        self.truth, self.factor = truth, factor

    def step_seconds(self, batch, num_draft_tokens, context=None):
        return self.truth(batch, num_draft_tokens) / self.factor


def observe(cost, truth, batches, lengths, times, noise=0.0, seed=0):
    rng = random.Random(seed)
    for _ in range(times):
        for batch in batches:
            for length in lengths:
                cost.observe(truth(batch, length) * rng.lognormvariate(0, noise), batch, length, batch * 100)


def test_costs_are_learned_and_interpolated(truth):
    cost = StepCost()
    observe(cost, truth, (1, 4, 16), (0, 1, 3, 8), 40, noise=0.1)
    quartile = math.exp(-0.674 * 0.1)  # the lower one, alike for all lengths, is what is kept
    for batch in (1, 2, 4, 8, 16, 24):
        for length in (0, 2, 4, 8):
            assert cost.step_seconds(batch, length) == pytest.approx(
                quartile * truth(batch, length), rel=0.12
            ), (
                batch,
                length,
            )


def test_stray_steps_and_compilation_do_no_harm(truth):
    cost, rng = StepCost(), random.Random(0)
    for step in range(60):
        for length in (0, 1, 4):
            slow = 200 if step == 0 else 10 if rng.random() < 0.1 else 1
            cost.observe(truth(2, length) * slow, 2, length)
    for length in (0, 1, 4):
        assert cost.step_seconds(2, length) == pytest.approx(truth(2, length), rel=0.03)


def test_slow_first_uses_of_a_length_do_not_rule_it_out(truth):
    """A probe that finds a length cold: were it counted, the length would look dear, and hardly be probed again."""
    cost = StepCost()
    observe(cost, truth, (2,), (0, 1, 3), 30, noise=0.05)
    for slow in (1.8, 1.6):
        cost.observe(slow * truth(2, 2), 2, 2)
    assert cost.step_seconds(2, 2) == pytest.approx(truth(2, 2), rel=0.1)


def test_lengths_timed_at_another_pace_stay_comparable(truth):
    """K = 3 is timed before a rest, K = 2 after it on a machine 30 % slower: K = 0, timed in both, tells."""
    cost = StepCost()
    observe(cost, truth, (2,), (0, 3), 40, noise=0.02)
    observe(cost, truth, (16,), (0,), 20)
    observe(cost, lambda batch, length: 1.3 * truth(batch, length), (2,), (0,), 8, noise=0.02)
    observe(cost, lambda batch, length: 1.3 * truth(batch, length), (2,), (2,), 20, noise=0.02)
    ratio = cost.step_seconds(2, 2) / cost.step_seconds(2, 3)
    assert ratio == pytest.approx(truth(2, 2) / truth(2, 3), rel=0.05)
    assert cost.step_seconds(2, 3) == pytest.approx(1.3 * truth(2, 3), rel=0.08), "and in seconds of now"


def test_a_slower_machine_is_followed(truth):
    cost = StepCost()
    observe(cost, truth, (4,), (0, 2, 4), 50)
    observe(cost, lambda batch, length: 3 * truth(batch, length), (4,), (0, 2, 4), 50)
    assert cost.step_seconds(4, 2) == pytest.approx(3 * truth(4, 2), rel=0.03)


def test_costs_grow_in_batch_and_draft_length(truth):
    """Also from noise in which longer drafts look cheaper."""
    cost, rng = StepCost(), random.Random(3)
    for _ in range(5):
        for batch in (1, 8):
            for length in (0, 1, 2, 3):
                cost.observe(rng.uniform(0.9, 1.1) - 0.05 * length, batch, length)
    table = cost.table(2, LENGTHS)
    assert table == sorted(table)
    bases = [cost._base(batch, 3, 0) for batch in (1, 2, 8, 64)]
    assert bases == sorted(bases)
    assert min(table) > 0


def test_a_profile_is_used_at_once_and_corrected(truth):
    cost = StepCost(Profile(truth, 2.0))
    assert cost.wanted(4, LENGTHS) == []
    assert cost.step_seconds(4, 3) == pytest.approx(truth(4, 3) / 2)
    observe(cost, truth, (4,), (3,), 40)
    assert cost.step_seconds(4, 3) == pytest.approx(truth(4, 3), rel=0.02)
    alone = cost.step_seconds(32, 8)
    assert truth(32, 8) / 2 < alone < truth(32, 8), "by a factor or by so much in each step? half of either"
    observe(cost, truth, (4,), (0,), 40)
    observe(cost, truth, (16,), (0,), 40)
    assert cost.step_seconds(32, 8) == pytest.approx(truth(32, 8), rel=0.05), "by a factor"


def test_what_a_server_adds_to_every_step_is_not_taken_for_a_factor(truth):
    """Seen at K = 0 alone, where drafting has ended: a factor would keep it looking too dear to be tried."""
    added = 0.5 * truth(1, 0)
    cost = StepCost(Profile(truth, 1.0))
    observe(cost, lambda batch, length: truth(batch, length) + added, (1, 4, 16), (0,), 40)
    assert cost.step_seconds(16, 3) == pytest.approx(truth(16, 3) + added, rel=0.06)


def test_a_machine_that_became_faster_does_not_make_long_drafts_look_free(truth):
    """A short length was timed while the machine was slow, a long one after that: no reason to give up the profile."""
    cost = StepCost(Profile(truth, 1.0))
    observe(cost, lambda batch, length: 1.8 * truth(batch, length), (4,), (3,), 9)
    observe(cost, truth, (4,), (8,), 9)
    errors = [cost.step_seconds(16, length) / truth(16, length) for length in LENGTHS]
    assert max(errors) / min(errors) < 1.55, (
        "all too dear, but each alike; 1.9 and 4 where a constant may replace it"
    )


def test_what_is_wanted_ends_when_it_was_seen(truth):
    cost = StepCost()
    assert cost.wanted(4, LENGTHS) == [3, 0, 1]
    assert cost.wanted(4, (2,)) == [2]
    observe(cost, truth, (4,), (3, 0), FIRST_USES + IDENTIFIED - 1)
    assert cost.wanted(5, LENGTHS) == [3, 0, 1]
    observe(cost, truth, (4,), (3, 0), 1)
    assert cost.wanted(5, LENGTHS) == [1]
    observe(cost, truth, (5,), (1,), FIRST_USES + IDENTIFIED)
    assert cost.wanted(4, LENGTHS) == []
    assert cost.wanted(9, LENGTHS) == [], "the next octave is extrapolated to"
    assert cost.wanted(64, LENGTHS) == [3, 0, 1]


def test_nonsense_is_ignored():
    cost = StepCost()
    cost.observe(0.0, 1, 1)
    cost.observe(1.0, 0, 1)
    assert not cost._cells


@pytest.mark.parametrize("profile", [False, True])
def test_costs_seen_long_ago_are_forgotten_not_divided_by(truth, profile):
    """Millions of steps later the weight of a cell is zero in floating point."""
    cost = StepCost(Profile(truth, 1.0) if profile else None)
    observe(cost, truth, (1, 4), (0, 1, 3), 10)
    cost._now += 6_000_000
    observe(cost, truth, (32,), (0, 1, 3), 40)
    assert cost.step_seconds(32, 1) == pytest.approx(truth(32, 1), rel=0.05)
    assert cost.step_seconds(1, 1) > 0
    assert len(cost._cells) == 3


def test_no_step_is_promised_to_cost_nothing():
    """Times that jump with the draft length leave a regression in which K = 0 is free."""
    cost = StepCost()
    observe(cost, lambda batch, length: 1e-3 * (length - 2) ** 3, (16,), (3, 4, 5, 6), 30)
    assert cost.step_seconds(16, 0) > 1e-3 / 10
    assert cost.step_seconds(1, 0) > 1e-3 / 10 / 16
    assert cost.step_seconds(16, 6) == pytest.approx(64e-3, rel=0.3)


def test_fits_are_rarer_where_there_is_more_to_fit(truth, monkeypatch):
    fits = []
    monkeypatch.setattr(StepCost, "_fit", lambda self: fits.append(len(self._cells)) or fit(self))
    cost = StepCost()
    observe(cost, truth, range(1, 257), range(9), FIRST_USES + IDENTIFIED)
    before = len(fits)
    observe(cost, truth, range(1, 257), range(9), 1)
    assert len(fits) - before <= 256 * 9 / len(cost._cells) + 1


fit = StepCost._fit


def test_the_profile_is_asked_for_contexts_to_a_grain_and_each_once():
    asked = []

    class Counting:
        def step_seconds(self, batch, num_draft_tokens, context=None):
            asked.append((batch, num_draft_tokens, context))
            return 0.01 + 1e-5 * context

    cost = StepCost(Counting())
    near = [cost.step_seconds(4, 2, 4 * context) for context in (305, 310, 320, 335)]
    assert asked == [(4, 2, 320)]
    assert near == [near[0]] * 4
    assert cost.step_seconds(4, 2, 4 * 340) > near[0]
    assert asked[-1] == (4, 2, 352)
