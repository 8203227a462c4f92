"""Conditional acceptance per position: right under short drafts, forgetful, extrapolated where nothing was drafted."""

from __future__ import annotations

import random

import pytest

from vllm_ppow.acceptance import MILD_PRIOR, AcceptanceEstimate, conditional_acceptance


def draft(rng, estimate, acceptance, length):
    accepted = 0
    while accepted < length and rng.random() < acceptance[accepted]:
        accepted += 1
    estimate.observe(length, accepted)


def known(estimate):
    """Observations, forgetting applied, that stand behind each position."""
    return [value / estimate._weight for value in estimate._trials]


def test_counts_are_conditional_and_censored():
    estimate = AcceptanceEstimate(4, memory=10**9)
    for length, accepted in ((4, 2), (2, 2), (1, 0), (0, 0), (4, 4)):
        estimate.observe(length, accepted)
    assert known(estimate) == pytest.approx([4, 3, 2, 1], rel=1e-5)
    accepted = [value / estimate._weight for value in estimate._accepted]
    assert accepted == pytest.approx([3, 3, 1, 1], rel=1e-5)


@pytest.mark.parametrize("lengths", [(1, 2), (1, 5), (5, 5)])
def test_short_drafts_bias_nothing(lengths):
    """Naive unconditional counts would take a short draft for a rejection at the positions it did not reach."""
    rng, truth = random.Random(0), [0.9, 0.7, 0.5, 0.8, 0.3]
    estimate = AcceptanceEstimate(5, memory=10**6)
    for _ in range(20_000):
        draft(rng, estimate, truth, rng.randint(*lengths))
    seen = lengths[1]
    assert estimate.conditional()[:seen] == pytest.approx(truth[:seen], abs=0.03)
    expected = (
        0.9
        + 0.9 * 0.7
        + (0.9 * 0.7 * 0.5 + 0.9 * 0.7 * 0.5 * 0.8 + 0.9 * 0.7 * 0.5 * 0.8 * 0.3 if seen == 5 else 0)
    )
    assert estimate.promises()[seen] == pytest.approx(expected, abs=0.05)


def test_positions_not_drafted_are_like_the_last_known_one():
    estimate = AcceptanceEstimate(6, memory=10**6)
    for i in range(3000):
        estimate.observe(2, 2 if i % 2 else 1)
    a = estimate.conditional()
    assert a[0] == pytest.approx(1.0, abs=0.01)
    assert a[1:] == pytest.approx([0.5] * 5, abs=0.01)


def test_a_prior_stands_until_something_is_seen_and_keeps_its_shape_afterwards():
    prior = [0.8, 0.4, 0.1]
    assert AcceptanceEstimate(3, prior).survival() == pytest.approx(prior)
    assert AcceptanceEstimate(4, prior).survival()[3] == pytest.approx(0.1 * 0.25)
    assert AcceptanceEstimate(2).conditional() == [MILD_PRIOR] * 2
    estimate = AcceptanceEstimate(3, prior, memory=10**6)
    for i in range(
        4000
    ):  # position 1 is accepted half as often as the prior says; the others are not drafted
        estimate.observe(1, 1 if i % 10 < 4 else 0)
    assert estimate.conditional() == pytest.approx([0.4, 0.25, 0.125], abs=0.01)


def test_a_measured_prior_outlives_a_warm_up_with_copies_of_one_prompt_and_is_forgotten():
    estimate = AcceptanceEstimate(3, [0.6, 0.3, 0.1])
    for _ in range(32):
        estimate.observe(1, 0)
    assert estimate.conditional()[0] > 0.3
    for i in range(3000):
        estimate.observe(1, i % 10 == 0)
    assert estimate.conditional()[0] == pytest.approx(0.1, abs=0.02)


def test_what_changed_is_followed_and_old_counts_fade():
    rng = random.Random(1)
    estimate = AcceptanceEstimate(3, memory=200)
    for _ in range(5000):
        draft(rng, estimate, [0.9, 0.9, 0.9], 3)
    before = estimate.promises()[3]
    for _ in range(800):
        draft(rng, estimate, [0.2, 0.2, 0.2], 3)
    assert before == pytest.approx(0.9 + 0.81 + 0.729, abs=0.2)
    assert estimate.promises()[3] == pytest.approx(0.2 + 0.04 + 0.008, abs=0.12)
    assert known(estimate)[0] == pytest.approx(200, rel=0.05)


def test_long_runs_do_not_overflow():
    estimate = AcceptanceEstimate(1, memory=1)
    for i in range(5000):
        estimate.observe(1, i % 2)
    assert 0 < estimate.conditional()[0] < 1


def test_bad_arguments():
    with pytest.raises(ValueError, match="maximum and memory >= 1, got 0 and 5"):
        AcceptanceEstimate(0, memory=5)
    assert conditional_acceptance([0.5, 0.0, 0.0]) == [0.5, 0.0]


def test_a_steps_outcomes_count_alike_in_whatever_order_they_came():
    outcomes = {(4, 4): 300, (4, 0): 80, (4, 2): 20, (0, 0): 5}
    steps = [AcceptanceEstimate(4), AcceptanceEstimate(4)]
    for _ in range(10):
        steps[0].observe_step(outcomes)
        steps[1].observe_step(dict(reversed(outcomes.items())))
    assert steps[0].survival() == pytest.approx(steps[1].survival(), rel=1e-9)
    assert steps[0].survival()[0] == pytest.approx(320 / 400, abs=0.003)
    assert steps[0].survival()[3] == pytest.approx(300 / 400, abs=0.003)


def test_large_batches_do_not_bias_what_is_learned():
    """Half of all first tokens are accepted, in steps of a thousand drafts."""
    draw, large = random.Random(0), AcceptanceEstimate(1)
    for _ in range(50):
        accepted = sum(draw.random() < 0.5 for _ in range(1000))
        large.observe_step({(1, 0): 1000 - accepted, (1, 1): accepted})
    assert large.survival()[0] == pytest.approx(0.5, abs=0.05)


def test_a_step_weighs_as_its_drafts_one_after_the_other():
    single, together = AcceptanceEstimate(4, memory=50), AcceptanceEstimate(4, memory=50)
    for num_draft_tokens, num_accepted_tokens, times in ((3, 1, 5), (4, 4, 7), (2, 0, 1), (0, 0, 3)):
        for _ in range(times):
            single.observe(num_draft_tokens, num_accepted_tokens)
        together.observe_step({(num_draft_tokens, num_accepted_tokens): times})
    assert together.survival() == pytest.approx(single.survival(), rel=1e-12)
    assert known(together) == pytest.approx(known(single), rel=1e-12)
