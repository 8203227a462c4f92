"""Results of a study stand for the plan that they were made with; memory is bounded as in `ppow train`."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from test_study import measured
from training_pair import sliding_copy

from ppow_train.cli import run
from ppow_train.errors import UserError
from ppow_train.options import PPOWOptions
from ppow_train.study import run as study_run
from ppow_train.study.facts import FACTS
from ppow_train.study.plan import read_plan
from ppow_train.study.results import Results, RunKey
from ppow_train.study.run import CellBench, Study
from ppow_train.target_cache import DiskCache, MemoryCache
from ppow_train.training import restored

REPO = Path(__file__).parents[2]


def refused(study: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], *more: str) -> str:
    """What the command says of a changed plan; nothing may run."""
    values = json.loads(study.read_text(encoding="utf-8"))
    change(values)
    (tmp_path / "changed.yaml").write_text(json.dumps(values), encoding="utf-8")
    command = ["study", str(tmp_path / "changed.yaml"), "--output", str(tmp_path / "out"), *more]
    stream = io.StringIO()
    with contextlib.redirect_stderr(stream):
        code = run(command)
    return stream.getvalue() if code else ""


@pytest.fixture
def started_study(small_study, tmp_path, monkeypatch) -> Path:
    """A plan under which one arm has a result in one cell; whatever runs next is refused."""
    study = Study(read_plan(small_study), Results(tmp_path / "out"))
    study.results.add(RunKey("report", "eagle3", "cst:tv", 0, 2, 0.003), measured([1.0]))
    monkeypatch.setattr(Study, "finish", lambda self: self.results)
    return small_study


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda plan: plan["options"].update(trajectories_per_step=1),
            "arm 'cst:tv' with trajectories_per_step 2 (now 1)",
        ),
        (
            lambda plan: plan["arms"]["cst:tv"].update(max_grad_norm=2.0),
            "arm 'cst:tv' with max_grad_norm 1.0 (now 2.0)",
        ),
        (lambda plan: plan["arms"]["cst:tv"].update(objective="exact"), "objective cst:tv (now exact)"),
        (
            lambda plan: plan["cells"][0].update(temperature=0.5),
            "cell 'eagle3' with temperature 1.0 (now 0.5)",
        ),
        (lambda plan: plan["options"].update(lora_rank=2), "lora_rank"),
        (lambda plan: plan["options"].update(lora_alpha=2), "lora_alpha"),
        (lambda plan: plan.update(max_tokens=9), "cell 'eagle3' with max_tokens 8 (now 9)"),
        (lambda plan: plan.update(tuning_prompts=1), "tuning_prompts 2 (now 1)"),
        (lambda plan: plan["cells"][0].update(prompts=plan["cells"][0]["prompts"] + "2"), "prompts"),
    ],
)
def test_results_of_another_plan_are_not_used(started_study, tmp_path, change, says):
    (tmp_path / "train.jsonl2").write_text('{"prompt": "others"}\n' * 3, encoding="utf-8")
    for more in ([], ["--table-only"]):
        message = refused(started_study, tmp_path, change, *more)
        assert says in message
        assert "give the same plan, another name in it, or another --output" in message


def test_another_drafter_is_not_the_same_cell(started_study, tmp_path, directories):
    change = partial(_set_drafter, drafter=str(directories.drafter["reduced"]))
    assert "cell 'eagle3' with drafter" in refused(started_study, tmp_path, change)


def _set_drafter(plan: dict[str, Any], drafter: str) -> None:
    plan["cells"][0]["drafter"] = drafter


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: plan.update(seeds=[0, 1], steps=[2, 3], learning_rates=[0.003, 0.001]),
        lambda plan: plan["options"].update(lora_alpha=2 * PPOWOptions.lora_rank),  # what it is anyway
        lambda plan: plan["arms"].update(more={"objective": "exact"}),
        lambda plan: plan["arms"]["ppow"].update(proximity_weight=0.1),  # has no results yet
        lambda plan: plan["cells"][1].update(temperature=0.7),
        lambda plan: plan["options"].update(target_cache="none", windows_per_forward=2, position_decay=0.9),
        lambda plan: plan["cells"].pop(),
    ],
)
def test_what_has_no_results_may_change(started_study, tmp_path, change):
    assert refused(started_study, tmp_path, change) == ""


def test_results_without_a_record_go_on_and_have_one_from_then_on(started_study, tmp_path):
    (tmp_path / "out" / FACTS).unlink()
    said: list[str] = []
    for _ in range(2):
        Study(read_plan(started_study), Results(tmp_path / "out"), say=said.append)
    assert len(said) == 1
    assert "had no record" in said[0]
    assert "written down for eagle3; cst:tv." in said[0]
    assert "max_tokens" in refused(started_study, tmp_path, lambda plan: plan.update(max_tokens=9))


STUDIES = ("", "-capacity", "-continuations", "-long", "-objectives", "-output-layer", "-rank", "-rank-short")


@pytest.mark.parametrize("name", [f"study{which}" for which in STUDIES])
def test_studies_of_before_are_tabled(name, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(REPO)
    [kept] = (REPO / "examples" / "benchmarks").glob(f"{name}-2026-11-2[4-8]")
    directory = shutil.copytree(kept, tmp_path / "kept")
    assert run(["study", f"examples/benchmarks/{name}.yaml", "--output", str(directory), "--table-only"]) == 0
    assert capsys.readouterr().out.strip() == (kept / "table.md").read_text(encoding="utf-8").strip()
    assert not (directory / FACTS).exists(), "a table changes nothing"


@pytest.mark.parametrize(
    ("kind", "kept"),
    [("none", type(None)), ("memory", MemoryCache), ("disk", DiskCache), ("auto", MemoryCache)],
)
def test_the_targets_states_are_kept_where_the_plan_says(kind, kept, small_study, tmp_path):
    study = read_plan(small_study)
    study.arms["cst:tv"]["target_cache"] = kind
    bench = CellBench(study, study.cells[0], tmp_path / "trajectories")
    with restored(bench.pair.drafter.model):
        assert type(bench.trainer(bench.config("cst:tv", tmp_path / "state")).runner.cache) is kept


def test_an_update_of_a_study_is_divided_by_what_fits(small_study, tmp_path, monkeypatch):
    study = read_plan(small_study)
    monkeypatch.setattr("ppow_train.study.run.choose_windows_per_forward", lambda *args: 2)
    bench = CellBench(study, study.cells[0], tmp_path / "trajectories")
    with restored(bench.pair.drafter.model):
        args = bench.trainer(bench.config("cst:tv", tmp_path / "state")).args
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (2, 2)


def test_layers_that_a_drafter_lacks_are_told_before_anything_is_generated(
    small_study, tmp_path, monkeypatch
):
    monkeypatch.setattr(study_run, "load_or_generate", lambda *_, **__: pytest.fail("generated"))
    study = read_plan(small_study)
    study.arms["cst:tv"]["lora_targets"] = ["qkv_proj"]
    with pytest.raises(UserError, match="lora_targets must name linear layers"):
        CellBench(study, study.cells[0], tmp_path / "trajectories")


def test_drafting_beyond_sliding_attention_is_told_before_anything_is_generated(
    small_study, directories, tmp_path, monkeypatch
):
    monkeypatch.setattr(study_run, "load_or_generate", lambda *_, **__: pytest.fail("generated"))
    target = sliding_copy(directories.target, tmp_path / "sliding", span=12)
    study = dataclasses.replace(read_plan(small_study), target=str(target))
    with pytest.raises(UserError, match="attend to 12 tokens at a time"):
        CellBench(study, study.cells[0], tmp_path / "trajectories")
    del study.arms["ppow"]
    CellBench(study, study.cells[0], tmp_path / "trajectories")
