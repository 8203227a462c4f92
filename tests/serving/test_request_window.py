"""Draft lengths by request on a simulated drafter: better than every fixed length, and blind to its own tokens."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from serving_profile import PROFILE

from vllm_ppow.cost_profile import CostProfile
from vllm_ppow.request_window import RequestWindow
from vllm_ppow.step_cost import IDENTIFIED

K = 8


class Requests:
    """Requests whose drafter knows, by a top-1 probability that is off by a square, how easy the next token is."""

    def __init__(self, batch: int, easy: float, seed: int = 0) -> None:
        self.batch, self.easy, self.rng = batch, easy, random.Random(seed)

    def chances(self) -> list[list[float]]:
        """P(accepted | those before were) by request and position; easy and hard stretches alternate."""
        return [
            [0.97 if (easy := self.rng.random() < self.easy) else 0.15] + [0.97 if easy else 0.15] * (K - 1)
            for _ in range(self.batch)
        ]

    def accepted(self, chances: list[float], length: int) -> int:
        count = 0
        while count < length and self.rng.random() < chances[count]:
            count += 1
        return count


PASS, FIXED, TOKEN = 1.0e-3, 5e-3, 1.0e-3  # seconds of a drafter pass, of a step, of a verified token


def adaptive(
    requests: Requests, steps: int, window: RequestWindow, slowdown: Callable[[int], float] = lambda step: 1.0
) -> tuple[float, list[list[int]]]:
    """Tokens per second, and the lengths of each step; `slowdown` is what a step's clock is multiplied by."""
    tokens, seconds, chosen = 0, 0.0, []
    for step in range(steps):
        chances = requests.chances()
        window.begin(K, [False] * requests.batch, [True] * requests.batch)
        passes = 1
        while window.add([row[passes - 1] ** 2 for row in chances]) and passes < K:
            passes += 1
            window.pass_price.observe(requests.batch, PASS)
        lengths = window.lengths()
        accepted = [requests.accepted(row, n) for row, n in zip(chances, lengths, strict=True)]
        for row, n, count in zip(window.confidences, lengths, accepted, strict=True):
            window.observe(False, row[:n], count)
        verifying = slowdown(step) * (FIXED + TOKEN * (requests.batch + sum(lengths)))
        spent = verifying + PASS * passes
        window.verify_price.observe(requests.batch, requests.batch + sum(lengths), verifying)
        window.observe_step(requests.batch, sum(accepted) + requests.batch, spent)
        tokens += sum(accepted) + requests.batch
        seconds += spent
        chosen.append(lengths)
    return tokens / seconds, chosen


def fixed(requests: Requests, steps: int, length: int, slowdown: float = 1.0) -> float:
    tokens, seconds = 0, 0.0
    for _ in range(steps):
        accepted = [requests.accepted(row, length) for row in requests.chances()]
        tokens += sum(accepted) + requests.batch
        verifying = slowdown * (FIXED + TOKEN * requests.batch * (1 + length))
        seconds += verifying + PASS * max(1, length)
    return tokens / seconds


@pytest.mark.parametrize(("batch", "easy"), [(1, 0.5), (4, 0.5), (16, 0.4)])
def test_better_than_every_fixed_length(batch, easy):
    """Where requests differ, one length for all wastes on some or leaves something with others."""
    best = max(fixed(Requests(batch, easy, k), 1500, k) for k in range(K + 1))
    window = RequestWindow(K)
    for _ in range(IDENTIFIED):  # the scheduler begins with steps that draft nothing
        window.verify_price.observe(batch, batch, FIXED + TOKEN * batch)
    adaptive(Requests(batch, easy), 300, window)
    rate, chosen = adaptive(Requests(batch, easy, 1), 1000, window)
    assert rate > 1.05 * best
    if batch > 1:
        assert any(len(set(lengths)) > 1 for lengths in chosen)


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_slow_first_steps_do_not_end_drafting(batch):
    """First uses make the first drafts look ten times as dear; it is found out that they are not."""
    best = max(fixed(Requests(batch, 0.5, k), 1500, k) for k in range(K + 1))
    window = RequestWindow(K)
    adaptive(Requests(batch, 0.5), 200, window, lambda step: 10.0 if step < 4 else 1.0)
    rate, _ = adaptive(Requests(batch, 0.5, 1), 1000, window)
    assert rate > best


@pytest.mark.parametrize("batch", [1, 16])
def test_a_noisy_clock_costs_little(batch):
    best = max(fixed(Requests(batch, 0.5, k), 1500, k) for k in range(K + 1))
    noise, window = random.Random(7), RequestWindow(K)
    adaptive(Requests(batch, 0.5), 400, window, lambda step: noise.lognormvariate(0.0, 0.15))
    rate, _ = adaptive(Requests(batch, 0.5, 1), 1000, window, lambda step: noise.lognormvariate(-0.011, 0.15))
    assert rate > 0.98 * best


def profile_of(batch: int) -> CostProfile:
    """What `ppow profile` would have measured of these costs."""
    lengths = range(K + 1)
    times = {
        "target_step_seconds": [FIXED + TOKEN * batch * (1 + length) for length in lengths],
        "draft_seconds": [PASS * max(1, length) for length in lengths],
        "overhead_seconds": [0.0 for _ in lengths],
    }
    return replace(
        PROFILE,
        context_lengths=(64,),
        batch_sizes=(batch,),
        num_speculative_tokens=K,
        draft_lengths=tuple(lengths),
        acceptance_per_position=(),
        **{name: ((tuple(values),),) for name, values in times.items()},
    )


@pytest.mark.parametrize("batch", [4, 16])
def test_with_a_profile_the_first_drafts_are_trimmed_as_later_ones_are(batch):
    """Without, drafts of odd lengths come first, to learn prices."""
    best = max(fixed(Requests(batch, 0.4, k), 1500, k) for k in range(K + 1))

    def first_steps(profile: CostProfile | None) -> float:
        runs = [
            adaptive(Requests(batch, 0.4, s), 40, RequestWindow(K, profile=profile))[0] for s in range(20)
        ]
        return sum(runs) / len(runs)

    assert first_steps(profile_of(batch)) > best
    assert first_steps(profile_of(batch)) > 1.05 * first_steps(None)


def test_a_profile_of_other_costs_gives_way_to_the_clock():
    """Verification takes three times as long as measured, in its fixed part and in its tokens' alike."""
    slow = 3.0
    best = max(fixed(Requests(4, 0.5, k), 1500, k, slow) for k in range(K + 1))
    window = RequestWindow(K, profile=profile_of(4))
    adaptive(Requests(4, 0.5), 400, window, lambda step: slow)
    rate, _ = adaptive(Requests(4, 0.5, 1), 1000, window, lambda step: slow)
    assert rate > best


def test_drafts_are_found_to_pay_again():
    """A stretch in which nothing is accepted leaves explorations only, and they cost about one percent."""
    window = RequestWindow(K)
    adaptive(Requests(1, 0.5), 300, window)
    hopeless, _ = adaptive(Requests(1, 0.0), 3000, window)
    assert hopeless > 0.97 * max(fixed(Requests(1, 0.0, k), 3000, k) for k in range(K + 1))
    adaptive(Requests(1, 0.9), 2000, window)
    rate, _ = adaptive(Requests(1, 0.9, 1), 1000, window)
    assert rate > 0.97 * max(fixed(Requests(1, 0.9, k), 1500, k) for k in range(K + 1))


def test_the_first_draft_after_a_pause_explores():
    window = RequestWindow(K)
    adaptive(Requests(1, 0.0), 300, window)
    for paused in (False, True):
        window._drafts = 300  # none is due
        if paused:
            window.pause()
        window.begin(K, [False], [True])
        window.add([0.001])
        assert window.lengths() == [int(paused)]


@pytest.mark.parametrize(("limit", "lengths"), [(K, {1, 3}), (2, {1, 2}), (1, {0, 1})])
def test_lengths_take_turns_until_a_token_has_a_price(limit, lengths):
    """Whatever the drafter says of its tokens: a price shows only where the number of tokens changes."""
    window, found = RequestWindow(K), set()
    for _ in range(8):
        window.begin(limit, [False], [True])
        passes = 1
        while window.add([0.01]) and passes < limit:
            passes += 1
        found |= set(window.lengths())
    assert found == lengths


def test_the_minimum_is_kept_and_unused_requests_decide_nothing():
    requests, window = Requests(4, 0.0), RequestWindow(K, minimum=2)
    for _ in range(IDENTIFIED):
        window.verify_price.observe(4, 4, FIXED + TOKEN * 4)
    _, chosen = adaptive(requests, 300, window)
    assert min(map(min, chosen)) == 2
    window.begin(K, [False] * 2, [False, False])
    while window.add([0.99, 0.99]):
        pass
    assert window.lengths() == [0, 0]
    assert len(window.confidences[0]) == 2


def test_the_rule_is_given_no_token():
    """Lossless by construction: what it is told of a position is one number per request, max q_i."""
    assert list(inspect.signature(RequestWindow.add).parameters) == ["self", "confidences"]
    assert list(inspect.signature(RequestWindow.begin).parameters) == ["self", "limit", "sampled", "active"]
