"""From the drafter's own probability of a token to the chance that the target accepts it, learned while serving.

A drafter's top-1 probability ranks its tokens well and says little by itself: a flat softmax can be right nine times of
ten. So acceptance is counted per bin of that probability and per position, forgotten slowly, shrunk towards all
positions together and made to grow with the probability. Left out: what is done with it (request_window.py).
"""

from __future__ import annotations

import itertools
from bisect import bisect_right

from vllm_ppow.isotonic import isotonic

EDGES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.995)
# Observations of a bin after which the older half of them is forgotten.
MEMORY = 400
# Observations that a bin's expectation weighs, from all positions and beforehand.
STRENGTH = 6.0
# Beforehand a bin is taken for what it says, but no worse than this: what is never verified is never learned.
OPTIMISM = 0.6
_REFIT_EVERY = 64
_UNSEEN = 0.1


class Calibration:
    """P(accepted | top-1 probability of the drafter, position, everything before it accepted).

    Args:
        maximum: positions, num_speculative_tokens.
    """

    def __init__(self, maximum: int) -> None:
        bounds = [0.0, *EDGES, 1.0]
        self._prior = [max(OPTIMISM, (low + high) / 2) for low, high in itertools.pairwise(bounds)]
        bins = len(self._prior)
        self._trials = [[0.0] * bins for _ in range(maximum)]
        self._accepted = [[0.0] * bins for _ in range(maximum)]
        self._tables = [list(self._prior) for _ in range(maximum)]
        self._unfitted = 0

    def observe(self, position: int, confidence: float, accepted: bool) -> None:
        """The target judged a token at a position (from 0) whose predecessors it had accepted."""
        index = bisect_right(EDGES, confidence)
        trials, accepts = self._trials[position], self._accepted[position]
        trials[index] += 1
        accepts[index] += accepted
        if trials[index] > MEMORY:
            trials[index] /= 2
            accepts[index] /= 2
        self._unfitted += 1
        if self._unfitted >= _REFIT_EVERY:
            self._fit()

    def acceptance(self, position: int, confidence: float) -> float:
        """Chance that the target accepts this token if it accepted those before it."""
        return self._tables[position][bisect_right(EDGES, confidence)]

    def _fit(self) -> None:
        self._unfitted = 0
        bins = range(len(self._prior))
        trials = [sum(row[i] for row in self._trials) for i in bins]
        accepted = [sum(row[i] for row in self._accepted) for i in bins]
        expected = [(accepted[i] + STRENGTH * self._prior[i]) / (trials[i] + STRENGTH) for i in bins]
        pooled = isotonic(expected, [n + _UNSEEN for n in trials])  # bins never seen follow those that were
        for position, (trials_at, accepted_at) in enumerate(zip(self._trials, self._accepted, strict=True)):
            weights = [trials_at[i] + STRENGTH for i in bins]
            means = [(accepted_at[i] + STRENGTH * pooled[i]) / weights[i] for i in bins]
            self._tables[position] = isotonic(means, weights)
