"""Whole runs on the tiny models: losses fall, seeds repeat, the drafter comes back, the adapter reloads."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from training_pair import VOCAB, Directories, K, load

from ppow_train.config import PPOWConfig
from ppow_train.data import collate
from ppow_train.drafters import load_drafter
from ppow_train.errors import UserError
from ppow_train.generation import generate, load_tokenizer
from ppow_train.objectives.choose import make_objective
from ppow_train.options import PPOWOptions
from ppow_train.pair import Pair, load_pair
from ppow_train.progress import make_progress
from ppow_train.rollout import WindowRunner
from ppow_train.training import train_adapter
from ppow_train.types import Trajectories
from ppow_train.walk import ExpectedWalk, expected_walk, serving_tokens
from vllm_ppow.artifact import ArtifactError, read_adapter
from vllm_ppow.merge import Merger


def config_for(tmp_path: Path, **options: Any) -> PPOWConfig:
    defaults = {
        "num_speculative_tokens": K,
        "trajectories_per_step": 8,
        "windows_per_step": 64,
        "max_steps": 8,
        "lora_rank": 8,
        "lora_alpha": 64,
        "learning_rate": 2e-2,
        "warmup_steps": 0,
        "use_cpu": True,
        "output_dir": str(tmp_path / "out"),
    }
    return PPOWConfig(**{**defaults, **options})


@pytest.mark.parametrize("objective", ["cst:jsd", "ppow"])
def test_a_run_that_diverges_ends_at_that_update_and_writes_nothing(
    objective, directories, continuations, tmp_path, monkeypatch
):
    from ppow_train.trainer import PPOWTrainer

    own, updates = PPOWTrainer._compute_loss, []

    def spoilt(self, model, inputs):
        updates.append(self.state.global_step)
        return own(self, model, inputs) * (float("nan") if self.state.global_step == 2 else 1.0)

    monkeypatch.setattr(PPOWTrainer, "_compute_loss", spoilt)
    config = config_for(tmp_path, objective=objective, save_steps=1)
    pair = load_pair(str(directories.target), str(directories.drafter["causal_lm"]))
    with (
        make_progress(is_shown=False) as progress,
        pytest.raises(UserError, match=r"diverged at update 3: .*Lower --learning-rate"),
    ):
        train_adapter(pair, continuations, config, tmp_path / "adapter", progress=progress)
    assert max(updates) == 2
    assert not (tmp_path / "adapter").exists()
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == [
        "checkpoint-1",
        "checkpoint-2",
    ]


@pytest.fixture(scope="module")
def continuations(directories):
    """The target's own, at temperature 1."""
    pair = load(directories, "causal_lm")
    prompts = ["windows", "of draft", "tokens ", "dow"]
    ids = generate(
        pair.target.model,
        load_tokenizer(directories.target),
        prompts * 3,
        max_new_tokens=24,
        temperature=1.0,
        seed=0,
    )
    return collate(*ids)


def open_pair(directories: Directories, kind: str) -> Pair:
    return load_pair(str(directories.target), str(directories.drafter[kind]))


def weights_of(pair: Pair) -> dict[str, torch.Tensor]:
    """All but the library's `verifier_*`, which no checkpoint fills."""
    state = pair.drafter.model.state_dict().items()
    return {name: tensor.clone() for name, tensor in state if not name.startswith("verifier_")}


def merged(pair: Pair, directories: Directories, kind: str, adapter: Any) -> Pair:
    """The pair with the adapter read by PEFT from disk and merged."""
    drafter = load_drafter(directories.drafter[kind], target=directories.target)
    drafter.model = PeftModel.from_pretrained(drafter.model, adapter).merge_and_unload()
    return dataclasses.replace(pair, drafter=drafter)


def runner_of(pair: Pair, trajectories: Trajectories) -> WindowRunner:
    return WindowRunner(pair.target, pair.drafter, trajectories, K, temperature=1.0)


def walk(runner: WindowRunner, greedy_drafts: bool = True) -> ExpectedWalk:
    return expected_walk(runner, serving_tokens(runner.trajectories, K), greedy_drafts)


def loss_on_all(objective: Any, pair: Pair, trajectories: Trajectories) -> float:
    """The objective on every second window of every trajectory."""
    runner = runner_of(pair, trajectories)
    room, first = trajectories.num_starts(K).tolist(), trajectories.first_starts().tolist()
    windows = [(row, first[row] + at) for row in range(len(trajectories)) for at in range(0, room[row], 2)]
    rows = torch.tensor(windows).T
    with torch.no_grad():
        return objective(runner.path_windows(*rows)).item()


@pytest.mark.parametrize(
    ("kind", "objective", "options"),
    [
        ("eagle3", "exact", {"draft_sample_method": "greedy"}),
        ("reduced", "overlap", {"draft_sample_method": "greedy", "cost_reading": "drafted"}),
        (
            "causal_lm",
            "exact",
            {"serving_temperature": 0.0, "greedy_target": "hard", "greedy_sampling_temperature": 1.0},
        ),
    ],
)
def test_every_form_lowers_its_own_loss(
    kind, objective, options, directories, continuations, tmp_path, progress
):
    check_that_training_lowers(kind, directories, continuations, tmp_path, progress, objective, **options)


@pytest.mark.parametrize(
    ("kind", "objective"),
    [
        ("causal_lm", "overlap"),
        ("causal_lm", "overlap + 4 * cst:tv"),
        ("causal_lm", "exact"),
        *(("eagle3", name) for name in ("overlap", "cst:ce", "cst:kl", "cst:rkl", "cst:jsd", "cst:tv")),
        *(("eagle31", name) for name in ("exact", "cst:nla", "cst:lk_hybrid")),
        *(("reduced", name) for name in ("overlap", "cst:ce", "cst:kl", "cst:rkl", "cst:jsd")),
        *(("original", name) for name in ("exact", "cst:tv", "cst:nla", "cst:lk_hybrid")),
    ],
)
def test_an_objective_lowers_its_own_loss(kind, objective, directories, continuations, tmp_path, progress):
    check_that_training_lowers(kind, directories, continuations, tmp_path, progress, objective)


def check_that_training_lowers(
    kind: str,
    directories: Directories,
    continuations: Trajectories,
    tmp_path: Path,
    progress: Any,
    objective: str,
    **options: Any,
) -> None:
    pair = open_pair(directories, kind)
    config = config_for(tmp_path, objective=objective, **options)
    loss = make_objective(config)
    before = loss_on_all(loss, pair, continuations)
    train_adapter(pair, continuations, config, tmp_path / "adapter", progress=progress)
    after = loss_on_all(loss, merged(pair, directories, kind, tmp_path / "adapter"), continuations)
    assert after < before - 0.02 * abs(before)


@pytest.mark.parametrize("kind", ["eagle3", "eagle31", "reduced", "original"])
def test_an_output_layer_alone_lowers_the_loss(kind, directories, continuations, tmp_path, progress):
    """TRL refuses LoRA on it, as its own forward would pass it by; windows do not."""
    pair = open_pair(directories, kind)
    before = weights_of(pair)
    check_that_training_lowers(
        kind, directories, continuations, tmp_path, progress, "cst:jsd", lora_targets=["lm_head"]
    )
    adapter = read_adapter(tmp_path / "adapter")
    assert set(load_file(adapter.weights)) == {
        f"base_model.model.lm_head.lora_{side}.weight" for side in "AB"
    }
    Merger(adapter).check_base(directories.drafter[kind])
    after = weights_of(open_pair(directories, kind))
    assert all(tensor.equal(before[name]) for name, tensor in after.items())


def test_an_output_layer_is_adapted_by_ppow(directories, continuations, tmp_path, progress):
    """Its gradient arrives: B starts at zero."""
    pair = open_pair(directories, "reduced")
    options = {"objective": "ppow", "num_generations": 8, "windows_per_step": 128, "max_steps": 2}
    config = config_for(tmp_path, lora_targets=["q_proj", "lm_head"], **options)
    named = pair.drafter.model.get_output_embeddings()
    train_adapter(pair, continuations, config, tmp_path / "adapter", progress=progress)
    assert pair.drafter.model.get_output_embeddings() is named
    adapted = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert adapted["base_model.model.lm_head.lora_B.weight"].abs().max() > 0


@pytest.mark.parametrize(
    ("kind", "steps", "credit"),
    [
        *((kind, 10, "published") for kind in ("causal_lm", "eagle3", "reduced")),
        ("original", 30, "published"),
        ("causal_lm", 10, "acceptance"),
        ("reduced", 10, "acceptance"),
    ],
)
def test_ppow_raises_what_windows_earn(kind, steps, credit, directories, continuations, tmp_path, progress):
    pair = open_pair(directories, kind)
    config = config_for(
        tmp_path,
        objective="ppow",
        ppow_credit=credit,
        num_generations=8,
        windows_per_step=128,
        max_steps=steps,
        beta=0.2,
    )
    loss = make_objective(PPOWOptions(objective="exact"))
    before = loss_on_all(loss, pair, continuations)
    result = train_adapter(pair, continuations, config, tmp_path / "adapter", progress=progress)
    after = loss_on_all(loss, merged(pair, directories, kind, tmp_path / "adapter"), continuations)
    assert after < before - 0.05 * abs(before)
    assert any("windows/num_accepted_tokens" in entry for entry in result.log)


@pytest.mark.parametrize("objective", ["overlap", "ppow"])
def test_the_same_seed_writes_the_same_bytes(objective, directories, continuations, tmp_path, progress):
    pair = open_pair(directories, "eagle3")
    written = []
    for name, seed in (("one", 3), ("same", 3), ("other", 4)):
        options = {"num_generations": 4} if objective == "ppow" else {}
        torch.manual_seed(len(name))  # what ran before must not matter
        config = config_for(tmp_path, objective=objective, max_steps=2, seed=seed, **options)
        train_adapter(pair, continuations, config, tmp_path / name, progress=progress)
        written.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert written[0] == written[1]
    assert written[0] != written[2]


@pytest.mark.parametrize("kind", ["causal_lm", "eagle3", "original"])
def test_the_drafter_comes_back_and_the_adapter_reloads(kind, directories, continuations, tmp_path, progress):
    pair = open_pair(directories, kind)
    before = weights_of(pair)
    result = train_adapter(
        pair,
        continuations,
        config_for(tmp_path, max_steps=3, draft_sample_method="greedy", objective="4*cst:tv+overlap"),
        tmp_path / "adapter",
        held_out=continuations,
        facts={"prompts": "mine"},
        progress=progress,
    )
    after = weights_of(pair)
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
    assert not any("lora" in name for name, _ in pair.drafter.model.named_modules())

    adapter = read_adapter(tmp_path / "adapter")
    assert adapter.config == result.adapter.config
    assert adapter.config.drafter_type == ("causal_lm" if kind == "causal_lm" else "eagle3")
    assert adapter.config.base_drafter == pair.drafter_ref
    assert adapter.config.target == pair.target_ref
    assert adapter.config.draft_sample_method == "greedy"
    assert adapter.config.training["objective"] == "4 * cst:tv + overlap"
    assert adapter.config.num_speculative_tokens == K
    assert adapter.config.training["prompts"] == "mine"
    assert "torch" in adapter.config.versions

    assert result.after is not None
    assert result.before is not None
    reloaded = walk(runner_of(merged(pair, directories, kind, adapter.directory), continuations))
    assert reloaded.acceptance_per_position == pytest.approx(result.after.acceptance_per_position, abs=1e-5)
    restored = walk(runner_of(pair, continuations))
    assert restored.acceptance_per_position == pytest.approx(result.before.acceptance_per_position, abs=1e-6)
    trained = merged(pair, directories, kind, adapter.directory)
    sampled = [walk(runner_of(drafts, continuations), False).mean_accepted for drafts in (trained, pair)]
    assert abs(sampled[0] - sampled[1]) > 1e-3
    assert adapter.config.training["report"]["prompts"] == len(continuations)


@pytest.mark.parametrize(
    "place",
    ["PPOWTrainer._compute_loss", "admit_computations"],
    ids=["while training", "after LoRA is injected"],
)
def test_a_run_that_fails_gives_the_drafter_back(
    place, directories, continuations, tmp_path, progress, monkeypatch
):
    pair = open_pair(directories, "causal_lm")
    before = weights_of(pair)
    monkeypatch.setattr(f"ppow_train.trainer.{place}", lambda *_: (_ for _ in ()).throw(RuntimeError("lost")))
    with pytest.raises(RuntimeError, match="lost"):
        train_adapter(pair, continuations, config_for(tmp_path), tmp_path / "adapter", progress=progress)
    assert weights_of(pair).keys() == before.keys()
    assert "forward" not in vars(pair.drafter.model)
    assert not (tmp_path / "adapter").exists()


def test_generation_is_the_targets_own_distribution(directories):
    """Greedy continuations are argmax chains whatever sampling defaults the target ships."""
    pair = load(directories, "causal_lm")
    model = pair.target.model
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.top_k = 1
    tokenizer = load_tokenizer(directories.target)
    prompts, continued = generate(
        model, tokenizer, ["windows", "d"], max_new_tokens=12, temperature=0, seed=0
    )
    for prompt, continuation in zip(prompts, continued, strict=True):
        ids = torch.tensor([prompt])
        for token in continuation:
            assert model(input_ids=ids).logits[0, -1].argmax() == token
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    _, sampled = generate(model, tokenizer, ["windows"] * 20, max_new_tokens=3, temperature=1.0, seed=0)
    assert len({tuple(row) for row in sampled}) > 1
    for temperature in (0.5, 2.0):  # first tokens against the whole softmax: mean log-probability, 4 errors
        _, first = generate(
            model, tokenizer, ["windows"] * 500, max_new_tokens=1, temperature=temperature, seed=0
        )
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompts[0]])).logits[0, -1]
        logp = (logits / temperature).log_softmax(-1)
        seen, wanted = logp[torch.tensor(first)[:, 0]], (logp.exp() * logp).sum()
        assert (seen.mean() - wanted).abs() < 4 * seen.std() / 500**0.5
    assert model.generation_config.repetition_penalty == 5.0, "the target is left as it was"


def test_generation_ends_at_any_of_the_targets_end_tokens(directories):
    """Chat models name several; what stands after the first is padding, not text."""
    pair = load(directories, "causal_lm")
    model, tokenizer = pair.target.model, load_tokenizer(directories.target)
    prompts = ["windows", "of", "draft", "tokens"]
    _, free = generate(model, tokenizer, prompts, max_new_tokens=12, temperature=1.0, seed=1)
    end = free[0][4]
    model.generation_config.eos_token_id = [0, end]
    _, ended = generate(model, tokenizer, prompts, max_new_tokens=12, temperature=1.0, seed=1)
    assert ended[0] == free[0][: free[0].index(end) + 1]
    assert all(end not in row[:-1] for row in ended)
    assert VOCAB > end > 0


def test_an_output_that_is_something_else_is_refused_before_training(
    tmp_path, directories, continuations, monkeypatch
):
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter1.txt").write_text("mine")
    monkeypatch.setattr("ppow_train.trainer.PPOWTrainer.train", lambda self: pytest.fail("trained first"))
    with make_progress() as progress, pytest.raises(ArtifactError, match="name another output"):
        train_adapter(
            open_pair(directories, "causal_lm"), continuations, config_for(tmp_path), out, progress=progress
        )
    assert (out / "chapter1.txt").read_text() == "mine"


def test_training_leaves_the_log_of_vllm_alone():
    """TRL puts VLLM_LOGGING_LEVEL=ERROR into the environment on import; engines started later would fall silent."""

    code = "import ppow_train.trainer, os; print(os.environ.get('VLLM_LOGGING_LEVEL'))"
    environment = {name: value for name, value in os.environ.items() if name != "VLLM_LOGGING_LEVEL"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[-1] == "INFO"
