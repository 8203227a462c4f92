"""Intervals of a study cover what chance makes of it: seeds, prompts and the files that these come from."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from test_study import measured

from ppow_train.prompts import read_groups
from ppow_train.study.intervals import Resampled, SeedSpread, difference, gain


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
@pytest.mark.parametrize(("of_seeds", "of_prompts"), [(0.3, 0.1), (0.3, 1.0)])
def test_an_interval_covers_what_chance_makes_of_it(num_seeds, of_seeds, of_prompts):
    """Of studies of four arms without any difference one in twenty should find one, however few the seeds are."""
    random = np.random.default_rng(0)
    found = 0
    for _ in range(120):
        prompts = random.normal(size=40)
        arms = [
            [
                measured(list(10 + prompts + of_prompts * own + of_seeds * random.normal()))
                for _ in range(num_seeds)
            ]
            for own in random.normal(size=(4, 40))
        ]
        start = Resampled([measured(list(10 + prompts))], num_seeds)
        one, other, *_ = made = [Resampled(arm, num_seeds) for arm in arms]
        spread = SeedSpread.pooled(
            list((arm.by_seed - other.by_seed) / start.mean) for arm in made if arm is not other
        )
        found += difference(one, other, start, spread).is_clear_of_zero
    assert 0 < found <= 12


def test_a_real_difference_is_found_and_what_is_common_drops_out():
    random = np.random.default_rng(1)
    prompts = random.normal(size=40) * 3  # far larger than the difference
    one = [measured(list(10 + prompts)) for _ in range(5)]
    other = [measured(list(10.2 + prompts + random.normal(size=40) * 0.1)) for _ in range(5)]
    start = Resampled([measured(list(5 + prompts / 2))], 5)
    over = difference(Resampled(other, 5), Resampled(one, 5), start)
    assert over.is_clear_of_zero
    assert over.mean == pytest.approx(0.04, abs=0.01)
    assert gain(Resampled(one, 5), start).mean == pytest.approx(1.0)


def test_prompts_of_one_file_are_drawn_together():
    """Of studies as above, but that arms differ by file: draws of prompts find far more than one in twenty."""
    random = np.random.default_rng(3)
    file_of = np.arange(120) % 10
    found = {"files": 0, "prompts": 0}
    for _ in range(120):
        prompts = random.normal(size=120) + random.normal(size=10)[file_of]
        own = random.normal(size=(4, 120)) + random.normal(size=(4, 10))[:, file_of]
        arms = [
            [measured(list(10 + prompts + 0.3 * (each + 0.1 * random.normal()))) for _ in range(3)]
            for each in own
        ]
        for drawn, groups in {"files": [f"{file}.py" for file in file_of], "prompts": None}.items():
            start = Resampled([measured(list(10 + prompts))], 3, groups)
            one, other, *_ = made = [Resampled(arm, 3, groups) for arm in arms]
            spread = SeedSpread.pooled(
                list((arm.by_seed - other.by_seed) / start.mean) for arm in made if arm is not other
            )
            found[drawn] += difference(one, other, start, spread).is_clear_of_zero
    assert 0 < found["files"] <= 12
    assert found["prompts"] > 24


def test_prompts_are_of_the_file_that_their_lines_name(tmp_path):
    def groups(*lines: dict[str, Any]) -> list[str]:
        (tmp_path / "held_out.jsonl").write_text("\n\n".join(map(json.dumps, lines)), encoding="utf-8")
        return read_groups(tmp_path / "held_out.jsonl")

    def numbered(names: list[str]) -> list[int]:
        return [names.index(name) for name in names]

    a, b = ({"prompt": "text", "file": file} for file in ("a.py", "b.py"))
    assert numbered(groups(a, b, a)) == [0, 1, 0]
    assert numbered(groups(a, {"prompt": ["two", "in one"]}, {"prompt": "x", "file": 3}, a)) == [
        0,
        1,
        2,
        3,
        0,
    ]
    assert numbered(groups({"prompt": ["two", "in one"], "file": "a.py"}, b)) == [0, 0, 2]
    assert numbered(groups(a, a)) == [0, 1], "of one file alone"


def test_one_seed_is_given_the_spread_of_the_arms_that_have_several():
    """Of arms that differ in nothing but their seeds, intervals of prompts alone would find most better or worse."""
    random = np.random.default_rng(2)
    found = {"prompts": 0, "seeds too": 0}
    for _ in range(100):
        prompts = random.normal(size=40)

        def run(prompts=prompts):
            return measured(list(10 + prompts + random.normal() * 0.3 + random.normal(size=40) * 0.2))

        reference, start = run(), Resampled([measured(list(10 + prompts))], 1)
        beside = [[sum(run().accepted) / sum(start_accepted(prompts)) for _ in range(5)] for _ in range(3)]
        spread = SeedSpread.pooled(beside)
        assert spread.degrees == 12
        twice = SeedSpread(spread.sd * 2**0.5, spread.degrees)  # a difference has two runs' seeds in it
        arms = Resampled([run()], 1), Resampled([reference], 1), start
        low_high = difference(*arms), difference(*arms, twice)
        assert low_high[0].of_prompts_alone
        assert not low_high[0].is_clear_of_zero
        found["prompts"] += low_high[0].low > 0 or low_high[0].high < 0
        found["seeds too"] += low_high[1].is_clear_of_zero
    assert found["prompts"] > 50
    assert found["seeds too"] <= 10


def start_accepted(prompts):
    return list(10 + prompts)
