"""What drafts of other lengths would get: against walks over text that is easy here and hard there."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest

from vllm_ppow.acceptance import AcceptanceEstimate
from vllm_ppow.other_lengths import accepted_by_length
from vllm_ppow.step_cost import StepCost
from vllm_ppow.window import DraftWindow

LENGTHS = range(1, 9)
PRICE = 0.04  # of a drafted token, in steps without


def text(tokens: int, seed: int = 0) -> list[bool]:
    """Whether the drafter guesses a token from the ones before it: in easy text 9 of 10, in hard text 3 of 10."""
    rng, easy, guessed = random.Random(seed), True, []
    for _ in range(tokens):
        easy ^= rng.random() < 0.1
        guessed.append(rng.random() < (0.9 if easy else 0.3))
    return guessed


def accepted_along(guessed: list[bool], length: int) -> Counter[int]:
    """Drafts of that length along the text, by accepted tokens."""
    counts, at = Counter(), 0
    while at + length < len(guessed):
        accepted = next((i for i in range(length) if not guessed[at + i]), length)
        counts[accepted] += 1
        at += accepted + 1
    return counts


def mean(counts: Counter[int]) -> float:
    return sum(accepted * times for accepted, times in counts.items()) / counts.total()


def survival(counts: Counter[int], maximum: int) -> list[float]:
    return [
        sum(times for accepted, times in counts.items() if accepted >= i) / counts.total()
        for i in range(1, maximum + 1)
    ]


def products(values):
    return list(itertools.accumulate(values, lambda x, y: x * y))


@pytest.fixture(scope="module")
def walks() -> dict[int, Counter[int]]:
    guessed = text(400_000)
    return {length: accepted_along(guessed, length) for length in LENGTHS}


@pytest.mark.parametrize("counted", [2, 3, 5, 8])
def test_shorter_drafts_along_text_of_uneven_difficulty(walks, counted):
    seen = survival(walks[counted], counted)
    found = accepted_by_length(seen, counted)
    assert found[counted] == pytest.approx(mean(walks[counted]))
    for length in range(1, counted):
        assert 1 + found[length] == pytest.approx(1 + mean(walks[length]), rel=0.01), length
    if counted == 8:  # without, drafts of one token look a seventh worse than they are
        assert seen[0] < 0.9 * mean(walks[1])


@pytest.mark.parametrize("counted", [1, 2, 3, 5])
def test_longer_drafts_are_not_promised_what_easy_starts_give(walks, counted):
    """Chances of later positions as drafts of eight tokens have them: half of what is too much is taken off."""
    chances = [after / before for before, after in itertools.pairwise([1.0, *survival(walks[8], 8)])]
    seen = survival(walks[counted], counted)
    for chance in chances[counted:]:
        seen.append(seen[-1] * chance)
    found = accepted_by_length(seen, counted)
    for length in range(counted + 1, 9):
        true, plain = 1 + mean(walks[length]), 1 + sum(seen[:length])
        assert found[length] + 1 <= plain
        assert abs(1 + found[length] - true) <= 0.6 * (plain - true) + 0.01 * true, length


@pytest.mark.parametrize("counted", [1, 2, 3.5, 8])
@pytest.mark.parametrize("chances", [[0.3] * 8, [0.9] * 8, [0.9 - 0.08 * i for i in range(8)]])
def test_where_only_the_position_tells_nothing_is_changed(chances, counted):
    """Even text, or a drafter that gets worse along its draft as much at every start."""
    seen = products(chances)
    assert accepted_by_length(seen, counted)[1:] == pytest.approx(list(itertools.accumulate(seen)), rel=0.001)


@pytest.mark.parametrize("seed", range(20))
def test_it_never_falls_lies_between_its_bounds_and_moves_smoothly(seed):
    rng = random.Random(seed)
    seen = products([rng.choice([0.0, 1.0, rng.random(), rng.random(), rng.random()]) for _ in range(8)])
    before = None
    for tenths in range(10, 81):
        found = accepted_by_length(seen, tenths / 10)
        assert len(found) == 9
        assert found == sorted(found)
        assert all(0 <= value <= length + 1e-9 for length, value in enumerate(found))
        if before is not None:
            assert found == pytest.approx(before, abs=0.4)
        before = found
    assert accepted_by_length(seen, 0.2) == accepted_by_length(seen, 1)
    assert accepted_by_length(seen, 99) == accepted_by_length(seen, 8)


def test_by_hand():
    """Two of four drafts of three tokens whole, one after a token, one at once: eleven tokens, of which drafts of one
    token take two each: 2 + 2 + 1 + 1, and the first two begin on either side of the last."""
    found = accepted_by_length([0.75, 0.5, 0.5], 3)
    assert found[3] == 1.75
    assert found[1] == pytest.approx(2.75 / (1 + 0.5) - 1)
    assert accepted_by_length([0.5], 1) == [0.0, 0.5]
    assert accepted_by_length([1.0, 1.0], 2) == [0.0, 1.0, 2.0]
    assert accepted_by_length([0.0, 0.0], 2) == [0.0, 0.0, 0.0]


def test_an_estimate_knows_how_long_its_drafts_were(walks):
    """Whatever was drafted, it promises what drafts of each length get, and with the years nothing overflows."""
    for counted in (3, 8):
        estimate = AcceptanceEstimate(8, memory=20_000)
        rng = random.Random(0)
        outcomes, times = zip(*walks[counted].items(), strict=True)
        for accepted in rng.choices(outcomes, times, k=600_000 if counted == 3 else 60_000):
            estimate.observe(counted, accepted)
        assert estimate.promises()[1] == pytest.approx(mean(walks[1]), rel=0.03)
        assert estimate.promises()[counted] == pytest.approx(mean(walks[counted]), rel=0.03)


def test_a_measured_prior_was_counted_in_drafts_of_its_length(walks):
    prior = survival(walks[8], 8)
    assert AcceptanceEstimate(8, prior).promises()[1] == pytest.approx(mean(walks[1]), rel=0.02)


def test_the_window_settles_where_shorter_drafts_pay_though_long_ones_make_them_look_bad(walks):
    """At a cost per token at which the first positions of long drafts would have it draft seven tokens, not five."""
    guessed = text(200_000, seed=1)

    def cost(batch, verified, drafted):
        return 1.0 + PRICE * drafted

    rates = {length: (1 + mean(walks[length])) / cost(1, length, length) for length in LENGTHS}
    best = max(rates, key=rates.get)
    misled = [0.0, *itertools.accumulate(survival(walks[8], 8))]
    assert best < max(LENGTHS, key=lambda length: (1 + misled[length]) / cost(1, length, length))

    class Profile:
        def step_seconds(self, batch, num_draft_tokens, context=None):
            return cost(batch, num_draft_tokens, num_draft_tokens)

    window = DraftWindow(LENGTHS, AcceptanceEstimate(8, survival(walks[8], 8)), StepCost(Profile()))
    chosen, at = Counter(), 0
    while at + 8 < len(guessed):
        length = window.choose(1)
        chosen[length] += 1
        accepted = next((i for i in range(length) if not guessed[at + i]), length)
        window.observe_draft(length, accepted)
        window.observe_step(cost(1, length, length), 1, length)
        at += accepted + 1
    earned = len(guessed) / sum(cost(1, length, length) * times for length, times in chosen.items())
    assert earned > 0.99 * rates[best]
