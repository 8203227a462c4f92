"""Two policies of one engine: each serves its kind of traffic and learns of its own drafts, both count together."""

from __future__ import annotations

import random

import pytest

from vllm_ppow.acceptance import AcceptanceEstimate, TrimmedAcceptance
from vllm_ppow.step_cost import StepCost
from vllm_ppow.traffic_window import TrafficWindow
from vllm_ppow.window import DraftWindow

MAXIMUM = 4


@pytest.fixture
def whole() -> DraftWindow:
    return DraftWindow(range(MAXIMUM + 1), AcceptanceEstimate(MAXIMUM), StepCost())


@pytest.fixture
def trimmed() -> DraftWindow:
    estimate = AcceptanceEstimate(MAXIMUM)
    return DraftWindow([0, MAXIMUM], estimate, StepCost(), TrimmedAcceptance(), by_request=True)


@pytest.fixture
def window(whole, trimmed) -> TrafficWindow:
    return TrafficWindow(whole, trimmed)


@pytest.mark.parametrize(
    ("batch", "sampled", "trims"),
    [
        (1, 0, True),
        (1, 1, False),
        (10, 5, True),
        (10, 6, False),
        (10, 10, False),
        (3, 1, True),
        (3, 2, False),
    ],
)
def test_a_batch_that_mostly_samples_is_not_trimmed(window, batch, sampled, trims):
    window.choose(batch, None, True, sampled)
    assert window.by_request is trims
    assert window.counts.layers == (("step", "request") if trims else ("step",))


def test_a_batch_of_both_in_equal_parts_stays_as_it_is(window):
    for sampled, trims in ((5, True), (6, False), (5, False), (4, True), (5, True)):
        window.choose(10, None, True, sampled)
        assert window.by_request is trims


def serve(window: TrafficWindow, steps: int, sampled: int) -> None:
    """Sampled requests accept nothing and are slow to verify, greedy ones accept all of a token or two."""
    draw = random.Random(0)
    for _ in range(steps):
        length = window.choose(4, 400, True, sampled)
        accepted = 0
        for _ in range(4 if length else 0):
            count = 0 if sampled else min(2, length)
            window.observe_draft(length, count)
            accepted += count
        window.observe_step((0.2 if sampled else 0.02) * draw.uniform(0.99, 1.01), 4, length, 400, accepted)


def test_each_learns_of_its_own_drafts(window, whole, trimmed):
    serve(window, 200, sampled=0)
    assert whole.cost.observations == 0
    assert trimmed.acceptance.conditional()[0] > 0.9
    untouched = trimmed.acceptance.conditional()
    serve(window, 200, sampled=4)
    assert whole.acceptance.conditional()[0] < 0.1
    assert whole.cost.step_seconds(4, 1) == pytest.approx(0.2, rel=0.1)
    assert trimmed.cost.step_seconds(4, MAXIMUM) == pytest.approx(0.02, rel=0.1)
    serve(window, 1, sampled=4)  # the last outcomes of trimmed drafts are learned when it is asked again
    assert trimmed.acceptance.conditional() == pytest.approx(untouched, abs=0.05)


def test_the_drafts_of_the_kind_before_are_told_to_it_and_the_step_between_is_timed_for_neither(
    window, whole, trimmed
):
    window.choose(4, None, True, 0)
    window.choose(4, None, True, 4)  # verifies trimmed drafts, and drafts of one length
    window.observe_draft(3, 3)
    window.observe_step(0.1, 4, 3, 0, 3)
    window.observe_change(0.1, 4, 3)
    assert trimmed._outcomes == {(3, 3): 1}
    assert not whole._outcomes
    assert whole.cost._uses == trimmed.cost._uses == {}
    assert trimmed.changing._now == whole.changing._now == 0
    window.choose(4, None, True, 4)
    window.observe_draft(2, 1)
    window.observe_step(0.1, 4, 2, 0, 1)
    assert whole._outcomes == {(2, 1): 1}
    assert whole.cost._uses
    assert not trimmed.cost._uses


def test_both_count_together(window, whole, trimmed):
    for sampled in (0, 0, 4, 4, 4):
        window.choose(4, None, True, sampled)
        window.observe_draft(2, 1)
    counts = window.counts
    assert counts is whole.counts is trimmed.counts
    assert sum(counts.chosen) == 5
    assert (counts.requests, counts.drafts, counts.accepted) == (20, 5, 5)


def test_a_draft_that_a_grammar_refuses_as_a_whole_is_of_the_kind_that_is_drafted(window, whole, trimmed):
    """It was made in the step under way, and is not verified in the next."""
    for policy in (whole, trimmed):
        policy.observe_draft = lambda *draft, policy=policy: told.append((policy, draft))
    told = []
    window.choose(4, sampled=0)
    window.choose(4, sampled=4)
    window.observe_draft(3, 1, 1)
    window.observe_draft(3, 0, 3)
    assert told == [(trimmed, (3, 1, 1)), (whole, (3, 0, 3))]
