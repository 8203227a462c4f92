"""Seconds of an update, two arms side by side: rounds take turns, so that what else the machine does falls on both.

Left out: what follows from the ratios (costs.py).
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ppow_train.training import restored
from ppow_train.update_clock import UpdateClock

if TYPE_CHECKING:
    from ppow_train.study.run import CellBench

ROUNDS = 3
UPDATES = 6  # of a round; the first warms up and is not counted


def cost_ratios(bench: CellBench, arm: str, reference: str) -> list[float]:
    """Median time of an arm's update over the reference's, one ratio for each round."""
    return [round(_seconds(bench, arm) / _seconds(bench, reference), 3) for _ in range(ROUNDS)]


def _seconds(bench: CellBench, arm: str) -> float:
    with tempfile.TemporaryDirectory() as scratch, restored(bench.pair.drafter.model):
        # Adaptive windows from the start, as most of a run has them.
        trainer = bench.trainer(bench.config(arm, Path(scratch), max_steps=UPDATES, adaptive_after=0.0))
        clock = UpdateClock()
        trainer.add_callback(clock)
        trainer.train()
    return statistics.median(clock.seconds[1:])
