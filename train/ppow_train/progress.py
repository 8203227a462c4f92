"""Progress of training for a person at a terminal: one bar, with what the windows earn. Left out: logging backends."""

from __future__ import annotations

import logging
from typing import Any

import datasets
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerState
from transformers.utils import logging as transformers_logging


def quiet_libraries() -> None:
    """Turn off the bars and hints that libraries print for every file they touch; their warnings stay."""
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    # A hint that the tokenizer's pad token was written into the model's config, at every start.
    logging.getLogger("transformers.trainer_utils").setLevel(logging.ERROR)


def make_progress(console: Console | None = None, is_shown: bool = True) -> Progress:
    """The bar that every long command shows, on standard error unless a console is given."""
    quiet_libraries()
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console or Console(stderr=True),
        disable=not is_shown,
    )


class ProgressBar(TrainerCallback):
    """Shows updates done and the newest figures."""

    def __init__(self, description: str, progress: Progress) -> None:
        self.progress = progress
        self.description = description
        self.task: TaskID | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Start the bar."""
        self.task = self.progress.add_task(self.description, total=state.max_steps, note="")

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Advance it."""
        if self.task is not None:
            self.progress.update(self.task, completed=state.global_step)

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Show the newest loss and, when windows are drafted, accepted tokens per window."""
        logs = logs or {}
        if "loss" not in logs or self.task is None:
            return
        note = f"loss {logs['loss']:.4f}"
        if "windows/num_accepted_tokens" in logs:
            note += f", {logs['windows/num_accepted_tokens']:.2f} accepted per window"
        if "held_out/accepted_per_draft" in logs:
            note += f", {logs['held_out/accepted_per_draft']:.3f} accepted per draft on held-out prompts"
        self.progress.update(self.task, note=note)
