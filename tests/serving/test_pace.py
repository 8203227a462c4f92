"""The machine's pace: found again after a rest within a few steps, not moved by pauses, apart for each octave."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from vllm_ppow.pace import Pace

NOISE = 0.1


def steps(pace: Pace, octave: int, slower: float, times: int, seed: int = 0, pauses: float = 0.0) -> None:
    """Steps whose length relative to what is remembered is known."""
    draw = random.Random(seed)
    for _ in range(times):
        pace.advance(octave)
        clock = math.log(slower) + draw.gauss(0, NOISE) + (math.log(5) if draw.random() < pauses else 0.0)
        pace.correct(octave, clock - pace.of(octave), NOISE)


@pytest.mark.parametrize("slower", [0.8, 1.0, 1.3])
def test_found_within_a_few_steps_after_a_rest(slower):
    pace = Pace()
    assert pace.of(3) == 0.0
    steps(pace, 3, 1.0, 200)
    steps(pace, 5, 1.0, 20)
    steps(pace, 3, slower, 12, seed=1)
    assert pace.of(3) == pytest.approx(math.log(slower), abs=0.08)


def test_a_load_between_two_octaves_does_not_move_it():
    """No step of these is a rest of the machine: a jump at each would make the pace follow noise."""
    pace = Pace()
    steps(pace, 3, 1.0, 100)
    steps(pace, 4, 1.0, 100)
    seen = []
    for number in range(200):
        steps(pace, 3 + number % 2, 1.0, 1, seed=number)
        seen.append(abs(pace.of(3 + number % 2)))
    assert statistics.mean(seen) < 0.03, "0.06 with a jump at every change"


def test_octaves_do_not_share_it():
    pace = Pace()
    steps(pace, 1, 1.4, 50)
    assert pace.of(1) == pytest.approx(math.log(1.4), abs=0.05)
    assert pace.of(2) == 0.0


def test_pauses_are_no_pace():
    pace = Pace()
    steps(pace, 2, 1.0, 400, pauses=0.02)
    assert abs(pace.of(2)) < 0.05


def test_within_a_stretch_it_hardly_moves():
    """What a length's own times tell must not be taken for the machine's: they would never be corrected."""
    pace = Pace()
    steps(pace, 2, 1.0, 100)
    before = pace.of(2)
    steps(pace, 2, 1.1, 20, seed=3)
    assert abs(pace.of(2) - before) < 0.05
