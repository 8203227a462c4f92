"""Seconds of one more pass of the drafter, by batch size: the median of the last ones, until then a cost profile's.

A pass is timed at every drafted token, so this is kept short. Left out: the first pass of a draft, which is over all
tokens just verified and is made whatever is decided, and what a pass is worth (request_window.py). Pure Python.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from statistics import median

from vllm_ppow.octave import octave
from vllm_ppow.octave_prices import OctavePrices
from vllm_ppow.step_cells import CELL_MEMORY
from vllm_ppow.step_cost import IDENTIFIED

# Passes in an octave between two medians.
_EVERY = 16


class PassPrice:
    """Seconds of a drafter's pass.

    Args:
        prior: by batch size beforehand; None to learn it from the clock alone.
    """

    def __init__(self, prior: Callable[[int], float] | None = None) -> None:
        self._prices = OctavePrices(prior)
        self._passes: dict[int, deque[float]] = {}
        self.observations: Counter[int] = Counter()  # by octave

    def observe(self, batch: int, seconds: float) -> None:
        """A pass over one token of each of `batch` requests took that long."""
        key = octave(batch)
        self.observations[key] += 1
        seen = self.observations[key]
        passes = self._passes.setdefault(key, deque(maxlen=CELL_MEMORY))
        passes.append(seconds)
        if seen == IDENTIFIED or (seen > IDENTIFIED and seen % _EVERY == 0):
            self._prices.learn(batch, median(passes))

    def seconds(self, batch: int) -> float:
        """Of a pass at a batch size, as OctavePrices.at has it; 0 while nothing is known."""
        return self._prices.at(batch) or 0.0
