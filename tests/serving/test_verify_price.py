"""The price of a token in verification, against step times of a known law."""

from __future__ import annotations

import random

import pytest

from vllm_ppow.step_cells import CELL_MEMORY
from vllm_ppow.step_cost import IDENTIFIED
from vllm_ppow.verify_price import VerifyPrice

OVERHEAD, PRICE = 20e-3, 1.5e-3


def seconds(num_tokens: int) -> float:
    return OVERHEAD + PRICE * num_tokens


def test_nothing_is_known_before_two_lengths_were_seen_a_few_times():
    price = VerifyPrice()
    for _ in range(10):
        price.observe(4, 4, seconds(4))
    for _ in range(IDENTIFIED - 1):
        price.observe(4, 20, seconds(20))
    assert price.seconds_per_token(4) is None
    price.observe(4, 20, seconds(20))
    assert price.seconds_per_token(4) == pytest.approx(PRICE)


@pytest.mark.parametrize("batch", [1, 5, 24])
def test_slope_under_noise(batch):
    draw, price = random.Random(batch), VerifyPrice()
    for _ in range(600):
        tokens = batch + draw.randint(0, 8 * batch)
        price.observe(batch, tokens, seconds(tokens) * draw.lognormvariate(0.0, 0.1))
    assert price.seconds_per_token(batch) == pytest.approx(PRICE, rel=0.15)


def test_one_slow_step_of_a_length_does_not_count():
    price = VerifyPrice()
    for tokens in (1, 5):
        for _ in range(5):
            price.observe(1, tokens, seconds(tokens))
    price.observe(1, 9, 3.0)
    assert price.seconds_per_token(1) == pytest.approx(PRICE)


@pytest.mark.parametrize(("longer", "expected"), [(19e-3, 0.0), (200e-3, (20e-3 + 200e-3) / (1 + 2))])
def test_between_nothing_and_the_average(longer, expected):
    """A step that is faster with more tokens is noise, and so is one whose overhead would be negative."""
    price = VerifyPrice()
    for _ in range(IDENTIFIED):
        price.observe(1, 1, 20e-3)
        price.observe(1, 2, longer)
    assert price.seconds_per_token(1) == pytest.approx(expected, rel=1e-3)


def test_the_nearest_octave_known_stands_in():
    price = VerifyPrice()
    for batch, slope in ((1, 1e-3), (16, 3e-3)):
        for tokens in (batch, 3 * batch):
            for _ in range(IDENTIFIED):
                price.observe(batch, tokens, OVERHEAD + slope * tokens)
    assert price.seconds_per_token(2) == pytest.approx(1e-3)
    assert price.seconds_per_token(64) == pytest.approx(3e-3)


def test_prices_seen_long_ago_stand_until_others_are_known():
    """Millions of steps later the weight of a cell is zero in floating point."""
    price = VerifyPrice()
    for tokens in (1, 5):
        for _ in range(5):
            price.observe(1, tokens, seconds(tokens))
    price.observations += 6_000_000
    for _ in range(5):
        price.observe(1, 9, 2 * seconds(9))
    assert price.seconds_per_token(1) == pytest.approx(PRICE)
    for _ in range(CELL_MEMORY):
        price.observe(1, 1, 2 * seconds(1))
    assert price.seconds_per_token(1) == pytest.approx(2 * PRICE)


def test_a_prior_stands_from_the_start():
    assert VerifyPrice(lambda batch: 2e-3 / batch).seconds_per_token(4) == 0.5e-3


def test_steps_of_one_length_leave_the_prior_as_it_is():
    price = VerifyPrice(lambda _: 2 * PRICE)
    for _ in range(50):
        price.observe(4, 8, seconds(8))
    assert price.seconds_per_token(4) == pytest.approx(2 * PRICE)


@pytest.mark.parametrize("wrong", [0.5, 2.0])
def test_a_wrong_prior_gives_way_to_what_is_seen(wrong):
    draw, price = random.Random(0), VerifyPrice(lambda _: wrong * PRICE)
    for _ in range(600):
        tokens = 8 + draw.randint(0, 64)
        price.observe(8, tokens, seconds(tokens) * draw.lognormvariate(0.0, 0.1))
    assert price.seconds_per_token(8) == pytest.approx(PRICE, rel=0.15)


def test_a_few_noisy_steps_move_a_prior_little():
    """Alone they would give a slope that is off by far."""
    alone, price = VerifyPrice(), VerifyPrice(lambda _: PRICE)
    for tokens, factor in ((16, 1.2), (18, 0.9)):
        for _ in range(IDENTIFIED):
            alone.observe(16, tokens, factor * seconds(tokens))
            price.observe(16, tokens, factor * seconds(tokens))
    assert alone.seconds_per_token(16) == 0.0
    assert price.seconds_per_token(16) == pytest.approx(PRICE, rel=0.1)


def test_what_one_octave_tells_of_a_prior_holds_for_others():
    price = VerifyPrice(lambda batch: PRICE / batch)
    draw = random.Random(0)
    for _ in range(600):
        tokens = 8 + draw.randint(0, 64)
        price.observe(8, tokens, OVERHEAD + 2 * PRICE / 8 * tokens)
    factor = price.seconds_per_token(8) / (PRICE / 8)
    assert factor > 1.3
    assert price.seconds_per_token(32) == pytest.approx(factor * PRICE / 32)
