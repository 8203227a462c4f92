"""The judge of gpu_wheels.py; the wheels themselves are downloads of hundreds of MB and are asked by hand."""

from __future__ import annotations

import gpu_wheels
import pytest


def answer(independent: bool, heeds: bool, **cases: str) -> dict:
    found = gpu_wheels.expected(independent, heeds) | cases
    return {"version": "0.0", "independent": independent, "heeds": heeds, "cases": found}


@pytest.mark.parametrize(("independent", "heeds"), [(False, False), (True, False), (True, True)])
def test_what_is_promised_is_not_wrong(independent, heeds, capsys):
    assert gpu_wheels._tell(answer(independent, heeds)) == 0
    assert "WRONG" not in capsys.readouterr().out
    assert set(gpu_wheels.expected(independent, heeds)) == set(gpu_wheels.CASES)


def test_sampled_drafts_on_a_runner_that_changes_the_output_are_wrong(capsys):
    assert gpu_wheels._tell(answer(False, False, **{"sampled drafts": "V2, full graphs, fixed"})) == 1
    assert "WRONG, should be: V1, full graphs, fixed" in capsys.readouterr().out


def test_a_window_that_costs_full_graphs_is_wrong():
    assert gpu_wheels._tell(answer(True, True, **{"greedy drafts, V1": "V1, other graphs, adaptive"})) == 1


def test_without_a_wheel_it_says_what_to_name(capsys):
    assert gpu_wheels.main([]) == 2
    assert "Name one wheel" in capsys.readouterr().err
