"""One training run from start to adapter: get trajectories, train, write. What `ppow train` does.

Left out: command-line parsing; loading the pair (pair.py); what the adapter records (adapter.py); serving.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress, TaskID

from ppow_train.adapter import adapter_config, held_out_facts, training_facts, write_files
from ppow_train.causal import check_layers, check_positions, check_windows
from ppow_train.checkpoints import (
    CheckpointState,
    finish_run,
    open_run,
    recorded_windows_per_forward,
    restore_state,
    run_facts,
)
from ppow_train.config import PPOWConfig
from ppow_train.data import keep_long_enough, read_prompts
from ppow_train.divergence import Diverged, Divergence
from ppow_train.errors import UserError
from ppow_train.generation import Round, check_length, load_or_generate, load_tokenizer
from ppow_train.lora_targets import check_lora_targets
from ppow_train.machine import peak_bytes
from ppow_train.microbatches import choose_windows_per_forward, divide_step
from ppow_train.pair import Pair
from ppow_train.progress import ProgressBar
from ppow_train.prompts import Text
from ppow_train.rollout import WindowRunner
from ppow_train.selection import BestOnHeldOut, Judge, SelectionState, require_held_out, split_held_out
from ppow_train.shapes import Shapes
from ppow_train.target_cache import TargetCache, open_cache
from ppow_train.types import Trajectories
from ppow_train.walk import ExpectedWalk
from vllm_ppow.artifact import Adapter, check_output, read_adapter, write_adapter


def check_trainable(pair: Pair, config: PPOWConfig) -> None:
    """Refuse what would end a run only after its trajectories are generated.

    Raises:
        UserError: layers to adapt are not there, layers are no attention, or sizes of a model are not known.
    """
    drafter = pair.drafter
    check_lora_targets(drafter.model, config.lora_targets or drafter.lora_targets, drafter.has_own_output)
    for model in (pair.target.model, pair.drafter.model):
        Shapes.of(model)
    for model in (pair.target.model, *([drafter.model] if drafter.drafter_type == "causal_lm" else [])):
        check_layers(model)
        if config.is_rollout:
            check_windows(model)


def check_read(pair: Pair, longest: int) -> None:
    """Refuse texts that target or drafter cannot read.

    Args:
        longest: tokens of a prompt and its continuation at most.

    Raises:
        UserError: one of them has no positions for them.
    """
    check_length(longest, pair.target.model.config)
    if pair.drafter.drafter_type == "causal_lm":
        check_positions(pair.drafter.model, longest)


def check_lengths(pair: Pair, config: PPOWConfig, longest: int) -> None:
    """Refuse trajectories that are to be generated and could not be trained on.

    Args:
        longest: tokens of a prompt and its continuation at most.

    Raises:
        UserError: target or drafter have no positions for them, or `ppow` cannot draft behind them.
    """
    check_read(pair, longest)
    if config.is_rollout:
        pair.target.check_length(longest)
        pair.drafter.check_length(longest)


def get_trajectories(
    pair: Pair,
    prompts: Path,
    *,
    cache: Path,
    max_new_tokens: int,
    rounds: Sequence[Round],
    progress: Progress,
    texts: Sequence[Text] | None = None,
) -> Trajectories:
    """The target's continuations of a prompt file, round by round, generated or from the cache.

    Args:
        texts: those of the file to continue; None for all.

    Raises:
        UserError: a GPU's memory does not suffice.
    """
    tokenizer = load_tokenizer(pair.target.directory)
    texts = read_prompts(prompts, tokenizer) if texts is None else texts
    task = progress.add_task(f"target continues {prompts.name}", total=len(texts) * len(rounds), note="")
    parts = []
    for index, drawn in enumerate(rounds):
        before = index * len(texts)
        try:
            part = load_or_generate(
                cache,
                pair.target.model,
                tokenizer,
                texts,
                target_fingerprint=pair.target_ref.fingerprint,
                max_new_tokens=max_new_tokens,
                temperature=drawn.temperature,
                seed=drawn.seed,
                report=_advance(progress, task, before),
            )
        except torch.cuda.OutOfMemoryError as error:
            raise UserError(
                f"The GPU ran out of memory while the target continued {prompts.name}: stop what else uses it, lower "
                "--max-new-tokens, give --target-dtype bfloat16, or continue the prompts with `ppow data "
                "--batch-size`, below its default, and train with --data."
            ) from error
        parts.append(part)
        progress.update(task, completed=before + len(texts))
    return Trajectories.join(parts)


def _advance(progress: Progress, task: TaskID, before: int) -> Callable[[int], None]:
    return lambda done: progress.update(task, completed=before + done)


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
    facts: dict[str, Any] | None = None,
    resume: bool = False,
    cache: Path | None = None,
    progress: Progress,
) -> TrainingResult:
    """Train one adapter and write it to `output`; of several processes each calls this, and the main one writes.

    The pair's drafter is changed in place while training and restored before returning, so a pair can be used again.
    With `save_strategy` "steps", training state is in `config.output_dir` until the adapter is written.
    Of a run that diverges the best adapter is written, if `eval_steps` found one that gains; else it raises Diverged.

    Args:
        held_out: prompts to report on, and with `eval_steps` to choose the best adapter on (selection.py).
        facts: added to what the adapter records of its training.
        resume: go on with the unfinished run in `config.output_dir`, if there is one, instead of refusing.
        cache: directory of the target's states, for `target_cache` "disk".
    """
    check_output(output)
    trajectories = keep_long_enough(trajectories, config.num_speculative_tokens)
    runner = make_runner(pair, trajectories, config, drafts=config.is_rollout)
    selecting, reporting = make_judges(pair, held_out, config)
    _divide(runner, config, [judge for judge in (selecting, reporting) if judge])
    with _state_of_run(pair, trajectories, config, resume) as checkpoint, restored(pair.drafter.model):
        runner.cache = open_run_cache(pair, runner.trajectories, config, cache, progress)
        before = reporting() if reporting else None
        trainer, best = _train(runner, config, selecting, checkpoint, progress)
        peft_model = trainer.accelerator.unwrap_model(trainer.model)
        peft_model.eval()
        if best:
            best.restore(peft_model)
        after = reporting() if reporting else None
        if reporting:
            reporting.forget()
        updates = trainer.state.global_step if best is None else best.counted(trainer.state.global_step)
        training = training_facts(config, trajectories, updates) | (facts or {})
        training["target_dtype"] = str(pair.target.model.dtype).removeprefix("torch.")
        training["peak_memory_bytes"] = peak_bytes(pair.target.model.device)  # of this process
        recorded = adapter_config(pair, config, training | held_out_facts(before, after, best))
        log = trainer.window_log.path
        if trainer.accelerator.is_main_process:
            write_adapter(output, recorded, lambda out: write_files(out, recorded, peft_model, log))
            _drop_state(config, log)
        trainer.accelerator.wait_for_everyone()
        return TrainingResult(
            read_adapter(output),
            before,
            after,
            trainer.state.log_history,
            reporting.runner.trajectories if reporting else None,
            best.state if best else None,
        )


def _divide(runner: WindowRunner, config: PPOWConfig, judges: Sequence[Judge]) -> None:
    """Settle the windows of a forward: as told, as the run began that is resumed here, or what fits."""
    if config.save_strategy != "no" and config.windows_per_forward is None:
        config.windows_per_forward = recorded_windows_per_forward(Path(config.output_dir))
    config.windows_per_forward = choose_windows_per_forward(runner, config, judges)
    divide_step(config, config.windows_per_forward)


def open_run_cache(
    pair: Pair, trajectories: Trajectories, config: PPOWConfig, directory: Path | None, progress: Progress
) -> TargetCache | None:
    """The target's states that a run reads, filled; every process of the run calls this."""
    # On disk one process writes what the others find; in memory each has its own.
    on_disk = config.target_cache == "disk"
    with config.main_process_first(local=False) if on_disk else contextlib.nullcontext():
        return open_cache(pair.target, trajectories, config, directory, pair.target_ref.fingerprint, progress)


def _train(
    runner: WindowRunner,
    config: PPOWConfig,
    selecting: Judge | None,
    checkpoint: Path | None,
    progress: Progress,
) -> tuple[Any, BestOnHeldOut | None]:
    """The trainer after its last update, and what was best of it, if anyone judges.

    Raises:
        Diverged: and nothing of it is worth to be written.
    """
    from ppow_train.trainer import PPOWTrainer

    bar = ProgressBar(f"training ({config.objective})", progress)
    callbacks = [bar, Divergence()]
    trainer = PPOWTrainer(runner, config, load_tokenizer(runner.target.directory), callbacks=callbacks)
    best = BestOnHeldOut(selecting, config, trainer.log_next) if selecting else None
    if best:
        trainer.add_callback(best)
    trainer.add_callback(CheckpointState(trainer))  # last: what it writes says that a checkpoint is whole
    quiet_trainer(trainer)
    if checkpoint is not None:
        restore_state(trainer, checkpoint)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except Diverged as diverged:
        if best is None or not best.outlives(diverged.update):
            raise
        trainer.callback_handler.on_train_end(config, trainer.state, trainer.control)  # the log's last line
    return trainer, best


def _drop_state(config: PPOWConfig, log: Path) -> None:
    """The adapter stands, its log with it. The log goes last: a run that is killed here is resumed, and reads it."""
    if config.save_strategy != "no":  # else what is there is another run's
        finish_run(Path(config.output_dir))
    log.unlink()
    with contextlib.suppress(OSError):
        log.parent.rmdir()


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


def make_judges(
    pair: Pair, held_out: Trajectories | None, config: PPOWConfig
) -> tuple[Judge | None, Judge | None]:
    """Who selects and who reports; nobody selects without eval_steps, nobody does anything without prompts.

    Raises:
        UserError: held-out prompts are missing, too few or too short.
    """
    require_held_out(config, held_out is not None)
    if held_out is None:
        return None, None
    greedy_drafts = config.serving_temperature == 0 or config.draft_sample_method == "greedy"
    held_out = keep_long_enough(held_out, config.num_speculative_tokens)
    halves = split_held_out(held_out) if config.eval_steps else (None, held_out)
    selecting, reporting = (
        Judge(make_runner(pair, half, config), greedy_drafts) if half is not None else None for half in halves
    )
    return selecting, reporting


def make_runner(
    pair: Pair, trajectories: Trajectories, config: PPOWConfig, *, drafts: bool = False
) -> WindowRunner:
    """A pair on trajectories, as a configuration wants them; `drafts` as in `WindowRunner`."""
    return WindowRunner(
        pair.target,
        pair.drafter,
        trajectories.to(pair.target.model.device),
        config.num_speculative_tokens,
        config.training_temperature,
        greedy=config.serving_temperature == 0,
        sampled_paths=config.needs_argmax,
        drafts=drafts,
    )


def quiet_trainer(trainer: Any) -> None:
    """Our progress bar replaces the line-per-log printer of transformers."""
    from transformers import PrinterCallback, ProgressCallback

    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)


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
