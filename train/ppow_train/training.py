"""One training run from start to adapter: load the pair, get trajectories, train, write. What `ppow train` does.

Left out: command-line parsing, serving.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from ppow_train.checkpoints import CheckpointState, finish_run, open_run, restore_state, run_facts
from ppow_train.config import PPOWConfig
from ppow_train.data import keep_long_enough, read_prompts
from ppow_train.drafters import Drafter, load_drafter
from ppow_train.errors import UserError
from ppow_train.evaluation import SimulatedAcceptance, simulate_acceptance
from ppow_train.generation import load_or_generate, load_tokenizer
from ppow_train.microbatches import choose_windows_per_forward, divide_step
from ppow_train.progress import ProgressBar, quiet_libraries
from ppow_train.rollout import WindowRunner
from ppow_train.target import Target
from ppow_train.types import Trajectories
from vllm_ppow.artifact import (
    Adapter,
    AdapterConfig,
    ModelRef,
    check_output,
    fingerprint_model,
    read_adapter,
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
    """What a run left behind: the adapter, and simulated acceptance on held-out prompts before and after (if given)."""

    adapter: Adapter
    before: SimulatedAcceptance | None
    after: SimulatedAcceptance | None
    log: list[dict[str, Any]]


def train_adapter(
    pair: Pair,
    trajectories: Trajectories,
    config: PPOWConfig,
    output: Path,
    *,
    held_out: Trajectories | None = None,
    facts: dict[str, Any] | None = None,
    resume: bool = False,
    progress: Progress,
) -> TrainingResult:
    """Train one adapter and write it to `output`; of several processes each calls this, and the main one writes.

    The pair's drafter is changed in place while training and restored before returning, so a pair can be used again.
    With `save_strategy` "steps", training state is in `config.output_dir` until the adapter is written.

    Args:
        resume: go on with the unfinished run in `config.output_dir`, if there is one, instead of refusing.
    """
    check_output(output)
    trajectories = keep_long_enough(trajectories, config.num_speculative_tokens)
    runner = _runner(pair, trajectories, config)
    test = (
        _runner(pair, keep_long_enough(held_out, config.num_speculative_tokens), config) if held_out else None
    )
    divide_step(config, choose_windows_per_forward(config))
    with _state_of_run(pair, trajectories, config, resume) as checkpoint, restored(pair.drafter.model):
        before = simulate_acceptance(test) if test else None
        trainer = _train(runner, config, checkpoint, progress)
        peft_model = trainer.accelerator.unwrap_model(trainer.model)
        peft_model.eval()
        after = simulate_acceptance(test) if test else None
        training = _facts(config, len(trajectories), before, after) | (facts or {})
        if trainer.accelerator.is_main_process:
            write_adapter(
                output,
                _adapter_config(pair, config, training),
                lambda out: _save_adapter(peft_model, out, trainer.window_log.path),
            )
            trainer.window_log.path.unlink()  # it has gone with the adapter
            finish_run(Path(config.output_dir))
        trainer.accelerator.wait_for_everyone()
        return TrainingResult(read_adapter(output), before, after, trainer.state.log_history)


def _train(runner: WindowRunner, config: PPOWConfig, checkpoint: Path | None, progress: Progress) -> Any:
    from ppow_train.trainer import PPOWTrainer

    bar = ProgressBar(f"training ({config.objective})", progress)
    trainer = PPOWTrainer(runner, config, load_tokenizer(runner.target.directory), callbacks=[bar])
    trainer.add_callback(CheckpointState(trainer))
    quiet_trainer(trainer)
    if checkpoint is not None:
        restore_state(trainer, checkpoint)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return trainer


@contextlib.contextmanager
def _state_of_run(
    pair: Pair, trajectories: Trajectories, config: PPOWConfig, resume: bool
) -> Iterator[Path | None]:
    """The checkpoint to go on from, or None."""
    if config.save_strategy == "no":
        yield None
        return
    fingerprints = {"target": pair.target_ref.fingerprint, "drafter": pair.drafter_ref.fingerprint}
    facts = run_facts(config, trajectories, **fingerprints)
    with open_run(Path(config.output_dir), facts, resume) as checkpoint:
        yield checkpoint


def _facts(
    config: PPOWConfig,
    num_trajectories: int,
    before: SimulatedAcceptance | None,
    after: SimulatedAcceptance | None,
) -> dict[str, Any]:
    """What the adapter's card tells of its training."""
    simulated = {"before": before, "after": after}
    return {
        "objective": config.objective,
        "seed": config.seed,
        "updates": config.max_steps,
        "windows_per_update": config.windows_per_step,
        "learning_rate": config.learning_rate,
        "trajectories": num_trajectories,
        "simulated_accepted_tokens": {
            name: round(value.num_accepted_tokens, 4) for name, value in simulated.items() if value
        },
    }


def _runner(pair: Pair, trajectories: Trajectories, config: PPOWConfig) -> WindowRunner:
    return WindowRunner(
        pair.target,
        pair.drafter,
        trajectories.to(pair.target.model.device),
        config.num_speculative_tokens,
        config.training_temperature,
        greedy=config.serving_temperature == 0,
    )


def quiet_trainer(trainer: Any) -> None:
    """Our progress bar replaces the line-per-log printer of transformers."""
    from transformers import PrinterCallback, ProgressCallback

    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)


def _save_adapter(peft_model: Any, directory: Path, window_log: Path) -> None:
    """PEFT's two files, and the log of windows; embeddings are never saved, they are the base drafter's own."""
    with tempfile.TemporaryDirectory() as scratch:
        peft_model.save_pretrained(scratch, save_embedding_layers=False)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (directory / name).write_bytes((Path(scratch) / name).read_bytes())
    (directory / window_log.name).write_bytes(window_log.read_bytes())


@contextlib.contextmanager
def restored(model: torch.nn.Module) -> Iterator[None]:
    """Give the drafter its own layers and forward back at the end, whatever was injected until then."""
    own = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()]
    try:
        yield
    finally:
        for parent, name, child in own:
            setattr(parent, name, child)
        for name in ("forward", "peft_config"):
            model.__dict__.pop(name, None)


def _adapter_config(pair: Pair, config: PPOWConfig, training: dict[str, Any]) -> AdapterConfig:
    return AdapterConfig(
        drafter_type=pair.drafter.drafter_type,
        base_drafter=pair.drafter_ref,
        target=pair.target_ref,
        num_speculative_tokens=config.num_speculative_tokens,
        draft_cost_ratio=config.draft_cost_ratio,
        draft_sample_method=config.draft_sample_method,
        temperature=config.serving_temperature,
        training=training,
        versions={name: importlib.metadata.version(name) for name in _VERSIONED},
    )
