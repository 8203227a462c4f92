"""What a run will take, before it is started: memory by the model of memory.py, time by a few updates of its own.

Left out: generating trajectories, reading them once for the target's states that are kept, the parity gate.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
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
from ppow_train.training import make_judges, make_runner, open_run_cache, quiet_trainer, restored
from ppow_train.types import Trajectories
from ppow_train.update_clock import UpdateClock

_TIMED_UPDATES = 3  # after one that also warms up


@dataclasses.dataclass(frozen=True)
class RunEstimate:
    """What `ppow train --estimate` prints.

    Attributes:
        windows_per_forward: windows of one forward and backward.
        update_bytes: of such an update, at its peak, weights not counted.
        available_bytes: what there is.
        seconds_per_update: median of a few updates, adaptive windows included if the run has any.
        updates: of the run.
    """

    windows_per_forward: int
    update_bytes: int
    available_bytes: int
    seconds_per_update: float
    updates: int

    @property
    def seconds(self) -> float:
        """Of all updates."""
        return self.seconds_per_update * self.updates

    def as_json(self) -> dict[str, Any]:
        """All of it, plain."""
        return dataclasses.asdict(self) | {"seconds": self.seconds}

    def __str__(self) -> str:
        peak, available = (f"{count / 2**20:,.0f} MiB" for count in (self.update_bytes, self.available_bytes))
        return (
            f"{self.windows_per_forward} windows per forward, about {peak} at the peak of an update ({available} "
            f"available); {self.seconds_per_update:.2f} s per update, about {self.seconds / 60:.1f} minutes for "
            f"{self.updates}."
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
    """Estimate a run, from updates as it makes them; the drafter is given back as it was.

    Nothing is written but a log in `scratch`, and with `target_cache` "disk" what the run will find under `cache`.

    Args:
        cache: as in `training.train_adapter`, and
        held_out: as in `training.train_adapter`.

    Raises:
        UserError: it does not fit in memory, or the held-out prompts are too few or too short.
    """
    from ppow_train.trainer import PPOWTrainer

    runner = make_runner(pair, keep_long_enough(trajectories, config.num_speculative_tokens), config)
    config = copy.copy(config)
    judges = [judge for judge in make_judges(pair, held_out, config) if judge]
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
    return RunEstimate(
        windows,
        int(memory),
        available,
        statistics.median(watch.seconds[1:] or watch.seconds),
        config.max_steps,
    )
