"""Training state on disk: a run that is killed at any moment goes on, bit for bit as if nothing had happened.

    DIR/run.json                 what the run depends on; there from its first moment until its adapter is written
    DIR/checkpoint-100/          what transformers saves after 100 updates: adapter, optimizer, schedule, random state
        ppow_state.json          what it does not know of: proximity threshold, sampler, window log; written last: where
                                 it is, all is

A checkpoint without ppow_state.json was cut off by a kill, and is deleted. Left out: what is random in an update, which
follows from seed and step alone (trainer.py); which adapter is kept (selection.py).
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import PartialState
from transformers import TrainerCallback

from ppow_train.errors import UserError
from ppow_train.preflight import RUN
from ppow_train.trajectory_store import LOCK, describe_changes, only_writer, write_whole

if TYPE_CHECKING:
    from ppow_train.config import PPOWConfig
    from ppow_train.trainer import PPOWTrainer
    from ppow_train.types import Trajectories

STATE = "ppow_state.json"
_CARD = "README.md"  # TRL writes one beside every checkpoint, of a model that is not here

# Options that may change when a run goes on: they say what is kept and told, not what is learned.
_FREE = ("output_dir", "keep_best", "run_name", "report_to", "project", "ddp_timeout")
_FREE_PREFIXES = ("save_", "log", "hub_", "push_to_hub", "trackio_")


def run_facts(config: PPOWConfig, trajectories: Trajectories, **models: str) -> dict[str, Any]:
    """Everything that the result of a run depends on, as JSON values; `models` are fingerprints."""
    options = {
        name: value
        for name, value in config.to_dict().items()
        if name not in _FREE and not name.startswith(_FREE_PREFIXES)
    }
    facts = {**options, **models, "trajectories": trajectories.digest(), "num_processes": config.world_size}
    return json.loads(json.dumps(facts, default=str))


def recorded_windows_per_forward(directory: Path) -> int | None:
    """What the unfinished run in `directory` chose, or None: it goes on so, wherever it is resumed, bit for bit."""
    try:
        return json.loads((directory / RUN).read_text(encoding="utf-8"))["windows_per_forward"]
    except (OSError, ValueError, KeyError):
        return None  # no run, or none to go on with: `open_run` says so


@contextlib.contextmanager
def open_run(directory: Path, facts: dict[str, Any], resume: bool) -> Iterator[Path | None]:
    """Begin a run, or go on with an unfinished one; every process of the run enters.

    Args:
        directory: absent, or what an earlier run with the same facts left behind.
        resume: go on if there is something to go on with, instead of refusing.

    Yields:
        The newest whole checkpoint, or None.

    Raises:
        UserError: an unfinished run is there and `resume` is false, or it is another one; another process writes
            there.
    """
    processes = PartialState()
    _check(directory, facts, resume)
    processes.wait_for_everyone()  # all have looked before anything is written
    with only_writer(directory) if processes.is_main_process else contextlib.nullcontext():
        if processes.is_main_process:
            for checkpoint in _checkpoints(directory):
                if not (checkpoint / STATE).is_file():
                    shutil.rmtree(checkpoint)
            write_whole(directory, RUN, json.dumps(facts, indent=1).encode())
        processes.wait_for_everyone()
        yield next(reversed(_checkpoints(directory)), None)


def check_unfinished(directory: Path, resume: bool, keeps: bool) -> None:
    """What can be said of an unfinished run before anything is generated; the rest says `open_run`.

    Args:
        keeps: whether this run keeps training state (`save_strategy`). One that keeps none cannot go on with any, and
            would replace the log of a run that does.

    Raises:
        UserError: an unfinished run is there, and is not to be gone on with.
    """
    _check_foreign(directory)
    if resume and not keeps:
        raise UserError("--resume needs training state, and --save-strategy no keeps none: drop one of them.")
    if (directory / RUN).exists() and not resume:
        raise UserError(
            f"{directory} holds an unfinished run: add --resume and its options to go on with it, name other "
            "--checkpoints, or delete it."
        )


def finish_run(directory: Path) -> None:
    """The adapter stands: drop the training state. Whatever else was put there, logs for instance, stays."""
    for checkpoint in _checkpoints(directory):
        # Killed half-way, this must not look whole.
        (checkpoint / STATE).unlink(missing_ok=True)
        shutil.rmtree(checkpoint)
    for name in (_CARD, RUN, LOCK):
        (directory / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        directory.rmdir()


def _checkpoints(directory: Path) -> list[Path]:
    """In the order of their updates."""
    found = [path for path in directory.glob("checkpoint-*") if path.name.partition("-")[2].isdigit()]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def _check(directory: Path, facts: dict[str, Any], resume: bool) -> None:
    run = directory / RUN
    if not run.exists():
        _check_foreign(directory)
        return
    try:
        found = json.loads(run.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{run} is damaged: delete {directory} and begin again.") from error
    if changes := describe_changes(found, facts):
        raise UserError(
            f"{directory} holds an unfinished run with {changes}: give its options and --resume, name other "
            "--checkpoints, or delete it."
        )
    if not resume:
        raise UserError(
            f"{directory} holds an unfinished run of this very configuration: add --resume to go on, or delete it."
        )


def _check_foreign(directory: Path) -> None:
    """Refuse a directory that is no run's, and holds what a run would replace and in the end delete."""
    if not directory.exists() or (directory / RUN).exists():
        return
    if not directory.is_dir() or _checkpoints(directory):
        raise UserError(
            f"{directory} is something else than the training state of a run: name other --checkpoints."
        )
    if (directory / _CARD).exists():  # a log of windows alone is what a killed run without checkpoints leaves
        raise UserError(
            f"{directory} holds a {_CARD}, which the run would replace and delete: name other --checkpoints."
        )


class CheckpointState(TrainerCallback):
    """Completes each checkpoint of a trainer with `STATE`."""

    def __init__(self, trainer: PPOWTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log before saving: sums of a line that is not finished yet are in no checkpoint."""
        control.should_log |= control.should_save

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Every process has written its part: say so."""
        self.trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            directory = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_whole(directory, STATE, json.dumps(self.trainer.own_state()).encode())


def restore_state(trainer: PPOWTrainer, checkpoint: Path) -> None:
    """Give a new trainer what `CheckpointState` wrote; the rest is up to `trainer.train`."""
    trainer.restore_own_state(json.loads((checkpoint / STATE).read_text(encoding="utf-8")))
