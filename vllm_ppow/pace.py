"""How fast the machine is now, beside when earlier step times were seen: other work, clock rates and heat change it.

Lengths that were timed while it was slow would look dear beside those timed while it was fast. A Kalman filter follows
its logarithm (ours): a random walk, with a jump where batch sizes come back that were away for long, meanwhile the
machine may have rested. Each octave of batch sizes has a pace of its own, so that errors of one do not wander into
another. Left out: what the step times are kept for (step_cost.py). Pure Python.
"""

from __future__ import annotations

# Variances of the logarithm: what it wanders in one step, and what it may jump by while an octave is away for so many
# steps or more; for fewer in proportion, since a load between two octaves goes to and fro.
DRIFT, JUMP, AWAY = 3e-6, 0.02, 64
# One step's deviation counts for at most this much: pauses are no pace.
_MOST = 0.3


class Pace:
    """Log of the time a step takes now over the time it took when what is remembered was seen, by octave."""

    def __init__(self) -> None:
        self._states: dict[int, tuple[float, float]] = {}  # mean and variance
        self._seen: dict[int, int] = {}  # by octave, its last step
        self._now = 0

    def of(self, octave: int) -> float:
        """The estimate; 0 until anything was compared."""
        return self._states.get(octave, (0.0, 0.0))[0]

    def advance(self, octave: int) -> None:
        """A step of that octave was made."""
        self._now += 1
        away = self._now - 1 - self._seen.get(octave, -AWAY)
        self._seen[octave] = self._now
        pace, variance = self._states.get(octave, (0.0, 0.0))
        self._states[octave] = (pace, variance + DRIFT + JUMP * min(1.0, away / AWAY))

    def correct(self, octave: int, deviation: float, noise: float) -> None:
        """The step took exp(deviation) times what was expected of it at this pace.

        Args:
            noise: standard deviation of one step's logarithm.
        """
        pace, variance = self._states[octave]
        gain = variance / (variance + noise**2)
        self._states[octave] = (pace + gain * max(-_MOST, min(deviation, _MOST)), (1.0 - gain) * variance)
