"""The adapter that is kept is the one that accepted most on held-out prompts, whatever came after it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_training_runs import config_for, open_pair
from training_pair import K

from ppow_train.adapter import held_out_facts
from ppow_train.card import CARD
from ppow_train.config import PPOWConfig
from ppow_train.data import collate
from ppow_train.drafters import load_drafter
from ppow_train.errors import UserError
from ppow_train.generation import load_tokenizer
from ppow_train.report import CURVE
from ppow_train.rollout import WindowRunner
from ppow_train.selection import ACCEPTED, STATE, BestOnHeldOut, Judge, SelectionState, split_held_out
from ppow_train.trainer import PPOWTrainer
from ppow_train.training import train_adapter
from ppow_train.types import Trajectories
from ppow_train.walk import ExpectedWalk
from ppow_train.window_lines import read_window_log
from vllm_ppow.artifact import read_adapter

PROMPTS = [[i, 7, 3 * i % 50] for i in range(1, 41)]


def config_of(tmp_path: Path, **options: Any) -> PPOWConfig:
    return config_for(tmp_path, **{"max_steps": 10, "eval_steps": 2, **options})


@pytest.fixture
def wrecked(monkeypatch):
    """A schedule that climbs instead of descending after six updates: what was learned is lost."""

    def create_scheduler(self, num_training_steps, optimizer=None):
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer, lambda step: 1.0 if step < 6 else -3.0
        )
        return self.lr_scheduler

    monkeypatch.setattr(PPOWTrainer, "create_scheduler", create_scheduler)


def continued(directories, prompts: list[list[int]], seed: int) -> Trajectories:
    """Prompts of three tokens with the target's own training_rows at temperature 1."""
    pair = open_pair(directories, "causal_lm")
    ids, new = torch.tensor(prompts), K + 12
    torch.manual_seed(seed)
    whole = pair.target.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=True,
        top_k=0,
    )
    return collate(prompts, whole[:, 3:].tolist())


@pytest.fixture(scope="module")
def training_rows(directories):
    return continued(directories, [[i, 9, 4] for i in range(60, 72)], seed=1)


@pytest.fixture(scope="module")
def held_out(directories):
    """Enough prompts for both halves to have some."""
    return continued(directories, PROMPTS, seed=0)


def judged(directories, adapter, prompts) -> float:
    """What the adapter on disk accepts."""
    pair = open_pair(directories, "causal_lm")
    drafter = load_drafter(directories.drafter["causal_lm"])
    drafter.model = PeftModel.from_pretrained(drafter.model, adapter).merge_and_unload()
    return Judge(WindowRunner(pair.target, drafter, prompts, K, 1.0), greedy_drafts=False)().mean_accepted


# ---------------------------------------------------------------- the halves


def test_the_halves_are_disjoint_and_a_prompt_never_changes_sides():
    rows = collate(PROMPTS, [[1] * 8] * len(PROMPTS))
    halves = [{tuple(ids[:3]) for ids in half.input_ids.tolist()} for half in split_held_out(rows)]
    assert halves[0].isdisjoint(halves[1])
    assert sum(map(len, halves)) == len(PROMPTS)
    assert min(map(len, halves)) > 10
    fewer = collate(
        PROMPTS[::-2], [[2] * 9] * (len(PROMPTS) // 2)
    )  # others are missing, continued differently
    for half, before in zip(split_held_out(fewer), halves, strict=True):
        assert {tuple(ids[:3]) for ids in half.input_ids.tolist()} <= before


def test_a_half_must_not_be_empty():
    with pytest.raises(UserError, match=r"1 held-out prompts do not divide .* give more of them"):
        split_held_out(collate([[1, 2]], [[3] * 9]))


# ---------------------------------------------------------------- best, early, honest


def test_the_best_adapter_is_written_not_the_last(
    wrecked, directories, training_rows, held_out, tmp_path, progress
):
    selecting, reporting = split_held_out(held_out)
    written = {}
    for keep_best in (True, False):
        result = train_adapter(
            open_pair(directories, "causal_lm"),
            training_rows,
            config_of(tmp_path, keep_best=keep_best),
            tmp_path / f"adapter-{keep_best}",
            held_out=held_out,
            progress=progress,
        )
        assert result.selection is not None
        assert result.after is not None
        assert result.report is not None
        curve = dict(result.selection.curve)
        assert list(curve) == [0, 2, 4, 6, 8, 10]
        assert result.report.input_ids.equal(reporting.input_ids)
        written[keep_best] = judged(directories, result.adapter.directory, selecting)
        assert judged(directories, result.adapter.directory, reporting) == pytest.approx(
            result.after.mean_accepted, abs=1e-5
        )
    assert curve[10] < max(curve.values()) - 0.02, "the run was not wrecked"
    assert result.selection.best_updates < 10
    assert written[True] == pytest.approx(max(curve.values()), abs=1e-5)
    assert written[False] == pytest.approx(curve[10], abs=1e-5)
    facts = read_adapter(tmp_path / "adapter-True").config.training
    assert facts["selection"]["written_after_updates"] == result.selection.best_updates
    assert facts["selection"]["prompts"] == len(selecting)
    assert facts["report"]["prompts"] == len(reporting)
    assert facts["gain_above_zero"] is True
    assert (tmp_path / "adapter-True" / CURVE).read_bytes().startswith(b"\x89PNG")
    assert any(entry.get(ACCEPTED) == pytest.approx(curve[4]) and entry["step"] == 4 for entry in result.log)


def test_training_stops_when_nothing_better_comes(
    wrecked, directories, training_rows, held_out, tmp_path, progress
):
    result = train_adapter(
        open_pair(directories, "causal_lm"),
        training_rows,
        config_of(tmp_path, early_stop_patience=2, max_steps=16),
        tmp_path / "adapter",
        held_out=held_out,
        progress=progress,
    )
    assert result.selection is not None
    values = [value for _, value in result.selection.curve]
    assert values.index(max(values)) == len(values) - 3
    facts = result.adapter.config.training
    assert facts["selection"]["stopped_early"] is True
    assert facts["updates"] == result.selection.curve[-1][0] < 16


def test_a_run_that_gains_nothing_says_so(
    directories, training_rows, held_out, tmp_path, progress, monkeypatch
):
    compute_loss = PPOWTrainer._compute_loss
    monkeypatch.setattr(PPOWTrainer, "_compute_loss", lambda *args: -compute_loss(*args))  # unlearns
    config = config_of(tmp_path, max_steps=4, eval_steps=4)
    result = train_adapter(
        open_pair(directories, "causal_lm"),
        training_rows,
        config,
        tmp_path / "adapter",
        held_out=held_out,
        progress=progress,
    )
    assert result.selection is not None
    assert not result.selection.beats_untrained
    assert result.adapter.config.training["gain_above_zero"] is False


def test_what_counts_as_a_gain():
    state = SelectionState([(0, 1.0), (2, 0.9), (4, 0.95), (6, 0.95)], "")
    assert (state.best_updates, state.beats_untrained, state.evaluations_without_gain) == (4, False, 3)
    state.curve.append((8, 1.1))
    assert (state.best_updates, state.beats_untrained, state.evaluations_without_gain) == (8, True, 0)


def walk(accepted: float) -> ExpectedWalk:
    """One draft of one token."""
    return ExpectedWalk(torch.ones(1), torch.tensor([[accepted]]))


def chooser(tmp_path: Path, curve: list[tuple[int, float]], **options: Any) -> BestOnHeldOut:
    """After a run with these evaluations."""
    judge = SimpleNamespace(digest="", runner=SimpleNamespace(trajectories=range(60)))
    best = BestOnHeldOut(judge, config_of(tmp_path, **options), lambda name, value: None)
    best.state.curve = curve
    return best


def test_a_gain_must_be_seen_on_the_prompts_that_did_not_choose(tmp_path):
    """The best of several evaluations is above the untrained drafter by chance alone."""
    best = chooser(tmp_path, [(0, 1.0), (2, 1.1)])
    assert held_out_facts(walk(0.5), walk(0.6), best)["gain_above_zero"] is True
    assert held_out_facts(walk(0.5), walk(0.4), best)["gain_above_zero"] is False
    best.state.curve[1] = (2, 0.9)
    assert held_out_facts(walk(0.5), walk(0.6), best)["gain_above_zero"] is False
    assert held_out_facts(walk(0.5), walk(0.4), None)["gain_above_zero"] is False


def test_a_gain_is_that_of_the_adapter_that_is_written(tmp_path):
    """Which was above the untrained drafter on the way only, and is the last one where that one is wanted."""
    curve = [(0, 1.0), (2, 1.2), (4, 0.9)]
    for keep_best, updates in ((True, 2), (False, 4)):
        facts = held_out_facts(walk(1.0), walk(1.001), chooser(tmp_path, curve, keep_best=keep_best))
        assert facts["gain_above_zero"] is keep_best, "what is written decides"
        assert facts["selection"]["keep_best"] is keep_best
        assert facts["selection"]["written_after_updates"] == updates
    last = chooser(tmp_path, [(0, 1.0), (2, 1.2), (4, 1.1)], keep_best=False)
    assert held_out_facts(walk(1.0), walk(1.1), last)["gain_above_zero"] is True
    last.diverged_at = 5  # then the best is written in any case
    assert last.facts()["keep_best"] is True


# ---------------------------------------------------------------- diverging


def diverging_from(monkeypatch, update: int) -> None:
    """Every update from this one on has a loss that is no number."""
    own = PPOWTrainer._compute_loss

    def spoilt(self, model, inputs):
        return own(self, model, inputs) * (float("nan") if self.state.global_step >= update - 1 else 1.0)

    monkeypatch.setattr(PPOWTrainer, "_compute_loss", spoilt)


@pytest.mark.parametrize("keep_best", [True, False])
def test_the_best_adapter_outlives_a_run_that_diverges(
    keep_best, directories, training_rows, held_out, tmp_path, progress, monkeypatch
):
    """Also where the last one was wanted, which is none; and nothing is left that would have to be deleted."""
    diverging_from(monkeypatch, 6)
    selecting, _ = split_held_out(held_out)
    config = config_of(tmp_path, keep_best=keep_best, save_steps=1)
    arguments = (open_pair(directories, "causal_lm"), training_rows, config, tmp_path / "adapter")
    result = train_adapter(*arguments, held_out=held_out, progress=progress)
    assert result.selection is not None
    curve = dict(result.selection.curve)
    assert list(curve) == [0, 2, 4]
    best = judged(directories, result.adapter.directory, selecting)
    assert best == pytest.approx(max(curve.values()), abs=1e-5)
    assert best > curve[0]
    facts = read_adapter(tmp_path / "adapter").config.training
    assert facts["updates"] == facts["selection"]["diverged_at_update"] == 6
    assert facts["selection"]["written_after_updates"] == result.selection.best_updates
    assert facts["selection"]["stopped_early"] is False
    assert "(update 6 diverged and ended the run)" in (tmp_path / "adapter" / CARD).read_text("utf-8")
    assert read_window_log(tmp_path / "adapter")[-1]["step"] == 6
    assert not Path(config.output_dir).exists()


@pytest.mark.parametrize("update", [2, 3], ids=["before any evaluation", "after one that lost"])
def test_nothing_is_written_of_a_run_that_diverges_and_had_gained_nothing(
    update, directories, training_rows, held_out, tmp_path, progress, monkeypatch
):
    diverging_from(monkeypatch, update)
    walk = ExpectedWalk(torch.ones(1), torch.ones(1, K))
    monkeypatch.setattr(Judge, "__call__", lambda self: walk)  # what is equal is no gain
    arguments = (open_pair(directories, "causal_lm"), training_rows, config_of(tmp_path))
    with pytest.raises(UserError, match=rf"diverged at update {update}: .*no adapter was written\."):
        train_adapter(*arguments, tmp_path / "adapter", held_out=held_out, progress=progress)
    assert not (tmp_path / "adapter").exists()


def test_the_update_after_a_run_that_had_stopped_may_diverge(tmp_path):
    """Transformers makes it where such a run is resumed; it is none of the run's."""
    best = BestOnHeldOut(SimpleNamespace(digest=""), config_of(tmp_path), lambda name, value: None)
    best.state.curve = [(0, 1.0), (2, 0.9)]
    best._at_stop = {"a": torch.ones(1)}
    assert best.outlives(3)
    assert (best.diverged_at, best.counted(3)) == (None, 2)


def test_an_evaluation_that_is_no_number_is_the_worst():
    state = SelectionState([(0, 1.0), (2, math.nan), (4, 1.1), (6, math.nan)], "")
    assert (state.best_updates, state.beats_untrained, state.evaluations_without_gain) == (4, True, 1)
    state.curve[2:] = []
    assert (state.best_updates, state.beats_untrained) == (2, False)
    assert not SelectionState([(0, 1.0)], "").beats_untrained


# ---------------------------------------------------------------- resuming


def trained(
    directories, training_rows, held_out, config: PPOWConfig, checkpoint: str | None
) -> BestOnHeldOut:
    pair = open_pair(directories, "causal_lm")
    runners = [WindowRunner(pair.target, pair.drafter, rows, K, 1.0) for rows in (training_rows, held_out)]
    trainer = PPOWTrainer(runners[0], config, load_tokenizer(directories.target))
    best = BestOnHeldOut(Judge(runners[1], greedy_drafts=False), config, trainer.log_next)
    trainer.add_callback(best)
    trainer.train(resume_from_checkpoint=checkpoint)
    return best


def test_a_resumed_run_selects_as_an_unbroken_one(directories, training_rows, held_out, tmp_path):
    config = config_of(tmp_path, save_strategy="steps", save_steps=4, max_steps=8)
    unbroken = trained(directories, training_rows, held_out, config, None).state
    checkpoint = Path(config.output_dir) / "checkpoint-4"
    assert [updates for updates, _ in SelectionState.load(checkpoint).curve] == [0, 2, 4]
    resumed = trained(directories, training_rows, held_out, config, str(checkpoint)).state
    assert resumed.curve == unbroken.curve
    assert resumed.best.keys() == unbroken.best.keys()
    assert len(resumed.best) > 0
    assert all(resumed.best[name].equal(unbroken.best[name]) for name in unbroken.best)
    assert not list(checkpoint.glob("*.part"))

    other = held_out.select(torch.arange(5))
    with pytest.raises(UserError, match="other held-out prompts"):
        trained(directories, training_rows, other, config, str(checkpoint))


def test_a_run_that_had_stopped_early_does_not_go_on(wrecked, directories, training_rows, held_out, tmp_path):
    config = config_of(
        tmp_path,
        early_stop_patience=1,
        save_strategy="steps",
        save_steps=2,
        max_steps=16,
        windows_per_step=16,
    )
    first = trained(directories, training_rows, held_out, config, None)
    stopped = first.state
    last = stopped.curve[-1][0]
    assert last < 16
    assert first.counted(last) == last
    checkpoint = Path(config.output_dir) / f"checkpoint-{last}"
    again = trained(directories, training_rows, held_out, config, str(checkpoint))
    resumed = again.state
    assert again.counted(last + 1) == last, (
        "the update that transformers makes all the same is not one of the run's"
    )
    assert resumed.curve == stopped.curve
    assert all(resumed.best[name].equal(stopped.best[name]) for name in stopped.best)


def test_state_comes_back_from_disk(tmp_path):
    state = SelectionState([(0, 0.25), (5, 1 / 3)], "abc", {"a.b": torch.randn(2, 3)})
    state.save(tmp_path)
    loaded = SelectionState.load(tmp_path)
    assert dataclasses.replace(loaded, best={}) == dataclasses.replace(state, best={})
    assert loaded.best["a.b"].equal(state.best["a.b"])
    assert load_file(tmp_path / STATE).keys() == {"a.b"}


# ---------------------------------------------------------------- what is refused


def test_selection_without_prompts(directories, training_rows, tmp_path, progress):
    with pytest.raises(UserError, match=r"eval_steps .* --held-out"):
        train_adapter(
            open_pair(directories, "causal_lm"),
            training_rows,
            config_of(tmp_path),
            tmp_path / "adapter",
            progress=progress,
        )


@pytest.mark.parametrize(
    ("options", "name"),
    [({"eval_steps": 0}, "eval_steps"), ({"early_stop_patience": 0, "eval_steps": 1}, "early_stop_patience"),
     ({"early_stop_patience": 2}, "eval_steps")],
)  # fmt: skip
def test_options_that_make_no_sense(options, name, tmp_path):
    with pytest.raises(UserError, match=name):
        config_for(tmp_path, **options)
