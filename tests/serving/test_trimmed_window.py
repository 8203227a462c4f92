"""A window whose drafts are trimmed by request: it chooses between the maximum and no drafts, and seldom looks away."""

from __future__ import annotations

import random

import pytest

from vllm_ppow.acceptance import AcceptanceEstimate, TrimmedAcceptance
from vllm_ppow.step_cost import StepCost
from vllm_ppow.window import DraftWindow

MAXIMUM, BATCH = 8, 16


def serve(window: DraftWindow, steps: int, accepted: float, drafting: float, seed: int = 0) -> float:
    """Share of steps without drafts; trimmed drafts bring `accepted` tokens a request, in `drafting` times as long."""
    draw, last, zeros = random.Random(seed), -1, 0
    for _ in range(steps):
        length = window.choose(BATCH, BATCH * 100)
        zeros += not length
        counts = [int(draw.random() < accepted) if last > 0 else 0 for _ in range(BATCH)]
        for count in counts:
            if last > 0:
                window.observe_draft(1, count)
        if last == length:
            seconds = 0.05 * (drafting if length else 1.0) * draw.lognormvariate(0.0, 0.05)
            window.observe_step(seconds, BATCH, length, BATCH * 100, sum(counts))
        last = length
    return zeros / steps


def make_window(by_request: bool = True) -> DraftWindow:
    return DraftWindow([0, MAXIMUM], AcceptanceEstimate(MAXIMUM), StepCost(), TrimmedAcceptance(), by_request)


def test_where_trimmed_drafts_pay_it_seldom_looks_what_none_would_bring():
    """Nine percent more tokens per second: a drafter of our own has ended most drafts that do not pay."""
    ours, others = make_window(), make_window(by_request=False)
    for window in (ours, others):
        serve(window, 200, 0.4, 1.28)
    assert 0 < serve(ours, 2000, 0.4, 1.28, seed=1) < 0.02
    assert serve(others, 2000, 0.4, 1.28, seed=1) > 0.04


def test_what_is_expected_of_a_draft_is_what_trimmed_drafts_of_its_length_bring():
    """A long one has become so because it promises much: whole drafts of that length bring less."""
    window, draw = make_window(), random.Random(0)
    window.choose(BATCH)
    for step in range(600):
        if step == 300:
            before = window.counts.copy()
        for _ in range(BATCH):
            sure = draw.random() < 0.3
            length, first = (8, 0.95) if sure else (1, 0.2)
            accepted = 0
            while accepted < length and draw.random() < first:
                accepted += 1
            window.observe_draft(length, accepted)
        window.choose(BATCH)
    counts = window.counts - before
    assert counts.predicted / counts.accepted == pytest.approx(1.0, abs=0.03)
    whole = window.acceptance.promises()[8]
    assert window.trimmed.expected(BATCH, 8, whole) > 1.3 * whole, "else there was nothing to tell apart"


def test_it_gives_up_drafts_that_do_not_pay_and_finds_them_to_pay_again():
    window = make_window()
    serve(window, 200, 0.4, 1.28)
    serve(window, 400, 0.0, 1.28, seed=1)
    assert serve(window, 400, 0.0, 1.28, seed=2) > 0.9
    serve(window, 1000, 0.6, 1.28, seed=3)
    assert serve(window, 400, 0.6, 1.28, seed=4) < 0.1
