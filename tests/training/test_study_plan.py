"""A plan says what a study does: options that it would not follow, and values that cannot be, are refused before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_study import plan

from ppow_train.cli import run
from ppow_train.errors import UserError
from ppow_train.study.facts import plan_facts
from ppow_train.study.plan import Plan, read_plan
from ppow_train.study.results import Results, RunKey
from ppow_train.study.run import CellBench, Study
from ppow_train.study.schedule import start_key

REPO = Path(__file__).parents[2]
OF_ALL_ARMS = {"num_speculative_tokens": 4, "target_dtype": "float32", "draft_sample_method": "greedy"}
NOT_DONE = {"eval_steps": 2, "early_stop_patience": 1, "keep_best": False}


def changed(study: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The plan with a change, in the same file."""
    values = json.loads(study.read_text(encoding="utf-8"))
    change(values)
    study.write_text(json.dumps(values), encoding="utf-8")
    return study


@pytest.mark.parametrize("file", sorted((REPO / "examples" / "benchmarks").glob("study*.yaml")))
def test_every_plan_of_the_repository_reads_and_has_its_options_on_record(file):
    kept = read_plan(file)
    for facts in plan_facts(kept)["arms"].values():
        assert facts.keys() >= OF_ALL_ARMS.keys() | NOT_DONE.keys()
        assert facts["num_speculative_tokens"] == kept.options["num_speculative_tokens"]


@pytest.mark.parametrize("method", ["probabilistic", "greedy"])
def test_the_start_is_measured_as_the_arms_are(method, small_study, tmp_path):
    study = read_plan(
        changed(small_study, lambda values: values["options"].update(draft_sample_method=method))
    )
    bench = CellBench(study, study.cells[0], tmp_path / "trajectories")
    start = bench.measure(start_key("report", bench.cell))
    unchanged = bench.measure(RunKey("report", bench.cell.name, "cst:tv", 0, 1, 1e-12))
    assert unchanged.accepted == pytest.approx(start.accepted, rel=1e-4)
    assert unchanged.drafts == pytest.approx(start.drafts, rel=1e-4)


@pytest.mark.parametrize(("name", "value"), OF_ALL_ARMS.items())
def test_what_all_arms_share_is_no_option_of_one(name, value):
    says = f"The plan's other may not set {name}: all arms share it, set it in the plan's options"
    with pytest.raises(UserError, match=says):
        plan(arms={"one": {}, "other": {name: value}})
    assert plan(options={name: value}).options_of("one")[name] == value


@pytest.mark.parametrize(("name", "value"), NOT_DONE.items())
def test_what_a_study_does_not_do_is_no_option(name, value):
    with pytest.raises(UserError, match=f"The plan's options may not set {name}: a study measures"):
        plan(options={name: value})
    with pytest.raises(UserError, match=f"The plan's one may not set {name}: a study measures"):
        plan(arms={"one": {name: value}, "options": {}})


def test_options_are_looked_at_where_an_arm_is_named_so():
    with pytest.raises(UserError, match="The plan's options may not set seed"):
        plan(arms={"one": {}, "options": {}}, options={"seed": 1})


def test_numbers_that_yaml_reads_as_text_are_numbers(small_study):
    def write_as_text(values: dict[str, Any]) -> None:
        values.update(learning_rates=["3e-3", 1], seeds=["7"], max_tokens="8", tuning_seed="5")
        values["options"]["position_decay"] = "0.9"
        values["arms"]["cst:tv"].update(learning_rates=["2e-3"], max_grad_norm="2.0", lora_rank="4")
        values["cells"][0].update(temperature="0.5", learning_rates=["1e-3"])

    study = read_plan(changed(small_study, write_as_text))
    assert (study.learning_rates, study.seeds, study.max_tokens) == ((0.003, 1), (7,), 8)
    assert study.tuning_seed == 5
    options = study.options_of("cst:tv")
    assert (options["position_decay"], options["max_grad_norm"], options["lora_rank"]) == (0.9, 2.0, 4)
    assert study.cells[0].temperature == 0.5
    assert [study.rates_of(arm, study.cells[0]) for arm in study.arms] == [(0.001,)] * 2
    assert study.arms["cst:tv"]["learning_rates"] == (0.002,)


def test_yaml_s_own_way_of_reading_numbers(small_study):
    text = small_study.read_text(encoding="utf-8").replace("[0.003]", "[3e-3]")
    assert "3e-3" in text
    small_study.write_text(text, encoding="utf-8")
    assert read_plan(small_study).learning_rates == (0.003,)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda plan: plan.update(seeds=3), "seeds must be a list, got 3: put it in brackets."),
        (lambda plan: plan.update(steps=5), "steps must be a list, got 5: put it in brackets."),
        (lambda plan: plan.update(steps=None), "steps must be a list, got None"),
        (lambda plan: plan.update(learning_rates="3e-3"), "learning_rates must be a list, got '3e-3'"),
        (
            lambda plan: plan.update(long_arms="ppow"),
            "long_arms must be a list, got 'ppow': put it in brackets.",
        ),
        (
            lambda plan: plan.update(learning_rates=["high"]),
            "each of learning_rates must be a number, got 'high'",
        ),
        (lambda plan: plan.update(learning_rates=[0.0]), "The plan's learning_rates must be > 0, got 0.0"),
        (lambda plan: plan.update(learning_rates=["nan"]), "The plan's learning_rates must be > 0, got nan"),
        (lambda plan: plan.update(seeds=[0.5]), "each of seeds must be a whole number, got 0.5"),
        (lambda plan: plan.update(seeds=[-1]), "The plan's seeds must be in 0..2^32 - 1, got -1"),
        (lambda plan: plan.update(tuning_seed=2**32), "The plan's tuning_seed must be in"),
        (lambda plan: plan.update(steps=[0]), "The plan's steps must be >= 1, got 0"),
        (lambda plan: plan.update(steps=[True]), "each of steps must be a whole number, got True"),
        (lambda plan: plan.update(max_tokens="many"), "max_tokens must be a whole number, got 'many'"),
        (lambda plan: plan.update(max_tokens=1), "The plan's max_tokens must be >= 2, got 1"),
        (lambda plan: plan.update(max_new_tokens=0), "The plan's max_new_tokens must be >= 1, got 0"),
        (lambda plan: plan.update(tuning_prompts=-1), "The plan's tuning_prompts must be >= 0, got -1"),
        (
            lambda plan: plan.update(tuning_prompts=0, learning_rates=[0.1, 0.2]),
            "The plan's tuning_prompts must be >= 1 where an arm has several learning_rates, got 0",
        ),
        (lambda plan: plan.update(target=5), "target must be text, got 5: put it in quotes"),
        (lambda plan: plan.update(options=None), "options must be a mapping of names to values, got None"),
        (lambda plan: plan.update(arms=["cst:tv"]), "arms must be a mapping of names to values"),
        (lambda plan: plan["arms"].update(ppow=None), "arm ppow must be a mapping of names to values"),
        (
            lambda plan: plan["cells"][0].update(temperature="warm"),
            "temperature must be a number, got 'warm'",
        ),
        (
            lambda plan: plan["cells"][0].update(temperature=-1),
            "Cell eagle3: temperature must be >= 0, got -1",
        ),
        (lambda plan: plan["cells"][0].update(learning_rates=0.1), "learning_rates must be a list, got 0.1"),
        (lambda plan: plan["cells"][0].update(learning_rates=[-1]), "Cell eagle3: learning_rates must be"),
        (
            lambda plan: plan["options"].update(position_decay="slow"),
            "options: position_decay must be a number, got 'slow'",
        ),
        (
            lambda plan: plan["arms"]["ppow"].update(lora_rank=2.5),
            "arm ppow: lora_rank must be a whole number, got 2.5",
        ),
        (
            lambda plan: plan["arms"]["ppow"].update(learning_rates=0.1),
            "arm ppow: learning_rates must be a list, got 0.1",
        ),
        (
            lambda plan: plan["arms"]["ppow"].update(learning_rates=[0]),
            "The plan's arm ppow: learning_rates must be > 0, got 0",
        ),
        (
            lambda plan: plan["arms"]["ppow"].update(position_decay=7),
            "Arm 'ppow' of the plan, at temperature 1: position_decay must be in (0, 1], got 7",
        ),
        (
            lambda plan: plan["options"].update(windows_per_step=5),
            "Arm 'cst:tv' of the plan, at temperature 1: windows_per_step must be a multiple of 2",
        ),
    ],
)
def test_values_that_cannot_be_are_refused_before_anything_is_loaded(
    change, says, small_study, tmp_path, capsys, monkeypatch
):
    def fail(*args: Any) -> None:
        raise AssertionError("loaded")

    for name in ("load_pair", "model_facts"):
        monkeypatch.setattr(f"ppow_train.study.run.{name}", fail)
    assert run(["study", str(changed(small_study, change)), "--output", str(tmp_path / "out")]) == 1
    assert says in capsys.readouterr().err


def test_an_arm_named_by_a_number_is_refused(small_study):
    text = small_study.read_text(encoding="utf-8").replace('"ppow":', "8:")
    small_study.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="an arm must be text, got 8: put it in quotes"):
        read_plan(small_study)


def test_a_study_is_told_which_arm_cannot_be(tmp_path):
    study: Plan = plan(arms={"one": {}, "other": {"objective": "faster"}})
    with pytest.raises(UserError, match=r"Arm 'other' of the plan, at temperature 1: .*objective"):
        Study(study, Results(tmp_path))


def test_a_table_of_nothing_is_refused_and_leaves_nothing(small_study, tmp_path, capsys):
    output = tmp_path / "deep" / "typo"
    assert run(["study", str(small_study), "--output", str(output), "--table-only"]) == 1
    assert f"There is no directory {output} to print a table of: give that of a study" in (
        capsys.readouterr().err
    )
    assert not output.parent.exists()
