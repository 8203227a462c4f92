"""The drafter's own probabilities, calibrated against what the target accepts."""

from __future__ import annotations

import random

import pytest

from vllm_ppow.calibration import OPTIMISM, Calibration


def test_a_flat_softmax_is_learned_to_be_right():
    """Raw top-1 probabilities of 0.15 that are right 93 times of 100."""
    calibration, rng = Calibration(4), random.Random(0)
    assert calibration.acceptance(0, 0.15) == OPTIMISM
    for _ in range(2000):
        calibration.observe(0, 0.15, rng.random() < 0.93)
    assert calibration.acceptance(0, 0.15) == pytest.approx(0.93, abs=0.04)
    assert calibration.acceptance(2, 0.15) == pytest.approx(0.93, abs=0.06), (
        "positions start from all together"
    )


def test_overconfidence_is_learned_per_position():
    calibration, rng = Calibration(2), random.Random(0)
    for _ in range(3000):
        calibration.observe(0, 0.97, rng.random() < 0.9)
        calibration.observe(1, 0.97, rng.random() < 0.3)
    assert calibration.acceptance(0, 0.97) == pytest.approx(0.9, abs=0.05)
    assert calibration.acceptance(1, 0.97) == pytest.approx(0.3, abs=0.08)


def test_acceptance_grows_with_the_probability():
    calibration, rng = Calibration(1), random.Random(1)
    for _ in range(500):
        calibration.observe(0, rng.random(), rng.random() < 0.5)
    values = [calibration.acceptance(0, c / 100) for c in range(101)]
    assert values == sorted(values)


def test_what_changed_is_followed():
    calibration = Calibration(1)
    for accepted in (True, False):
        for _ in range(2000):
            calibration.observe(0, 0.85, accepted)
    assert calibration.acceptance(0, 0.85) < 0.15
