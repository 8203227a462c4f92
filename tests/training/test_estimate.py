"""What `--estimate` says of time: updates and evaluations as often as the run makes them, and what is not in it."""

from __future__ import annotations

import math

import pytest
from test_memory import make_config
from test_selection import held_out, training_rows  # noqa: F401  (fixtures)

from ppow_train import estimate
from ppow_train.estimate import NOT_COUNTED, RunEstimate, estimate_run
from ppow_train.pair import load_pair
from ppow_train.selection import Judge
from ppow_train.training import train_adapter

OPTIONS = [
    {"max_steps": 3},
    {"max_steps": 4, "eval_steps": 2},
    {"max_steps": 5, "eval_steps": 2},
    {"max_steps": 2, "eval_steps": 3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: str(list(options.values())))
def test_evaluations_are_counted_as_the_run_makes_them(
    options,
    directories,
    training_rows,  # noqa: F811
    held_out,  # noqa: F811
    tmp_path,
    progress,
    monkeypatch,
):
    calls: list[int] = []
    own = Judge.__call__
    monkeypatch.setattr(
        Judge, "__call__", lambda self: calls.append(len(self.runner.trajectories)) or own(self)
    )
    # The first call of each takes a minute, every further one a second.
    asked: set[Judge] = set()
    monkeypatch.setattr(estimate, "_timed", lambda judge: 1.0 if judge in asked else asked.add(judge) or 60.0)
    pair = load_pair(str(directories.target), str(directories.drafter["causal_lm"]))
    config = make_config(tmp_path / "state", "cst:tv", 4, 8, **options)
    estimated = estimate_run(pair, training_rows, config, tmp_path / "scratch", held_out, progress=progress)
    assert not calls
    train_adapter(pair, training_rows, config, tmp_path / "adapter", held_out=held_out, progress=progress)
    assert estimated.evaluations == len(calls)
    judges = 2 if "eval_steps" in options else 1
    assert estimated.evaluation_seconds == 60 * judges + len(calls) - judges
    updating = estimated.seconds_per_update * options["max_steps"]
    assert estimated.seconds == pytest.approx(updating + estimated.evaluation_seconds)


def test_evaluations_are_timed(directories, training_rows, held_out, tmp_path, progress, monkeypatch):  # noqa: F811
    """Each half twice: what is kept of the target's states is computed by the first call only."""
    sizes: list[int] = []
    own = Judge.__call__
    monkeypatch.setattr(
        Judge, "__call__", lambda self: sizes.append(len(self.runner.trajectories)) or own(self)
    )
    pair = load_pair(str(directories.target), str(directories.drafter["causal_lm"]))
    config = make_config(tmp_path / "state", "cst:tv", 4, 8, max_steps=20, eval_steps=2)
    estimated = estimate_run(pair, training_rows, config, tmp_path / "scratch", held_out, progress=progress)
    assert sizes[0] == sizes[1]
    assert sizes[2] == sizes[3]
    assert sizes[0] + sizes[2] == len(held_out)
    assert estimated.evaluations == 11 + 2
    assert 0 < estimated.evaluation_seconds < math.inf


def test_what_is_told():
    alone = RunEstimate(8, 2**20, 2**30, seconds_per_update=6.0, updates=100)
    assert "6.00 s per update, about 10.0 minutes for 100. Not counted: " in str(alone)
    judged = RunEstimate(8, 2**20, 2**30, 6.0, 100, evaluation_seconds=300.0, evaluations=13)
    assert "10.0 minutes for 100, 5.0 for 13 evaluations on held-out prompts, 15.0 in all. Not" in str(judged)
    for missing in ("continuing the prompts", "parity with vLLM"):
        assert missing in str(alone)
    assert judged.as_json()["seconds"] == 900.0
    assert judged.as_json()["not_counted"] == list(NOT_COUNTED)
    stopping = RunEstimate(8, 2**20, 2**30, 6.0, 100, 300.0, 13, may_stop_early=True)
    assert "15.0 in all, or less where it stops early." in str(stopping)
