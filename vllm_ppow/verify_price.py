"""What one more token adds to the seconds of a target step, by batch size: learned from the clock while serving.

A step of n tokens takes about overhead + n · price. The price is the slope of a line through medians of step times, of
cells of similar n within one octave of batch sizes; a cell counts once it has been seen a few times, since a single
slow step (a first use, a pause) beside many of another length would tilt the line, and a price too high ends the very
drafts that could correct it. It is at most a step's time over its tokens, as overhead is not negative. A cost profile
has a price beforehand: the line is drawn to it as observations of that slope would do it, so that the first drafts are
trimmed rightly, and steps that are all of one length change nothing. Left out: the drafter's passes, and what a token
is worth (request_window.py). Pure Python, microseconds.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from statistics import median

from vllm_ppow.octave import octave
from vllm_ppow.octave_prices import OctavePrices
from vllm_ppow.step_cells import CELL_MEMORY, FORGOTTEN, HALF_LIFE
from vllm_ppow.step_cost import IDENTIFIED

# Standard deviations: of a step around its cell's median over that median, and of a profile's price over that price.
_NOISE, _PRIOR_ERROR = 0.1, 0.2
# Steps of an octave between two lines that are drawn through its cells; sooner where a cell has just become known.
_FIT_EVERY = 8


class _Cell:
    """Step times at similar numbers of tokens.

    Attributes:
        steps: (tokens, seconds) of the last of them.
        tokens, seconds: their mean and their median.
        seen_at: number of the last one.
    """

    def __init__(self) -> None:
        self.steps: deque[tuple[int, float]] = deque(maxlen=CELL_MEMORY)
        self.tokens = self.seconds = 0.0
        self.seen_at = 0

    def add(self, num_tokens: int, seconds: float, now: int) -> None:
        self.steps.append((num_tokens, seconds))
        self.tokens = sum(tokens for tokens, _ in self.steps) / len(self.steps)
        self.seconds = median(seconds for _, seconds in self.steps)
        self.seen_at = now


class VerifyPrice:
    """Marginal seconds of a token in verification.

    Args:
        prior: the price by batch size beforehand; None to learn it from the clock alone.
    """

    def __init__(self, prior: Callable[[int], float] | None = None) -> None:
        self._prices = OctavePrices(prior)
        self._octaves: dict[int, dict[int, _Cell]] = {}
        self._fit_at: dict[int, int] = {}  # by octave, the observation that the line is drawn anew at
        self.observations = 0

    def observe(self, batch: int, num_tokens: int, seconds: float) -> None:
        """A step of `batch` requests verified that many tokens, bonus tokens included, drafting aside."""
        self.observations += 1
        key = octave(batch)
        cell = self._octaves.setdefault(key, {}).setdefault(_bucket(num_tokens), _Cell())
        cell.add(num_tokens, seconds, self.observations)
        if len(cell.steps) > IDENTIFIED and self.observations < self._fit_at.get(key, 0):
            return
        self._fit_at[key] = self.observations + _FIT_EVERY
        prior = self._prices.prior(batch) if self._prices.prior else 0.0
        price = self._slope(key, prior)
        if price is not None:
            self._prices.learn(batch, price)

    def seconds_per_token(self, batch: int) -> float | None:
        """Seconds that one more token adds at a batch size; None while nothing is known (OctavePrices.at)."""
        return self._prices.at(batch)

    def _weight(self, cell: _Cell) -> float:
        """Observations that a cell is worth now."""
        return len(cell.steps) * 0.5 ** ((self.observations - cell.seen_at) / HALF_LIFE)

    def _slope(self, key: int, prior: float) -> float | None:
        """Weighted least squares through the medians of the cells that are known, drawn to the prior (> 0).

        None without a prior where there are fewer than two such cells.
        """
        known = [cell for cell in self._octaves[key].values() if len(cell.steps) >= IDENTIFIED]
        # One that was forgotten weighs nothing, in the end exactly nothing.
        weighted = [(cell, weight) for cell in known if (weight := self._weight(cell)) >= FORGOTTEN]
        if len(weighted) < (1 if prior else 2):
            return None
        cells, weights = [cell for cell, _ in weighted], [weight for _, weight in weighted]
        tokens, seconds = [c.tokens for c in cells], [c.seconds for c in cells]
        total = sum(weights)
        mean = sum(w * n for w, n in zip(weights, tokens, strict=True)) / total
        middle = sum(w * s for w, s in zip(weights, seconds, strict=True)) / total
        spread = sum(w * (n - mean) ** 2 for w, n in zip(weights, tokens, strict=True))
        tilt = sum(w * (n - mean) * (s - middle) for w, n, s in zip(weights, tokens, seconds, strict=True))
        if prior:
            # what a slope of standard deviation _PRIOR_ERROR · prior is worth where a median's is √(π/2) · noise
            worth = 0.5 * math.pi * (_NOISE * middle / (_PRIOR_ERROR * prior)) ** 2
            spread, tilt = spread + worth, tilt + worth * prior
        if spread <= 0:
            return None
        return min(max(0.0, tilt / spread), middle / mean)


def _bucket(num_tokens: int) -> int:
    """Numbers of tokens that share a cell: each its own up to 16, then eight to the octave."""
    return num_tokens if num_tokens <= 16 else 16 + round(8 * math.log2(num_tokens / 16))
