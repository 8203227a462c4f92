"""A study does each of its runs once, whoever does them, however often it stops; its intervals say what they should."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ppow_train.cli import run
from ppow_train.errors import UserError
from ppow_train.study.costs import equal_time_steps, read_costs, write_costs
from ppow_train.study.intervals import SeedSpread
from ppow_train.study.plan import Cell, Plan, read_plan
from ppow_train.study.results import Measured, Results, RunKey
from ppow_train.study.run import Study
from ppow_train.study.schedule import best_rate, runs, start_key
from ppow_train.study.table import origins, tables

REPO = Path(__file__).parents[2]


def cell(name: str = "here", **values: Any) -> Cell:
    return Cell(
        **{"name": name, "drafter": "d", "prompts": "p", "held_out": "h", "temperature": 1.0, **values}
    )


def plan(**values: Any) -> Plan:
    fixed: dict[str, Any] = {
        "target": "t",
        "cells": (cell(), cell("there", tuned_like="here")),
        "arms": {"one": {"objective": "cst:tv"}, "other": {"objective": "exact", "learning_rates": [0.1]}},
        "reference": "one",
        "seeds": (0, 1),
        "learning_rates": (0.1, 0.2),
        "tuning_prompts": 2,
        "steps": (5,),
        "options": {},
        "max_new_tokens": 12,
        "max_tokens": 8,
    }
    return Plan(**{**fixed, **values})


def measured(accepted: list[float], drafts: float = 10.0) -> Measured:
    return Measured([drafts] * len(accepted), accepted, 1.0)


# ---------------------------------------------------------------- plan


# A plan but for its cells.
WHOLE = (
    "target: t\narms: {{one: {{}}}}\nreference: one\nseeds: [0]\nlearning_rates: [0.001]\ntuning_prompts: 1\n"
    "steps: [1]\noptions: {{}}\nmax_new_tokens: 8\nmax_tokens: 8\ncells: {}\n"
)


@pytest.mark.parametrize("name", ["study.yaml", "study-continuations.yaml"])
def test_the_plans_of_the_repository_are_some(name):
    kept = read_plan(REPO / "examples" / "benchmarks" / name)
    assert kept.reference in kept.arms
    assert len(kept.seeds) >= 5
    assert {each.temperature for each in kept.cells} == {0.0, 1.0}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("cells: 1", r"is not a plan of a study \(it lacks target, arms, reference, seeds, learning_rates"),
        (
            "- a",
            r"is not a plan of a study \(it must be a mapping of names to values, got list\): see examples/",
        ),
        ("", r"\(it is empty\)"),
        ("cells: [", "is not a plan of a study"),
        ("2020-13-45", r"\(it must be a mapping of names to values, got str\)"),
        ("cells: []\nseeds: []\nspeed: 1", r"\(it has the unknown key 'speed'\)"),
        (WHOLE.format("1"), r"\(cells must be a list, got int\)"),
        (WHOLE.format("[a]"), r"\(cell 1 must be a mapping of names to values, got str\)"),
        (WHOLE.format("[{name: a, prompts: p}]"), r"\(cell 1 lacks drafter, held_out, temperature\)"),
        (WHOLE.format("[{name: a, speed: 1}]"), r"\(cell 1 has the unknown key 'speed'\)"),
    ],
)
def test_what_is_no_plan_is_refused(tmp_path, text, says):
    (tmp_path / "plan.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=says):
        read_plan(tmp_path / "plan.yaml")


def test_names_in_a_plan_must_fit(tmp_path):
    with pytest.raises(UserError, match="The plan's steps are empty"):
        plan(steps=())
    with pytest.raises(UserError, match="arm 'one' of the plan has the unknown key 'speed'"):
        Study(plan(arms={"one": {"speed": 1}}), Results(tmp_path))
    with pytest.raises(UserError, match="two cells of one name"):
        plan(cells=(cell(), cell()))
    with pytest.raises(UserError, match="tuned like 'nowhere', which is no cell"):
        plan(cells=(cell(tuned_like="nowhere"),))
    with pytest.raises(UserError, match="names the arm 'third', known are one, other"):
        plan(reference="third")
    with pytest.raises(UserError, match="other may not set serving_temperature, seed: cells give"):
        plan(arms={"one": {}, "other": {"seed": 1, "serving_temperature": 0.0}})
    with pytest.raises(UserError, match="options may not set max_steps"):
        plan(options={"max_steps": 3})


# ---------------------------------------------------------------- schedule


def test_rates_are_chosen_where_they_were_tuned():
    study = plan()
    wanted = list(runs(study, {}, {}))
    tuning = [key for key in wanted if key is not None and key.phase == "tune"]
    assert {(key.arm, key.learning_rate) for key in tuning} == {("one", 0.1), ("one", 0.2)}, (
        "other has one rate"
    )
    assert {key.cell for key in tuning} == {"here"}
    assert wanted.count(None) == 2 * 2, "nothing is reported before its rate is known"
    assert best_rate(study, {}, study.cells[1], "other") == 0.1
    done = {key: measured([2.0 if key.learning_rate == 0.1 else 3.0]) for key in tuning}
    assert best_rate(study, done, study.cells[1], "one") == 0.2
    diverged = {key: dataclasses.replace(one, accepted=[math.nan]) for key, one in done.items()}
    assert best_rate(study, done | dict(list(diverged.items())[:1]), study.cells[1], "one") == 0.2
    reported = [key for key in runs(study, done, {}) if key is not None and key.phase == "report" and key.arm]
    assert len(reported) == len(set(reported)) == 8
    assert {key.learning_rate for key in reported if key.arm == "one"} == {0.2}


def test_a_cell_may_have_rates_of_its_own():
    """Where the drafter is at home already, what suits a new domain undoes what it knows."""
    study = plan(cells=(cell(), cell("home", learning_rates=(0.01, 0.02)), cell("near", tuned_like="home")))
    assert [study.rates_of("one", each) for each in study.cells] == [(0.1, 0.2), (0.01, 0.02), (0.01, 0.02)]
    assert [study.rates_of("other", each) for each in study.cells] == [(0.1,), (0.01, 0.02), (0.01, 0.02)]
    tuned = [
        (key.cell, key.arm, key.learning_rate) for key in runs(study, {}, {}) if key and key.phase == "tune"
    ]
    assert tuned == [
        *(("here", "one", rate) for rate in (0.1, 0.2)),
        *(("home", arm, rate) for arm in ("one", "other") for rate in (0.01, 0.02)),
    ]  # fmt: skip


def test_an_expensive_arm_runs_once_more_for_what_the_reference_affords():
    costs = {"d": {"other": [2.4, 2.5, 9.0], "one": [1.04, 0.97, 1.01]}}
    assert equal_time_steps(costs, "d", "other", 5) == 2
    assert equal_time_steps(costs, "d", "one", 5) == 5
    assert equal_time_steps(costs, "d", "third", 5) is None
    study = plan(seeds=(0,))
    done = {key: measured([1.0]) for key in runs(study, {}, {}) if key is not None and key.phase == "tune"}
    reported = [key for key in runs(study, done, costs) if key is not None and key.phase == "report"]
    assert sorted(key.steps for key in reported if key.arm == "other" and key.cell == "here") == [2, 5]
    assert [key.steps for key in reported if key.arm == "one" and key.cell == "here"] == [5]


# ---------------------------------------------------------------- results on disk


def test_results_survive_a_kill_in_the_middle_of_a_line(tmp_path):
    results = Results(tmp_path)
    one, other = (RunKey("report", "here", "one", seed, 5, 0.1) for seed in (0, 1))
    results.add(one, measured([1.0]))
    with results.file.open("a") as stream:
        stream.write('{"run": {"phase": "rep')
    assert list(results.read()) == [one]
    results.add(other, measured([2.0]))
    assert list(Results(tmp_path).read()) == [one, other]


def test_runs_say_what_made_them_and_old_ones_that_they_do_not(tmp_path):
    results = Results(tmp_path)
    assert origins(results.made_with()) == ""
    old = {"run": {**dataclasses.asdict(RunKey("report", "here", "one", 0, 5, 0.1))}}
    old["measured"] = dataclasses.asdict(measured([1.0]))
    results.file.write_text(json.dumps(old) + "\n", encoding="utf-8")
    assert origins(results.made_with()) == "", "tables from before stay as they are"
    for seed in (1, 2):
        results.add(RunKey("report", "here", "one", seed, 5, 0.1), measured([1.0]))
    assert len(results.read()) == 3
    made, unknown = origins(results.made_with()).strip().splitlines()[-2:]
    assert made.startswith("- 2: vllm-ppow ")
    assert f"torch {torch.__version__}" in made
    assert unknown == "- 1: versions not recorded"


def test_a_run_is_claimed_by_one_process_until_it_ends(tmp_path):
    key = RunKey("report", "here", "one", 0, 5, 0.1)
    code = (
        "import sys, pathlib; from ppow_train.study.results import Results, RunKey\n"
        "with Results(pathlib.Path(sys.argv[1])).claim(RunKey('report', 'here', 'one', 0, 5, 0.1)) as mine:\n"
        "    print(mine)"
    )

    def elsewhere() -> str:
        return subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
        ).stdout.strip()

    with Results(tmp_path).claim(key) as mine:
        assert mine
        assert elsewhere() == "False"
    assert elsewhere() == "True"


# ---------------------------------------------------------------- tables


def test_where_too_few_arms_have_several_seeds_nothing_is_bold_and_the_table_says_so():
    assert SeedSpread.pooled([[1.0], []]) is None
    assert SeedSpread.pooled([[1.0, 2.0], [5.0, 7.0], [9.0]]).degrees == 2
    assert SeedSpread.pooled([[1.0, 2.0, 3.0], [5.0, 7.0], [9.0]]) == SeedSpread((4 / 3) ** 0.5, 3)
    study = plan(cells=(cell(),), seeds=(0,))
    done = {start_key("report", study.cells[0]): measured([5.0, 6.0] * 10)}
    for arm, value in (("one", 6.0), ("other", 7.0)):
        for rate in study.rates_of(arm, study.cells[0]):
            done[RunKey("tune", "here", arm, 100, 5, rate)] = measured([1.0 - rate])
        done[RunKey("report", "here", arm, 0, 5, 0.1)] = measured([value, value + 1] * 10)
    text = tables(study, done, {})
    assert "| `other` | +18.2 (" in text
    assert ") † | 1 |" in text
    assert "**" not in text
    assert text.endswith(
        "† One seed, and too few arms beside it have several: an interval of prompts alone.\n"
    )


def test_a_held_out_file_of_other_prompts_than_were_measured_is_refused():
    study = plan(cells=(cell(),))
    done = {start_key("report", study.cells[0]): measured([5.0, 6.0] * 10)}
    assert "| supervised start |" in tables(study, done, {}, {"h": ["a", "b"] * 10})
    with pytest.raises(UserError, match="h has 19 prompts, results of the cell 'here' are of 20"):
        tables(study, done, {}, {"h": ["a"] * 19})


def test_the_table_says_what_is_clear_of_zero():
    study = plan(cells=(cell(),), seeds=(0, 1, 2))
    done = {start_key("report", study.cells[0]): measured([5.0, 6.0] * 10)}
    for arm, value in (("one", 6.0), ("other", 7.0)):
        for rate in study.rates_of(arm, study.cells[0]):
            done[RunKey("tune", "here", arm, 100, 5, rate)] = measured([1.0 - rate])
        for seed in study.seeds:
            done[RunKey("report", "here", arm, seed, 5, 0.1)] = measured([value, value + 1] * 10)
    text = tables(study, done, {}).partition("### here")[2]
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| `") or "start |" in line]
    assert [line[0] for line in lines] == ["| `other`", "| `one`", "| supervised start"]
    assert lines[0][5].startswith("**+** +18.")
    assert lines[0][6] == "not timed |"
    assert lines[1][5:] == ["–", "– |"]


def test_a_longer_run_has_a_table_once_an_arm_has_run():
    study = plan(cells=(cell(),), seeds=(0,), steps=(5, 9))
    done = {start_key("report", study.cells[0]): measured([5.0, 6.0] * 10)}
    assert "### here, 5 updates" in tables(study, done, {})
    assert "9 updates" not in tables(study, done, {})
    done[RunKey("report", "here", "other", 0, 9, 0.1)] = measured([7.0, 8.0] * 10)
    assert "### here, 9 updates" in tables(study, done, {})


def test_the_overview_has_a_column_for_every_cell_and_is_sorted():
    study = plan(cells=(cell(), dataclasses.replace(cell(), name="there")), seeds=(0, 1))
    done = {}
    for name, worth in (("here", {"one": 6.0, "other": 7.0}), ("there", {"one": 6.0})):
        place = next(each for each in study.cells if each.name == name)
        done[start_key("report", place)] = measured([5.0, 6.0] * 10)
        for arm, value in worth.items():
            for rate in study.rates_of(arm, place):
                done[RunKey("tune", name, arm, 100, 5, rate)] = measured([1.0 - rate])
            for seed in study.seeds:
                done[RunKey("report", name, arm, seed, 5, 0.1)] = measured([value, value + 1] * 10)
    lines = tables(study, done, {}).splitlines()
    assert lines[0] == "### Over `one`, points of gain, 5 updates"
    assert lines[2] == "| arm | here | there | seeds |"
    assert lines[4].startswith("| `other` | **+18.")
    assert lines[4].endswith("** | – | 2, – |")
    assert lines[5].startswith("| `one` | gain +18.")
    assert lines[5].endswith("| 2, 2 |")
    assert lines[7] == "Accepted per draft at the start: 0.550, 0.550."


# ---------------------------------------------------------------- the whole thing


def test_prompts_that_are_reported_are_not_trained_on(small_study, tmp_path, capsys):
    with (tmp_path / "train.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"prompt": "many so"}\n')
    assert run(["study", str(small_study), "--output", str(tmp_path / "out")]) == 1
    assert "1 prompts of" in capsys.readouterr().err


def test_a_study_goes_on_where_it_stopped_and_ends_in_a_table(small_study, tmp_path, capsys):
    whole = Study(read_plan(small_study), Results(tmp_path / "whole")).finish().read()
    costs = read_costs(tmp_path / "whole")
    assert {len(ratios) for of in costs.values() for ratios in of.values()} == {3}
    assert all(of.keys() == {"ppow"} for of in costs.values())
    assert 2 + 2 * 2 <= len(whole) <= 2 + 2 * 3  # starts, reported; ppow for fewer updates too
    stopped = Results(tmp_path / "stopped")
    write_costs(tmp_path / "stopped", costs)
    for key in list(whole)[:5]:
        stopped.add(key, dataclasses.replace(whole[key], seconds=1e6))  # a mark
    assert run(["study", str(small_study), "--output", str(tmp_path / "stopped"), "--cell", "causal_lm"]) == 0
    assert len(stopped.read()) < len(whole)
    assert run(["study", str(small_study), "--output", str(tmp_path / "stopped")]) == 0
    output = capsys.readouterr().out
    again = stopped.read()
    assert again.keys() == whole.keys()
    assert [key for key, one in again.items() if one.seconds == 1e6] == list(whole)[:5], "none was done again"
    assert len(stopped.file.read_text(encoding="utf-8").splitlines()) == len(whole)
    for key, value in whole.items():
        assert again[key].accepted == pytest.approx(value.accepted, abs=1e-3), key
    for name in ("eagle3, 2 updates", "causal_lm, 2 updates", "| `ppow` |"):
        assert name in output
    assert run(["study", str(small_study), "--output", str(tmp_path / "stopped"), "--cell", "nowhere"]) == 2
    assert (tmp_path / "stopped" / "table.md").read_text(encoding="utf-8").strip() in output
