"""The judge of gpu_wheels.py; the wheels themselves are downloads of hundreds of MB and are asked by hand."""

from __future__ import annotations

import gpu_wheels
import pytest

# What the wheels of these versions answered (vLLM -> independent, heeds, cases), as `gpu_wheels.py` printed it.
SEEN = {
    "0.26.0": (
        False,
        False,
        {
            "sampled drafts": "V1, full graphs, fixed",
            "greedy drafts": "V2, full graphs, fixed",
            "sampled drafts, V2": "refused",
            "greedy drafts, V1": "V1, full graphs, fixed",
            "V1, adaptive": "V1, other graphs, adaptive",
            "fixed": "V2, full graphs, fixed",
            "eager": "V1, no graphs, adaptive",
        },
    ),
    "0.33.0": (
        True,
        True,
        {
            "sampled drafts": "V2, full graphs, adaptive",
            "greedy drafts": "V2, full graphs, adaptive",
            "sampled drafts, V2": "V2, full graphs, adaptive",
            "greedy drafts, V1": "V1, full graphs, fixed",
            "V1, adaptive": "V1, other graphs, adaptive",
            "fixed": "V2, full graphs, fixed",
            "eager": "V1, no graphs, adaptive",
        },
    ),
}


@pytest.mark.parametrize("version", SEEN)
def test_what_the_wheels_answered_is_what_is_promised(version):
    independent, heeds, cases = SEEN[version]
    assert gpu_wheels.expected(independent, heeds) == cases


def answer(independent: bool, heeds: bool, **cases: str) -> dict:
    found = gpu_wheels.expected(independent, heeds) | cases
    return {"version": "0.0", "independent": independent, "heeds": heeds, "cases": found}


def test_sampled_drafts_on_a_runner_that_changes_the_output_are_wrong(capsys):
    assert gpu_wheels._tell(answer(False, False, **{"sampled drafts": "V2, full graphs, fixed"})) == 1
    assert "WRONG, should be: V1, full graphs, fixed" in capsys.readouterr().out


def test_a_window_that_costs_full_graphs_is_wrong():
    assert gpu_wheels._tell(answer(True, True, **{"greedy drafts, V1": "V1, other graphs, adaptive"})) == 1


def test_answers_as_promised_are_not_wrong(capsys):
    assert gpu_wheels._tell(answer(True, True)) == 0
    assert "WRONG" not in capsys.readouterr().out


def test_without_a_wheel_it_says_what_to_name(capsys):
    assert gpu_wheels.main([]) == 2
    assert "Name one wheel" in capsys.readouterr().err
