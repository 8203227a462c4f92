"""Seconds of every update, for estimates and comparisons. Left out: what follows from them."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback


class UpdateClock(TrainerCallback):
    """Times updates.

    Args:
        stop_after: updates after which training stops; all are done without it.

    Attributes:
        seconds: of each update so far; the first one warms up.
    """

    def __init__(self, stop_after: int | None = None) -> None:
        self.seconds: list[float] = []
        self._begin, self._stop_after = 0.0, stop_after

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start."""
        self._begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock, and training when it is time."""
        self.seconds.append(time.perf_counter() - self._begin)
        if self._stop_after is not None:
            control.should_training_stop = len(self.seconds) >= self._stop_after
