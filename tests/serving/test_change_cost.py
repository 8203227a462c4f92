"""What a change of draft length costs is found where it shows, and noise is not taken for it."""

from __future__ import annotations

import random

import pytest

from vllm_ppow.change_cost import HALF_LIFE, LEAST, ChangeCost


def observed(pause: float, shows: int, steps: int = 600, every: int = 20, usual: float = 0.1) -> ChangeCost:
    """Steps that change every so often, and whose pause shows so many steps after the change."""
    rng, cost = random.Random(0), ChangeCost()
    for step in range(steps):
        paused = pause if step % every == shows % every else 0.0
        cost.observe(usual + rng.gauss(0.0, 0.1) + paused, changed=step % every == 0)
    return cost


@pytest.mark.parametrize("shows", [-1, 0, 1])
def test_a_pause_is_found_at_the_change_and_beside_it(shows):
    assert observed(10.0, shows).steps == pytest.approx(10.0, rel=0.15)


def test_what_shows_elsewhere_is_not_the_changes_doing():
    assert observed(10.0, 7).steps == 0.0
    assert observed(0.0, 0).steps == 0.0


def test_noise_and_a_few_small_excesses_are_nothing():
    rng, cost = random.Random(1), ChangeCost()
    for step in range(3000):
        pause = 4.0 if rng.random() < 0.02 else 0.0
        cost.observe(rng.gauss(0.0, 0.1) + pause, changed=step % 24 == 0)
        assert cost.steps < 2 * LEAST


@pytest.mark.parametrize("seed", range(8))
def test_the_machines_own_pauses_do_not_count(seed):
    """A tenth of all steps is stopped for as long as sixty steps take: a mean would hold changes for dear."""
    rng, cost = random.Random(seed), ChangeCost()
    for step in range(3000):
        stopped = 60.0 if rng.random() < 0.1 else 0.0
        cost.observe(rng.gauss(0.0, 0.1) + stopped, changed=step % 24 == 0)
        assert cost.steps == 0.0


def test_one_long_pause_at_a_change_is_nothing():
    cost = ChangeCost()
    cost.observe(1e6, changed=True)
    assert cost.steps == 0.0


def test_pauses_of_the_machine_do_not_hide_what_changes_cost():
    rng, cost = random.Random(3), ChangeCost()
    for step in range(3000):
        stopped = 60.0 if rng.random() < 0.05 else 0.0
        changed = step % 24 == 0
        cost.observe(rng.gauss(0.0, 0.1) + stopped + 5.0 * changed, changed)
    assert cost.steps == pytest.approx(5.0, abs=0.5)


def test_it_is_forgotten():
    cost = observed(10.0, 0)
    for _ in range(10 * HALF_LIFE):
        cost.observe(0.1, changed=False)
    assert cost.steps == 0.0


def test_changes_in_a_row_are_counted_each():
    cost = ChangeCost()
    for _ in range(60):
        cost.observe(3.0, changed=True)
    assert cost.steps == pytest.approx(3.0, rel=0.1)
