"""How the windows of an update are divided: processes × gradient accumulation × windows of one forward and backward.

Arithmetic on TRL's own fields. Left out: which windows those are (trainer.py); what they take (memory.py).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from accelerate.utils import gather_object

from ppow_train.errors import UserError
from ppow_train.machine import available_bytes, processes_here
from ppow_train.memory import estimate_memory, windows_that_fit

if TYPE_CHECKING:
    from ppow_train.config import PPOWConfig
    from ppow_train.rollout import WindowRunner
    from ppow_train.selection import Judge


def choose_windows_per_forward(runner: WindowRunner, config: PPOWConfig, judges: Sequence[Judge] = ()) -> int:
    """Windows that one process may hold in one forward and backward: as configured, or as many as fit now (>= 1).

    Every process of a run calls it, and all get what fits in each of them.

    Args:
        judges: on the run's held-out trajectories.

    Raises:
        UserError: not even one window fits.
    """
    if config.windows_per_forward:
        return config.windows_per_forward
    device = runner.target.model.device
    available = available_bytes(device) / processes_here(device)
    share = config.windows_per_step // num_processes()
    fitting = windows_that_fit(estimate_memory(runner, config, judges), available, share)
    return min(gather_object([fitting]))


def divide_step(config: PPOWConfig, windows_per_forward: int) -> None:
    """Set TRL's fields so that an update has `windows_per_step` windows, never more than the bound in one forward.

    Every forward has equally many, so the mean of their means is the mean over the update's windows.

    Raises:
        UserError: processes cannot share the windows equally, or not whole groups where those must stay together.
    """
    processes = num_processes()
    share, rest = divmod(config.windows_per_step, processes)
    if rest or not share:
        raise UserError(
            f"windows_per_step must be a multiple of the {processes} processes, got {config.windows_per_step}."
        )
    group = config.num_generations
    if config.is_rollout and config.ppow_credit == "acceptance" and share % group:
        raise UserError(  # credit.py compares a group's windows where they were drafted
            f"windows_per_step must be a multiple of {processes * group} with ppow_credit acceptance "
            f"({processes} processes × num_generations {group}), got {config.windows_per_step}."
        )
    # A forward of one window always fits, so there is a divisor.
    forwards = next(n for n in range(1, share + 1) if share % n == 0 and share // n <= windows_per_forward)
    config.per_device_train_batch_size = share // forwards
    config.gradient_accumulation_steps = forwards
    config.steps_per_generation = forwards  # one rollout per update: old and current policy agree


def num_processes() -> int:
    """Processes that train together, by what the launcher told this one; asked before accelerate is set up."""
    return int(os.environ.get("WORLD_SIZE", "1"))
