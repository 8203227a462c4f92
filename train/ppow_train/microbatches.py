"""How the windows of an update are divided: processes × gradient accumulation × windows of one forward and backward.

Plain arithmetic on TRL's own fields. Left out: which windows those are (trainer.py).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ppow_train.errors import UserError

if TYPE_CHECKING:
    from ppow_train.config import PPOWConfig


def choose_windows_per_forward(config: PPOWConfig) -> int:
    """Windows that one process may hold in one forward and backward: as configured, or all (>= 1)."""
    return config.windows_per_forward or config.windows_per_step


def divide_step(config: PPOWConfig, windows_per_forward: int) -> None:
    """Set TRL's fields so that an update has `windows_per_step` windows, never more than the bound in one forward.

    Every forward has equally many, so the mean of their means is the mean over the update's windows.

    Raises:
        UserError: processes cannot share the windows equally.
    """
    processes = num_processes()
    share, rest = divmod(config.windows_per_step, processes)
    if rest or not share:
        raise UserError(
            f"windows_per_step must be a multiple of the {processes} processes, got {config.windows_per_step}."
        )
    # A forward of one window always fits, so there is a divisor.
    forwards = next(n for n in range(1, share + 1) if share % n == 0 and share // n <= windows_per_forward)
    config.per_device_train_batch_size = share // forwards
    config.gradient_accumulation_steps = forwards
    config.steps_per_generation = forwards  # one rollout per update: old and current policy agree


def num_processes() -> int:
    """Processes that train together, by what the launcher told this one; asked before accelerate is set up."""
    return int(os.environ.get("WORLD_SIZE", "1"))
