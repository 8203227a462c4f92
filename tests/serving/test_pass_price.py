"""The price of a drafter's pass: from the profile, from the clock, and between batch sizes."""

from __future__ import annotations

import pytest

from vllm_ppow.octave_prices import OctavePrices
from vllm_ppow.pass_price import PassPrice
from vllm_ppow.step_cost import IDENTIFIED

PASS = 1.5e-3


def profile(batch: int) -> float:
    return PASS * (1.0 + 0.1 * batch)


def test_without_a_profile_a_pass_costs_nothing_until_a_few_were_timed():
    price = PassPrice()
    for _ in range(IDENTIFIED - 1):
        price.observe(4, PASS)
    assert price.seconds(4) == 0.0
    price.observe(4, PASS)
    assert price.seconds(4) == PASS


def test_the_profiles_stands_until_a_few_were_timed():
    price = PassPrice(profile)
    assert price.seconds(4) == profile(4)
    for _ in range(IDENTIFIED):
        price.observe(4, 2 * PASS)
    assert price.seconds(4) == 2 * PASS


def test_pauses_do_not_count_and_a_change_is_followed():
    price = PassPrice()
    for i in range(100):
        price.observe(4, PASS if i % 5 else 1.0)
    assert price.seconds(4) == PASS
    for _ in range(40):
        price.observe(4, 3 * PASS)
    assert price.seconds(4) == 3 * PASS


def test_batch_sizes_do_not_mix():
    price = PassPrice()
    for _ in range(20):
        price.observe(1, PASS)
        price.observe(32, 4 * PASS)
    assert (price.seconds(1), price.seconds(32)) == (PASS, 4 * PASS)
    assert price.seconds(2) == PASS, "the nearest octave, the smaller of two"


def test_every_octave_follows_its_own_passes_however_they_alternate():
    price = PassPrice()
    for i in range(160):
        price.observe(32 if i % 16 == 15 else 1, PASS if i < 80 else 3 * PASS)
    assert price.seconds(1) == 3 * PASS


def test_another_octave_has_the_priors_shape_by_the_factor_that_was_learned():
    prices = OctavePrices(profile)
    prices.learn(4, 2 * profile(4))
    assert prices.at(3) == prices.at(4) == 2 * profile(4), "one octave"
    assert prices.at(16) == pytest.approx(2 * profile(16))
    assert OctavePrices().at(4) is None
    assert OctavePrices(lambda _: 0.0).at(4) == 0.0
