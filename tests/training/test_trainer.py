"""PPOWTrainer: TRL's own unpacked forward as oracle, the target as KL anchor, group advantages, TRL's private seams."""

from __future__ import annotations

import contextlib
import inspect
import queue
from pathlib import Path
from typing import Any

import pytest
import torch
from training_pair import KINDS, Directories, K, load
from trl import GRPOTrainer
from trl.trainer import grpo_trainer
from unpacked import target_windows

from ppow_train.compat import TargetAnchor
from ppow_train.config import PPOWConfig
from ppow_train.credit import token_advantages
from ppow_train.generation import load_tokenizer
from ppow_train.rewards import proximity_reward
from ppow_train.rollout import WindowRunner
from ppow_train.trainer import PPOWTrainer, trajectory_rows
from ppow_train.types import Trajectories
from ppow_train.windowing import draw_starts
from vllm_ppow.speedup import speedup_reward

GROUP = 4


def make_config(tmp_path: Path, **options: Any) -> PPOWConfig:
    defaults = {
        "objective": "ppow",
        "num_speculative_tokens": K,
        "trajectories_per_step": 3,
        "windows_per_step": 3 * 2 * GROUP,
        "num_generations": GROUP,
        "max_steps": 2,
        "lora_rank": 4,
        "use_cpu": True,
        "output_dir": str(tmp_path / "out"),
    }
    return PPOWConfig(**{**defaults, **options})


def make_trainer(
    directories: Directories, trajectories: Trajectories, config: PPOWConfig, kind: str = "causal_lm"
) -> PPOWTrainer:
    pair = load(directories, kind)
    runner = WindowRunner(pair.target, pair.drafter, trajectories, K, config.training_temperature)
    trainer = PPOWTrainer(runner, config, load_tokenizer(directories.target))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:  # off its starting point, where A has no gradient
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # as the training loop sets it
    return trainer


def first_rows(trainer: PPOWTrainer) -> list[dict]:
    """The rows that TRL's sampler gives the first update."""
    order = list(trainer._get_train_sampler())[: trainer.args.windows_per_step]
    return [trainer.train_dataset[index] for index in order]


@pytest.fixture(scope="module")
def trained(directories, trajectories, tmp_path_factory):
    """A trainer of the causal LM drafter with its first scored batch."""
    trainer = make_trainer(
        directories, trajectories, make_config(tmp_path_factory.mktemp("trainer"), beta=0.1)
    )
    return trainer, trainer._generate_and_score_completions(first_rows(trainer))


def unpacked_logps(trainer: PPOWTrainer, batch: dict[str, torch.Tensor]) -> tuple[Any, Any, Any]:
    """TRL's own log-probabilities and entropies, on rows of real tokens: left-padded prefix and drafted window."""
    all_ids = trainer.runner.trajectories.input_ids
    prefixes = [all_ids[row, :start] for row, start in batch["prompt_ids"].tolist()]
    width = max(map(len, prefixes)) + K
    ids = torch.zeros(len(prefixes), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (prefix, window) in enumerate(zip(prefixes, batch["completion_ids"], strict=True)):
        ids[row, width - K - len(prefix) :] = torch.cat([prefix, window])
        mask[row, width - K - len(prefix) :] = 1
    return GRPOTrainer._get_per_token_logps_and_entropies(
        trainer, trainer.model, ids, mask, K, compute_entropy=True
    )


def with_advantages(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch with advantages that surely are not all zero."""
    values = torch.linspace(-1.5, 1.5, len(batch["prompt_ids"]))
    return {**batch, "advantages": values}


def test_packed_log_probabilities_are_those_of_trls_own_forward(trained):
    trainer, batch = trained
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    packed = trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), K)
    unpacked = unpacked_logps(trainer, batch)
    torch.testing.assert_close(packed[0], unpacked[0], atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(packed[1], unpacked[1], atol=2e-3, rtol=1e-3)
    assert unpacked[0].std() > 0.1


def test_loss_and_gradients_are_those_of_trls_own_forward(trained, monkeypatch):
    trainer, batch = trained
    batch = with_advantages(batch)
    weights = [p for p in trainer.model.parameters() if p.requires_grad]
    packed = trainer._compute_loss(trainer.model, batch)
    ours = torch.autograd.grad(packed, weights)
    monkeypatch.setattr(
        trainer, "_get_per_token_logps_and_entropies", lambda *_, **__: unpacked_logps(trainer, batch)
    )
    unpacked = trainer._compute_loss(trainer.model, batch)
    wanted = torch.autograd.grad(unpacked, weights)
    torch.testing.assert_close(packed, unpacked, atol=1e-4, rtol=1e-3)
    largest = max(gradient.abs().max().item() for gradient in wanted)
    assert largest > 1e-4
    for one, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=2e-3 * largest, rtol=0)


def test_the_kl_anchor_is_the_target(trained):
    trainer, batch = trained
    assert isinstance(trainer.ref_model, TargetAnchor)
    runner = trainer.runner
    for row in range(0, len(batch["prompt_ids"]), 5):
        (trajectory, start), window = batch["prompt_ids"][row].tolist(), batch["completion_ids"][row]
        one = runner.trajectories.select(torch.tensor([trajectory]))
        logits = target_windows(runner.target, one, torch.tensor([[start]]), window.view(1, 1, -1))[0, 0]
        wanted = (logits / runner.temperature).log_softmax(-1).gather(-1, window[:, None])[:, 0]
        torch.testing.assert_close(batch["ref_per_token_logps"][row], wanted, atol=2e-3, rtol=1e-3)
    drafter, _, _ = unpacked_logps(trainer, batch)
    assert (batch["ref_per_token_logps"] - drafter).abs().mean() > 0.5


def test_without_a_penalty_there_is_no_anchor(directories, trajectories, tmp_path):
    trainer = make_trainer(directories, trajectories, make_config(tmp_path, beta=0.0))
    assert trainer.ref_model is None
    assert "ref_per_token_logps" not in trainer._generate_and_score_completions(first_rows(trainer))


@pytest.mark.parametrize("kind", KINDS)
def test_advantages_are_standardised_within_the_group(kind, directories, trajectories, tmp_path):
    trainer = make_trainer(directories, trajectories, make_config(tmp_path, proximity_epsilon=12.0), kind)
    batch = trainer._generate_and_score_completions(first_rows(trainer))
    groups = batch["prompt_ids"].view(-1, GROUP, 2)
    assert (groups == groups[:, :1]).all(), "a group shares trajectory and start"
    rollout = trainer._rollout
    assert rollout is not None
    reward = torch.tensor(
        [speedup_reward(k, trainer.args.draft_cost_ratio) for k in rollout.num_accepted_tokens.tolist()]
    )
    reward = reward + proximity_reward(rollout.num_accepted_tokens, rollout.divergence, 12.0, 0.2)
    reward = reward.view(-1, GROUP)
    assert (reward.std(-1) > 0).any(), "no group differs: choose another ε"
    wanted = (reward - reward.mean(-1, keepdim=True)) / (reward.std(-1, keepdim=True) + 1e-4)
    torch.testing.assert_close(batch["advantages"], wanted.flatten(), atol=1e-4, rtol=1e-3)


def test_trls_loss_takes_an_advantage_per_token(directories, trajectories, tmp_path):
    """Its gradient is that of −Σ A_t log q over all N·K tokens, divided by N·K."""
    config = make_config(tmp_path, ppow_credit="acceptance", beta=0.0)
    trainer = make_trainer(directories, trajectories, config)
    batch = trainer._generate_and_score_completions(first_rows(trainer))
    advantages = token_advantages(trainer._rollout, trainer.args)
    assert advantages.shape == (24, K)
    assert (advantages != advantages[:, :1]).any()
    assert batch["advantages"].equal(advantages)
    weights = [p for p in trainer.model.parameters() if p.requires_grad]
    ours = torch.autograd.grad(trainer._compute_loss(trainer.model, batch), weights)
    logps, _ = trainer.runner.draft_logps(*batch["prompt_ids"].T, batch["completion_ids"])
    wanted = torch.autograd.grad(-(advantages * logps).mean(), weights)
    assert max(gradient.abs().max() for gradient in wanted) > 1e-5
    for one, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-3)


def test_objectives_on_target_paths_do_not_draft(directories, trajectories, tmp_path, monkeypatch):
    config = make_config(tmp_path, objective="exact", windows_per_step=6)
    trainer = make_trainer(directories, trajectories, config)
    monkeypatch.setattr(trainer.runner, "roll_out", lambda *_: pytest.fail("drafted"))
    batch = trainer._generate_and_score_completions(first_rows(trainer))
    assert sorted(batch["trajectory"].tolist()) == [0, 0, 1, 1, 2, 2]
    windows = trainer.runner.path_windows(batch["trajectory"], batch["start"])
    assert trainer._objective is not None
    wanted = trainer._objective(windows)
    torch.testing.assert_close(trainer._compute_loss(trainer.model, batch), wanted)
    assert trainer.ref_model is None


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize(
    ("objective", "trajectories_per_step", "windows"),
    [("ppow", 3, 24), ("exact", 3, 6), ("exact", 2, 6), ("exact", 4, 4), ("cst:tv", 3, 18)],
)
def test_every_update_gets_its_windows(
    objective, trajectories_per_step, windows, directories, trajectories, tmp_path
):
    """As many rows as promised, shared alike by the trajectories of the update, also where each has one window."""
    config = make_config(
        tmp_path,
        objective=objective,
        trajectories_per_step=trajectories_per_step,
        windows_per_step=windows,
        max_steps=3,
    )
    trainer = make_trainer(directories, trajectories, config)
    order = list(trainer._get_train_sampler())
    assert len(order) == 3 * windows
    for step in range(3):
        rows = [trainer.train_dataset[index] for index in order[step * windows : (step + 1) * windows]]
        batch = trainer._generate_and_score_completions(rows)
        column = batch["trajectory"] if "trajectory" in batch else batch["prompt_ids"][:, 0]
        starts = batch["start"] if "start" in batch else batch["prompt_ids"][:, 1]
        runs = column.view(trajectories_per_step, -1)
        assert (runs == runs[:, :1]).all(), "windows of a trajectory stand together"
        room = trajectories.num_starts(K)[column]
        offset = starts - trajectories.first_starts()[column]
        assert ((offset >= 0) & (offset < room)).all()


def test_trajectories_take_turns(tmp_path):
    config = make_config(
        tmp_path, objective="exact", trajectories_per_step=4, windows_per_step=8, max_steps=5
    )
    seen = [row[0] for row in trajectory_rows(10, config)["prompt"]]
    firsts = [seen[i] for i in range(0, len(seen), len(seen) // 20)]
    assert sorted(firsts[:10]) == list(range(10))
    assert sorted(firsts[10:]) == list(range(10))
    assert firsts[:10] != firsts[10:]


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ({}, 4),
        ({"uniform_share": 1.0}, None),
        ({"adaptive_windows": "false"}, None),
        ({"objective": "cst:tv"}, None),
        ({"objective": "cst:tv", "adaptive_windows": True}, 4),
    ],
)
def test_adaptive_windows_begin_after_their_share_of_the_run(
    options, first, directories, trajectories, tmp_path
):
    config = make_config(tmp_path, max_steps=8, adaptive_after=0.5, **options)
    trainer = make_trainer(directories, trajectories, config)
    for step in (0, 3, 4, 7):
        trainer.state.global_step = step
        trainer._generate_and_score_completions(first_rows(trainer))
    adaptive = [first is not None and step >= first for step in (0, 3, 4, 7)]
    assert trainer._metrics["train"]["windows/adaptive"] == adaptive
    assert ("windows/criticality_chosen" in trainer._metrics["train"]) == any(adaptive)


@pytest.mark.parametrize("step", [0, 7])
def test_draws_follow_from_seed_and_step_alone(step, directories, trajectories, tmp_path):
    """As published for ppow: fresh criticality of the update's trajectories, nothing else remembered."""
    trainer = make_trainer(directories, trajectories, make_config(tmp_path, max_steps=8))
    trainer.state.global_step = step
    ids = torch.tensor([2, 0, 1])
    starts = trainer._draw(ids.repeat_interleave(2)).view(3, 2)
    chosen = trajectories.select(ids)
    criticality = trainer.runner.criticality(ids) if step else None
    share = trainer.args.uniform_share
    offsets = draw_starts(chosen.num_starts(K), 2, trainer._generator(), criticality, share)
    assert starts.equal(chosen.first_starts()[:, None] + offsets)


@pytest.mark.parametrize("step", [0, 7])
def test_a_trajectory_that_comes_twice_in_a_row_is_drawn_from_twice(
    step, directories, trajectories, tmp_path
):
    """And takes nothing from the others: all windows that are drawn, and logged, are used."""
    trainer = make_trainer(directories, trajectories, make_config(tmp_path, max_steps=8))
    trainer.state.global_step = step
    ids = torch.tensor([1, 1, 2])
    starts = trainer._draw(ids.repeat_interleave(2)).view(3, 2)
    assert starts.equal(trainer.sampler.draw(ids, 2, step, trainer._generator()).starts)
    assert not starts[0].equal(starts[1])


@pytest.mark.parametrize("objective", ["ppow", "exact"])
def test_windows_of_a_trajectory_share_a_forward(objective, directories, trajectories, tmp_path):
    """TRL shuffles the rows of an update before it splits them; every row is there once, in its own place."""
    trainer = make_trainer(
        directories, trajectories, make_config(tmp_path, objective=objective, windows_per_forward=8)
    )
    rows, seen = first_rows(trainer), []
    for trainer._step in range(3):
        batch = trainer._prepare_inputs(rows)
        seen += batch["row"].tolist()
        column = batch["trajectory"] if objective == "exact" else batch["prompt_ids"][:, 0]
        assert len(column.unique()) == 1
        assert len(column) == 8
    assert seen == list(range(24))


# ---------------------------------------------------------------- seams of TRL


def test_trl_refuses_lora_on_an_output_layer_that_is_named(directories, trajectories, tmp_path, monkeypatch):
    """When it no longer does, `output_layer_unnamed` can go."""
    config = make_config(tmp_path, objective="cst:jsd", lora_targets=["lm_head"])
    make_trainer(directories, trajectories, config, "eagle3")
    monkeypatch.setattr("ppow_train.trainer.output_layer_unnamed", lambda *_: contextlib.nullcontext())
    with pytest.raises(ValueError, match="lm_head"):
        make_trainer(directories, trajectories, config, "eagle3")


def test_trl_scales_its_own_losses_for_accumulation():
    """As ours do; transformers then leaves them alone."""
    assert GRPOTrainer.loss_is_scaled_for_ga is True


def test_trl_keeps_the_forwards_of_an_update_where_we_put_them_in_order():
    source = inspect.getsource(GRPOTrainer._prepare_inputs)
    assert "inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]" in source


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("_generate_and_score_completions", ["self", "inputs"]),
        ("_prepare_inputs", ["self", "generation_batch"]),
        ("_compute_loss", ["self", "model", "inputs"]),
        (
            "_get_per_token_logps_and_entropies",
            ["self", "model", "input_ids", "attention_mask", "logits_to_keep"],
        ),
    ],
)
def test_overridden_methods_are_still_there(method, parameters):
    assert list(inspect.signature(getattr(GRPOTrainer, method)).parameters)[: len(parameters)] == parameters
    assert getattr(PPOWTrainer, method) is not getattr(GRPOTrainer, method)


def test_only_these_methods_are_overridden():
    shared = {name for name in vars(PPOWTrainer) if hasattr(GRPOTrainer, name) and not name.startswith("__")}
    assert shared == {
        "_tag_names",
        "_generate_and_score_completions",
        "_prepare_inputs",
        "_get_per_token_logps_and_entropies",
        "_compute_loss",
    }


def test_trl_reads_the_reference_model_only_to_hand_it_on():
    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    assert source.count("self.ref_model") == 2  # the question whether there is one, and the call
    assert "ref_model" not in inspect.getsource(GRPOTrainer._compute_loss)


def test_shuffle_and_split_keep_extra_tensors_aligned():
    batch = {"trajectory": torch.arange(6), "start": torch.arange(6) + 10}
    torch.manual_seed(0)
    shuffled = grpo_trainer.shuffle_sequence_dict(batch)
    assert shuffled["trajectory"].tolist() != list(range(6))
    assert (shuffled["start"] - shuffled["trajectory"]).tolist() == [10] * 6
    parts = grpo_trainer.split_tensor_dict(shuffled, 2)
    assert [len(part["start"]) for part in parts] == [3, 3]


def test_rollout_columns_reach_the_reward_functions(trained):
    """TRL merges what `rollout_func` returns beyond its three keys into the rows."""
    trainer, batch = trained
    k = trainer._rollout.num_accepted_tokens.float()
    assert trainer._metrics["train"]["rewards/speedup/mean"][0] == pytest.approx(
        sum(speedup_reward(value, trainer.args.draft_cost_ratio) for value in k.tolist()) / len(k)
    )
    assert trainer._metrics["train"]["windows/num_accepted_tokens"][0] == pytest.approx(k.mean().item())
    assert batch["completion_ids"].equal(trainer._rollout.tokens)


def test_one_update_per_batch_needs_no_old_log_probabilities(trained):
    assert trained[1].get("old_per_token_logps") is None


@pytest.mark.parametrize("allowed", [False, True])
def test_nothing_is_told_to_the_hub_unless_allowed(allowed, directories, trajectories, tmp_path, monkeypatch):
    from huggingface_hub import constants
    from huggingface_hub.utils import _telemetry

    for name in ("CI", "HF_HUB_DISABLE_TELEMETRY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_OFFLINE"):
        monkeypatch.setattr(constants, name, False)
    if allowed:
        monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "0")
    sent = []
    monkeypatch.setattr(_telemetry, "_start_telemetry_thread", lambda: sent.append("thread"))
    monkeypatch.setattr(_telemetry, "_TELEMETRY_QUEUE", queue.Queue())
    make_trainer(directories, trajectories, make_config(tmp_path))
    assert sent == (["thread"] if allowed else [])
