"""What a change of draft length costs beyond its steps: measured, so that no length is changed for less than that.

An engine may pause where the shape of a step changes: other graphs, buffers that are made anew, a pipeline that drains.
Step times at a steady length (step_cost.py) tell nothing of it. What is counted here is how much longer than expected
the step of a change took, with the steps right before and after it (under asynchronous scheduling a pause shows in a
neighbour), less what steps elsewhere take beyond what is expected of them. It is forgotten within thousands of steps,
so that a length which was held for long is changed again to see (ours). Left out: what becomes of it (window.py). Pure
Python.
"""

from __future__ import annotations

# Steps after which what was seen has lost half its weight.
HALF_LIFE = 2000
# Changes without cost that are taken to have been seen before any.
PRIOR = 2.0
# One step counts for at most so many: a pause of the machine is not the changes' doing.
MOST = 50.0
# Below so many steps a change is free: noise.
LEAST = 0.5
_KEEP = 0.5 ** (1.0 / HALF_LIFE)
_USUAL_RATE = 0.02


class ChangeCost:
    """Mean cost of a change, in steps."""

    def __init__(self) -> None:
        self._lost = self._changes = 0.0
        self._usual = 0.0  # what steps far from any change take beyond what is expected
        self._before: float | None = None  # of the step before, if it may be the neighbour of a change
        self._after_change = False

    @property
    def steps(self) -> float:
        """What a change costs, in steps of the usual time; 0 where it is not worth a thought."""
        cost = self._lost / (self._changes + PRIOR)
        return cost if cost >= LEAST else 0.0

    def observe(self, excess: float, changed: bool) -> None:
        """A step that only decoded was made.

        Args:
            excess: what it took beyond what is expected of it, over what is expected (>= -1).
            changed: whether it drafted another number of tokens than the step before it.
        """
        excess = min(excess, MOST)
        self._lost *= _KEEP
        self._changes *= _KEEP
        if changed:
            self._changes += 1.0
            self._lost += excess - self._usual
            if self._before is not None:
                self._lost += self._before - self._usual
        elif self._after_change:
            self._lost += excess - self._usual
        elif self._before is not None:
            self._usual += _USUAL_RATE * (self._before - self._usual)
        self._before = None if changed or self._after_change else excess
        self._after_change = changed
