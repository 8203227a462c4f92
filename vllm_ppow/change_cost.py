"""What a change of draft length costs beyond its steps: measured, so that no length is changed for less than that.

An engine may pause where the shape of a step changes: other graphs, buffers that are made anew, a pipeline that drains.
Step times at a steady length (step_cost.py) tell nothing of it. What is counted here is how much longer than expected
the step of a change took, with the steps right before and after it (under asynchronous scheduling a pause shows in a
neighbour), less what steps elsewhere take beyond what is expected of them. Of all that the median counts: a machine has
pauses of its own, and where one fell on a change a mean would keep the length for thousands of steps, in which nothing
new is learned. It is forgotten within thousands of steps, so that a length which was held for long is changed again to
see (ours). Left out: what becomes of it (window.py). Pure Python.
"""

from __future__ import annotations

import statistics
from collections import deque

# Steps after which what was seen has lost half its weight.
HALF_LIFE = 2000
# Changes without cost that are taken to have been seen before any.
PRIOR = 4.0
# Changes, and steps far from any, that are remembered.
CHANGES, USUAL = 31, 63
# Below so many steps a change is free: noise.
LEAST = 0.5
_REFRESH_EVERY = 64  # steps, for what is forgotten meanwhile


class ChangeCost:
    """Median cost of a change, in steps."""

    def __init__(self) -> None:
        self._cost = 0.0
        self._now = 0
        self._lost: deque[tuple[int, float]] = deque(maxlen=CHANGES)  # when, and how many steps
        # What steps far from any change take beyond what is expected.
        self._usual: deque[float] = deque(maxlen=USUAL)
        self._before: float | None = None  # of the step before, if it may be the neighbour of a change
        self._after_change = False

    @property
    def steps(self) -> float:
        """What a change costs, in steps of the usual time; 0 where it is not worth a thought."""
        return self._cost if self._cost >= LEAST else 0.0

    def observe(self, excess: float, changed: bool) -> None:
        """A step that only decoded was made.

        Args:
            excess: what it took beyond what is expected of it, over what is expected (>= -1).
            changed: whether it drafted another number of tokens than the step before it.
        """
        self._now += 1
        if changed:
            near = [excess] if self._before is None else [self._before, excess]
            self._lost.append((self._now, self._beyond_usual(near)))
        elif self._after_change:
            when, lost = self._lost.pop()
            self._lost.append((when, lost + self._beyond_usual([excess])))
        elif self._before is not None:
            self._usual.append(self._before)
        if changed or self._after_change or self._now % _REFRESH_EVERY == 0:
            self._cost = self._median()
        self._before = None if changed or self._after_change else excess
        self._after_change = changed

    def _beyond_usual(self, excesses: list[float]) -> float:
        usual = statistics.median(self._usual) if self._usual else 0.0
        return sum(excesses) - len(excesses) * usual

    def _median(self) -> float:
        """Of what changes lost, by how long ago they were, and of `PRIOR` that lost nothing."""
        weighed = [(lost, 0.5 ** ((self._now - when) / HALF_LIFE)) for when, lost in self._lost]
        weighed.append((0.0, PRIOR))
        half = sum(weight for _, weight in weighed) / 2
        below = 0.0
        for lost, weight in sorted(weighed):
            below += weight
            if below >= half:
                return lost
        raise AssertionError("weights are positive")
