"""A price by octave of batch sizes: learned there, elsewhere by what was said of it beforehand. Pure Python."""

from __future__ import annotations

import functools
from collections.abc import Callable

from vllm_ppow.octave import octave


class OctavePrices:
    """Prices that were learned, and a prior for the others.

    Args:
        prior: the price by batch size beforehand; None if there is none.
    """

    def __init__(self, prior: Callable[[int], float] | None = None) -> None:
        # Asked for at every step; a profile's takes some sixty microseconds.
        self.prior = functools.lru_cache(maxsize=1024)(prior) if prior else None
        self._learned: dict[int, float] = {}

    def learn(self, batch: int, price: float) -> None:
        """The price in the octave of a batch size, in place of what was known of it."""
        self._learned[octave(batch)] = price

    def at(self, batch: int) -> float | None:
        """The price at a batch size: what was learned in its octave, or in the nearest one; None if nothing is known.

        With a prior it is known from the start. Between octaves the prior's shape is kept: its price here, by the
        factor that was learned there.
        """
        prior = self.prior(batch) if self.prior else None
        if not self._learned:
            return prior
        key = octave(batch)
        nearest = min(self._learned, key=lambda known: (abs(known - key), known))
        price = self._learned[nearest]
        if nearest == key or not self.prior or not prior:
            return price
        before = self.prior(round(2.0**nearest))
        return prior * price / before if before else price
