"""One training run from start to adapter: load the pair, get trajectories, train, write. What `ppow train` does.

Left out: command-line parsing, serving.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from ppow_train.card import write_card
from ppow_train.config import PPOWConfig
from ppow_train.data import keep_long_enough, read_prompts
from ppow_train.drafters import Drafter, load_drafter
from ppow_train.errors import UserError
from ppow_train.generation import load_or_generate, load_tokenizer
from ppow_train.options import PPOWOptions
from ppow_train.progress import ProgressBar, quiet_libraries
from ppow_train.report import CURVE, write_curve
from ppow_train.rollout import WindowRunner
from ppow_train.selection import BestOnHeldOut, Judge, SelectionState, require_held_out, split_held_out
from ppow_train.target import Target
from ppow_train.types import Trajectories
from ppow_train.walk import ExpectedWalk
from vllm_ppow.artifact import (
    Adapter,
    AdapterConfig,
    ModelRef,
    check_output,
    fingerprint_model,
    resolve_directory,
    write_adapter,
)

_VERSIONED = ("vllm-ppow", "torch", "transformers", "trl", "peft", "speculators")


@dataclasses.dataclass(frozen=True)
class Pair:
    """A loaded target and drafter with what identifies them."""

    target: Target
    drafter: Drafter
    target_ref: ModelRef
    drafter_ref: ModelRef


def load_pair(target: str, drafter: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Pair:
    """Load target and drafter and check that they fit.

    Args:
        target, drafter: directory or Hub repo id each.

    Raises:
        UserError, ArtifactError: cannot be found, or do not belong together.
    """
    quiet_libraries()
    target_dir, _ = resolve_directory(target)
    drafter_dir, _ = resolve_directory(drafter)
    refs = [_reference(name, directory) for name, directory in ((target, target_dir), (drafter, drafter_dir))]
    loaded = load_drafter(drafter_dir, device, dtype, target_dir)
    pair = Pair(Target(target_dir, loaded.tap_layers, device, dtype), loaded, *refs)
    if pair.target.vocab_size != loaded.vocab_size:
        raise UserError(
            f"Drafter {drafter} reads {loaded.vocab_size} tokens, target {target} has {pair.target.vocab_size}: "
            "they must share one tokenizer."
        )
    return pair


def _reference(name: str, directory: Path) -> ModelRef:
    recorded = str(directory.resolve()) if Path(name).expanduser().exists() else name
    return ModelRef(recorded, fingerprint_model(directory))


def get_trajectories(
    pair: Pair,
    prompts: Path,
    *,
    cache: Path,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    progress: Progress,
) -> Trajectories:
    """The target's continuations of a prompt file, generated or from the cache."""
    texts = read_prompts(prompts)
    task = progress.add_task(f"target continues {prompts.name}", total=len(texts), note="")
    trajectories = load_or_generate(
        cache,
        pair.target.model,
        load_tokenizer(pair.target.directory),
        texts,
        target_fingerprint=pair.target_ref.fingerprint,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        report=lambda done: progress.update(task, completed=done),
    )
    progress.update(task, completed=len(texts))
    return trajectories


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """What a run left behind.

    Attributes:
        adapter: as it was written.
        before, after: expected walks on the held-out prompts that report, if there are any.
        log: of TRL.
        report: these prompts with their continuations; no adapter was chosen on them.
        selection: how the adapter was chosen, if it was.
    """

    adapter: Adapter
    before: ExpectedWalk | None
    after: ExpectedWalk | None
    log: list[dict[str, Any]]
    report: Trajectories | None = None
    selection: SelectionState | None = None


def train_adapter(
    pair: Pair,
    trajectories: Trajectories,
    config: PPOWConfig,
    output: Path,
    *,
    held_out: Trajectories | None = None,
    draft_sample_method: str = "probabilistic",
    facts: dict[str, Any] | None = None,
    progress: Progress,
) -> TrainingResult:
    """Train one adapter and write it to `output`.

    The pair's drafter is changed in place while training and restored before returning, so a pair can be used again.

    Args:
        held_out: prompts to report on, and with `eval_steps` to choose the best adapter on (selection.py).
        draft_sample_method: how serving will draw drafts.
        facts: added to what the adapter records of its training.
    """
    from ppow_train.trainer import PPOWTrainer

    check_output(output)
    trajectories = keep_long_enough(trajectories, config.num_speculative_tokens)
    runner = _runner(pair, trajectories, config)
    selecting, reporting = _judges(pair, held_out, config, draft_sample_method)
    before = reporting() if reporting else None
    bar = ProgressBar(f"training ({config.objective})", progress)
    trainer = PPOWTrainer(runner, config, load_tokenizer(pair.target.directory), callbacks=[bar])
    _quiet(trainer)
    best = BestOnHeldOut(selecting, config, trainer.log_next) if selecting else None
    if best:
        trainer.add_callback(best)
    try:
        trainer.train()
        peft_model = trainer.accelerator.unwrap_model(trainer.model)
        peft_model.eval()
        if best and config.keep_best:
            best.restore_best(peft_model)
        after = reporting() if reporting else None
        training: dict[str, Any] = _facts(config, trajectories, trainer.state.global_step) | (facts or {})
        if before and after:
            training["report"] = {"prompts": len(before.num_drafts)} | _gain(before, after)
            training["gain_above_zero"] = after.mean_accepted > before.mean_accepted
        if best:
            training["selection"] = best.facts()
            training["gain_above_zero"] = best.state.beats_untrained
        recorded = _adapter_config(pair, config, draft_sample_method, training)
        adapter = write_adapter(output, recorded, lambda out: _write_parts(out, recorded, peft_model))
        return TrainingResult(
            adapter,
            before,
            after,
            trainer.state.log_history,
            reporting.runner.trajectories if reporting else None,
            best.state if best else None,
        )
    finally:
        _remove_lora(trainer.model)


def _facts(config: PPOWConfig, trajectories: Trajectories, updates: int) -> dict[str, Any]:
    """What the adapter's card tells of its training."""
    values = config.to_dict()
    return {
        "objective": config.objective,
        "seed": config.seed,
        "updates": updates,
        "windows_per_update": config.windows_per_step,
        "learning_rate": config.learning_rate,
        "trajectories": len(trajectories),
        "tokens": int((trajectories.lengths - trajectories.prompt_lengths).sum()),
        "options": {
            option.name: values[option.name]
            for option in dataclasses.fields(PPOWOptions)
            if not option.name.startswith(("push_", "hub_", "report_", "save_"))
        },
    }


def _gain(before: ExpectedWalk, after: ExpectedWalk) -> dict[str, Any]:
    """Accepted tokens per draft, in all and by position."""
    return {
        name: {
            "accepted_per_draft": round(walk.mean_accepted, 4),
            "per_position": [round(share, 4) for share in walk.acceptance_per_position],
        }
        for name, walk in (("before", before), ("after", after))
    }


def _judges(
    pair: Pair, held_out: Trajectories | None, config: PPOWConfig, draft_sample_method: str
) -> tuple[Judge | None, Judge | None]:
    """Who selects and who reports; nobody selects without eval_steps, nobody does anything without prompts."""
    require_held_out(config, held_out is not None)
    if held_out is None:
        return None, None
    greedy_drafts = config.serving_temperature == 0 or draft_sample_method == "greedy"
    held_out = keep_long_enough(held_out, config.num_speculative_tokens)
    halves = split_held_out(held_out) if config.eval_steps else (None, held_out)
    selecting, reporting = (
        Judge(_runner(pair, half, config), greedy_drafts) if half is not None else None for half in halves
    )
    return selecting, reporting


def _runner(pair: Pair, trajectories: Trajectories, config: PPOWConfig) -> WindowRunner:
    return WindowRunner(
        pair.target,
        pair.drafter,
        trajectories.to(pair.target.model.device),
        config.num_speculative_tokens,
        config.training_temperature,
        greedy=config.serving_temperature == 0,
    )


def _quiet(trainer: Any) -> None:
    """Our progress bar replaces the line-per-log printer of transformers."""
    from transformers import PrinterCallback, ProgressCallback

    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)


def _write_parts(directory: Path, config: AdapterConfig, peft_model: Any) -> None:
    _save_peft(peft_model, directory)
    if "selection" in config.training:
        write_curve(directory / CURVE, config.training["selection"])
    write_card(directory, config)


def _save_peft(peft_model: Any, directory: Path) -> None:
    """PEFT's two files; embeddings are never saved, they are the base drafter's own."""
    with tempfile.TemporaryDirectory() as scratch:
        peft_model.save_pretrained(scratch, save_embedding_layers=False)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (directory / name).write_bytes((Path(scratch) / name).read_bytes())


def _remove_lora(peft_model: Any) -> None:
    """Give the drafter its own linear layers back."""
    peft_model.unload()


def _adapter_config(
    pair: Pair, config: PPOWConfig, draft_sample_method: Any, training: dict[str, Any]
) -> AdapterConfig:
    return AdapterConfig(
        drafter_type=pair.drafter.drafter_type,
        base_drafter=pair.drafter_ref,
        target=pair.target_ref,
        num_speculative_tokens=config.num_speculative_tokens,
        draft_cost_ratio=config.draft_cost_ratio,
        draft_sample_method=draft_sample_method,
        temperature=config.serving_temperature,
        training=training,
        versions={name: importlib.metadata.version(name) for name in _VERSIONED},
    )
