"""What a run will take, before it is started: memory by the model of memory.py, time by a few updates of its own.

Evaluations on held-out prompts are timed as well: every ten updates they can take as long as these. Left out, and told
so: `NOT_COUNTED`.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress

from ppow_train.config import PPOWConfig
from ppow_train.data import keep_long_enough
from ppow_train.generation import load_tokenizer
from ppow_train.machine import available_bytes
from ppow_train.memory import estimate_memory
from ppow_train.microbatches import choose_windows_per_forward, divide_step
from ppow_train.pair import Pair
from ppow_train.selection import Judge
from ppow_train.training import make_judges, make_runner, open_run_cache, quiet_trainer, restored
from ppow_train.types import Trajectories
from ppow_train.update_clock import UpdateClock

_TIMED_UPDATES = 3  # after one that also warms up
NOT_COUNTED = (
    "loading the models",
    "continuing the prompts (done by now, and kept for the run)",
    "the pass that keeps the target's states",
    "parity with vLLM",
)


@dataclasses.dataclass(frozen=True)
class RunEstimate:
    """What `ppow train --estimate` prints.

    Attributes:
        windows_per_forward: windows of one forward and backward.
        update_bytes: of such an update, at its peak, weights not counted.
        available_bytes: what there is.
        seconds_per_update: median of a few updates, adaptive windows included if the run has any.
        updates: of the run.
        evaluation_seconds: of all evaluations on held-out prompts.
        evaluations: of the run, before and after it and every `eval_steps` updates.
        may_stop_early: whether both counts are the most that there can be.
    """

    windows_per_forward: int
    update_bytes: int
    available_bytes: int
    seconds_per_update: float
    updates: int
    evaluation_seconds: float = 0.0
    evaluations: int = 0
    may_stop_early: bool = False

    @property
    def seconds(self) -> float:
        """Of all updates and evaluations."""
        return self.seconds_per_update * self.updates + self.evaluation_seconds

    def as_json(self) -> dict[str, Any]:
        """All of it, plain."""
        return dataclasses.asdict(self) | {"seconds": self.seconds, "not_counted": list(NOT_COUNTED)}

    def __str__(self) -> str:
        peak, available = (f"{count / 2**20:,.0f} MiB" for count in (self.update_bytes, self.available_bytes))
        updating = self.seconds_per_update * self.updates
        evaluating = (
            f", {self.evaluation_seconds / 60:.1f} for {self.evaluations} evaluations on held-out prompts, "
            f"{self.seconds / 60:.1f} in all"
            if self.evaluations
            else ""
        )
        early = ", or less where it stops early" if self.may_stop_early else ""
        return (
            f"{self.windows_per_forward} windows per forward, about {peak} at the peak of an update ({available} "
            f"available); {self.seconds_per_update:.2f} s per update, about {updating / 60:.1f} minutes for "
            f"{self.updates}{evaluating}{early}. Not counted: {', '.join(NOT_COUNTED)}."
        )


def estimate_run(
    pair: Pair,
    trajectories: Trajectories,
    config: PPOWConfig,
    scratch: Path,
    held_out: Trajectories | None = None,
    *,
    cache: Path | None = None,
    progress: Progress,
) -> RunEstimate:
    """Estimate a run, from updates and evaluations as it makes them; the drafter is given back as it was.

    Nothing is written but a log in `scratch`, and with `target_cache` "disk" what the run will find under `cache`.

    Args:
        cache: as in `training.train_adapter`, and
        held_out: as in `training.train_adapter`.

    Raises:
        UserError: it does not fit in memory, or the held-out prompts are too few or too short.
    """
    from ppow_train.trainer import PPOWTrainer

    trajectories = keep_long_enough(trajectories, config.num_speculative_tokens)
    runner = make_runner(pair, trajectories, config, drafts=config.is_rollout)
    config = copy.copy(config)
    selecting, reporting = make_judges(pair, held_out, config)
    judges = [judge for judge in (selecting, reporting) if judge]
    divide_step(config, choose_windows_per_forward(runner, config, judges))
    windows = config.per_device_train_batch_size
    memory = estimate_memory(runner, config, judges).of(windows)
    available = available_bytes(pair.target.model.device)
    watch = UpdateClock(stop_after=1 + _TIMED_UPDATES)
    config.adaptive_after, config.save_strategy, config.output_dir = 0.0, "no", str(scratch)
    with restored(pair.drafter.model):
        runner.cache = open_run_cache(pair, runner.trajectories, config, cache, progress)
        trainer = PPOWTrainer(runner, config, load_tokenizer(pair.target.directory), callbacks=[watch])
        quiet_trainer(trainer)
        trainer.train()
        counts = [_calls(config, judge is selecting) for judge in judges]
        evaluating = _evaluation_seconds(judges, counts)
    return RunEstimate(
        windows,
        int(memory),
        available,
        statistics.median(watch.seconds[1:] or watch.seconds),
        config.max_steps,
        evaluating,
        sum(counts),
        config.early_stop_patience is not None,
    )


def _calls(config: PPOWConfig, selects: bool) -> int:
    """How often a run that does not stop early asks a judge: selection.py, train_adapter."""
    if not selects or config.eval_steps is None:
        return 2  # before and after
    return 1 + math.ceil(config.max_steps / config.eval_steps)


def _evaluation_seconds(judges: Sequence[Judge], counts: Sequence[int]) -> float:
    """Seconds of so many calls of each; the first computes what of the target's states the others find kept."""
    seconds = 0.0
    for judge, count in zip(judges, counts, strict=True):
        first, further = _timed(judge), _timed(judge)
        seconds += first + (count - 1) * further
    for judge in judges:
        judge.forget()
    return seconds


def _timed(judge: Judge) -> float:
    begin = time.perf_counter()
    judge()  # its figures are on the CPU: all of it is done
    return time.perf_counter() - begin
