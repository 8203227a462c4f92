"""Step times of several turns over all draft lengths, brought to one pace of the machine (ours).

A turn times every draft length within seconds, so that what slows the machine for longer slows all of them: what the
turns differ by as a whole is taken out before their steps are pooled. Without that, a draft length that was timed while
the machine did other things looks dear, and a server that trusts the profile drafts by accident. Left out: taking turns
(profiling.py).
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Protocol

_SWEEPS = 3  # of the median polish


class PassSeconds(Protocol):
    """What is needed of a runner's pass that was timed."""

    @property
    def target_seconds(self) -> float:
        """Of the target's part."""
        ...

    @property
    def draft_seconds(self) -> float:
        """Of the drafter's."""
        ...


@dataclasses.dataclass(frozen=True)
class Samples:
    """Seconds at one point of the grid, one figure per step.

    Attributes:
        target, draft: of the runner's passes.
        step: of the engine core's steps.
    """

    target: list[float]
    draft: list[float]
    step: list[float]

    @classmethod
    def of(cls, passes: Sequence[PassSeconds], steps: Sequence[float]) -> Samples:
        """What one burst measured."""
        return cls([one.target_seconds for one in passes], [one.draft_seconds for one in passes], list(steps))

    def times(self, factor: float) -> Samples:
        """The same at another pace."""
        return Samples(*([factor * one for one in each] for each in (self.target, self.draft, self.step)))

    def add(self, other: Samples, factor: float) -> None:
        """Add another's at another pace."""
        for own, more in ((self.target, other.target), (self.draft, other.draft), (self.step, other.step)):
            own.extend(factor * seconds for seconds in more)

    @property
    def medians(self) -> tuple[float, float, float]:
        """Target, draft, and the rest of the step (>= 0)."""
        rest = [s - t - d for s, t, d in zip(self.step, self.target, self.draft, strict=True)]
        target, draft, overhead = map(statistics.median, (self.target, self.draft, rest))
        return target, draft, max(0.0, overhead)

    @property
    def spread(self) -> float:
        """Half the range between the quartiles of the step, over its median."""
        if len(self.step) < 2:
            return 0.0
        low, middle, high = statistics.quantiles(self.step, n=4, method="inclusive")
        return (high - low) / 2 / middle


Turn = Mapping[int, Samples]  # draft length -> what its burst measured


def at_one_pace(turns: Sequence[Turn]) -> dict[int, Samples]:
    """The turns' samples by draft length, pooled at the pace of the median turn.

    Args:
        turns: bursts that measured nothing are left out of them.
    """
    turns = [turn for turn in turns if turn]
    slower = turn_levels(_logs(turns))
    pooled: dict[int, Samples] = {}
    for turn, level in zip(turns, slower, strict=True):
        for length, samples in turn.items():
            pooled.setdefault(length, Samples([], [], [])).add(samples, math.exp(-level))
    return {length: pooled[length] for length in sorted(pooled)}


def logs_at_one_pace(turns: Sequence[Turn]) -> list[list[float]]:
    """Log seconds of a step in each turn, brought to the pace of the median turn, of every draft length."""
    logs = _logs([turn for turn in turns if turn])
    found: dict[int, list[float]] = {}
    for turn, level in zip(logs, turn_levels(logs), strict=True):
        for length, log in turn.items():
            found.setdefault(length, []).append(log - level)
    return list(found.values())


def _logs(turns: Sequence[Turn]) -> list[dict[int, float]]:
    return [{n: math.log(statistics.median(s.step)) for n, s in turn.items()} for turn in turns]


def turn_levels(logs: Sequence[Mapping[int, float]]) -> list[float]:
    """By how much each turn was slower than the median turn, log scale: Tukey's median polish.

    Medians in both directions: a turn of which a part was disturbed counts by its other lengths, and a length by its
    other turns.

    Args:
        logs: log seconds by draft length, of each turn.
    """
    levels = [0.0] * len(logs)
    for _ in range(_SWEEPS):
        lengths = {length for turn in logs for length in turn}
        effects = {
            length: statistics.median(
                turn[length] - level for turn, level in zip(logs, levels, strict=True) if length in turn
            )
            for length in lengths
        }
        levels = [
            statistics.median(value - effects[length] for length, value in turn.items()) for turn in logs
        ]
        middle = statistics.median(levels) if levels else 0.0
        levels = [level - middle for level in levels]
    return levels
