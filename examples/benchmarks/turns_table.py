"""Results of turns under load: compared over rotations, judged by the aims, shown. Left out: measuring.

What an arm makes is its tokens over its seconds, of all rotations together but the first ones. Arms are neighbours in
every rotation, so ratios come with intervals from resampling whole runs of rotations for all arms alike (moving blocks,
Künsch 1989: rotations beside each other are alike, as the machine's pace wanders more slowly than they pass).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sweep_table import ADAPTIVE, MIN_OF_BEST, MIN_OF_NONE, NONE, Series, draw, is_fixed, order_arms

BLOCK = 4  # rotations that are drawn together
LEAST_ROTATIONS = 4 * BLOCK
_DRAWS = 4000
PERCENT = (2.5, 97.5)
MET, MISSED, UNRESOLVED = "met", "MISSED", "not resolved"

Counts = np.ndarray  # [2, rotations]: tokens and seconds of one arm


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Tokens per second of one arm over another's, with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} … {self.high:.3f})"

    def against(self, aim: float) -> str:
        """Whether the ratio is at least so much."""
        return MET if self.low >= aim else MISSED if self.high < aim else UNRESOLVED


@dataclasses.dataclass(frozen=True)
class Level:
    """What was found at one concurrency.

    Attributes:
        speed: no speculation's output tokens per second of its turns.
        over_none: every other arm's ratio over no speculation, in the order of the lengths.
        best: the fixed K that made most.
        over_every: ours over every fixed K. Over the best of several noisy ones it errs against ours.
        over_chosen: ours in each half of the rotations over the fixed K that was best in the other half: what a user
            who measured before would see.
        of_itself: no speculation in the odd rotations over the even ones: what chance does to half of them.
        mean_length: mean drafted tokens of ours, or of their maximum where ours trims them.
        rotations: that were judged.
        ours: the arm that is judged.
    """

    concurrency: int
    speed: float
    over_none: dict[str, Ratio]
    best: str
    over_every: dict[str, Ratio]
    over_chosen: float
    of_itself: float
    mean_length: float
    rotations: int
    ours: str = ADAPTIVE


def counts_of(line: dict[str, Any], warm_rotations: int) -> dict[str, Counts]:
    """Tokens and seconds of every arm in each rotation that is judged."""
    kept = [turn for turn in line["turns"] if turn["rotation"] >= warm_rotations]
    found: dict[str, Counts] = {}
    for arm in order_arms({turn["arm"] for turn in kept}):
        mine = sorted((turn for turn in kept if turn["arm"] == arm), key=lambda turn: turn["rotation"])
        found[arm] = np.array([[t["tokens"] for t in mine], [t["seconds"] for t in mine]], dtype=float)
    return found


def _speed(counts: Counts) -> np.ndarray:
    """Tokens per second over the last axis."""
    sums = counts.sum(axis=-1)
    return sums[0] / sums[1]


def drawn_rotations(number: int, seed: int = 0) -> np.ndarray:
    """[draws, rotations]: rotations drawn in blocks that go round, one block fewer than there are.

    As many as there are would give intervals that are too narrow with so few blocks, as n in place of n - 1 does.
    """
    draw = np.random.default_rng(seed)
    starts = draw.integers(0, number, size=(_DRAWS, -(-number // BLOCK) - 1))
    return (starts[..., None] + np.arange(BLOCK)).reshape(_DRAWS, -1) % number


def ratio(of: Counts, over: Counts, seed: int = 0) -> Ratio:
    """Speeds' ratio, and its interval from blocks of rotations, drawn for both arms alike."""
    low, high = np.percentile(_drawn(of, over, seed), PERCENT)
    return Ratio(float(_speed(of) / _speed(over)), float(low), float(high))


def _drawn(of: Counts, over: Counts, seed: int) -> np.ndarray:
    rows = drawn_rotations(of.shape[1], seed)
    return _speed(of[:, rows]) / _speed(over[:, rows])


def together(levels: Sequence[dict[str, Counts]], ours: str = ADAPTIVE) -> dict[str, Ratio]:
    """Ours over every fixed K that all levels have, and over the adaptive window where ours is something else.

    Geometric mean over the levels, which are drawn independently.
    """
    found = {}
    for arm in order_arms(set.intersection(*map(set, levels))):
        if is_fixed(arm) or (arm == ADAPTIVE and ours != ADAPTIVE):
            logs = [np.log(_speed(level[ours]) / _speed(level[arm])) for level in levels]
            drawn = [np.log(_drawn(level[ours], level[arm], seed)) for seed, level in enumerate(levels)]
            low, high = np.exp(np.percentile(np.mean(drawn, axis=0), PERCENT))
            found[arm] = Ratio(float(np.exp(np.mean(logs))), float(low), float(high))
    return found


def _over_chosen(counts: dict[str, Counts], ours: str) -> float:
    """Ours over the fixed K that was best in the other half, geometric mean of both halves."""
    fixed = [arm for arm in counts if is_fixed(arm)]
    half = counts[ours].shape[1] // 2
    halves = [slice(0, half), slice(half, None)]
    found = []
    for here, there in (halves, reversed(halves)):
        chosen = max(fixed, key=lambda arm: _speed(counts[arm][:, there]))
        found.append(_speed(counts[ours][:, here]) / _speed(counts[chosen][:, here]))
    return float(np.sqrt(found[0] * found[1]))


def judge(line: dict[str, Any], warm_rotations: int, arm: str = ADAPTIVE) -> Level:
    """What one line of results says of an arm of ours."""
    counts = counts_of(line, warm_rotations)
    none, ours = counts[NONE], counts[arm]
    fixed = [arm for arm in counts if is_fixed(arm)]
    drafts = {int(length): number for length, number in line["drafts_by_length"][arm].items()}
    drafted = sum(length * number for length, number in drafts.items())
    return Level(
        concurrency=line["concurrency"],
        speed=float(_speed(none)),
        over_none={other: ratio(counts[other], none) for other in counts if other != NONE},
        best=max(fixed, key=lambda length: _speed(counts[length])),
        over_every={length: ratio(ours, counts[length]) for length in fixed},
        over_chosen=_over_chosen(counts, arm),
        of_itself=float(_speed(none[:, 1::2]) / _speed(none[:, ::2])),
        mean_length=drafted / max(1, sum(drafts.values())),
        rotations=ours.shape[1],
        ours=arm,
    )


def aims(levels: Sequence[Level]) -> list[tuple[str, str]]:
    """The three aims, each with its verdict and by what: the level whose interval is lowest speaks for an aim."""
    of_best = min(levels, key=lambda level: level.over_every[level.best].high)
    of_none = min(levels, key=lambda level: level.over_none[level.ours].high)
    verdicts = [
        (
            _worst(level.over_every[level.best].against(MIN_OF_BEST) for level in levels),
            f"at every concurrency at least {MIN_OF_BEST:.0%} of the best fixed K: least is "
            f"{of_best.over_every[of_best.best]} at concurrency {of_best.concurrency} (best there {of_best.best})",
        ),
        (
            _worst(level.over_none[level.ours].against(MIN_OF_NONE) for level in levels),
            f"never below {MIN_OF_NONE:.0%} of no speculation: least is {of_none.over_none[of_none.ours]} at "
            f"concurrency {of_none.concurrency}",
        ),
    ]
    better = [level for level in levels if all(found.low > 1 for found in level.over_every.values())]
    where = f"at concurrency {', '.join(str(level.concurrency) for level in better)}" if better else "nowhere"
    possible = any(all(found.high > 1 for found in level.over_every.values()) for level in levels)
    verdict = MET if better else UNRESOLVED if possible else MISSED
    return [*verdicts, (verdict, f"better than every fixed K, interval clear of 1: {where}")]


def _worst(verdicts: Any) -> str:
    found = set(verdicts)
    return MISSED if MISSED in found else UNRESOLVED if UNRESOLVED in found else MET


def make_table(levels: Sequence[Level]) -> str:
    """Markdown: every arm over no speculation, ours over the best fixed K."""
    arms = order_arms({arm for level in levels for arm in level.over_none})
    head = ["concurrency", "none, tok/s", *(f"{arm} ÷ none" for arm in arms)]
    head += ["best fixed", "ours ÷ best", "÷ best of the other half", "drafted", "odd ÷ even", "rotations"]
    rows = [head, ["---"] * len(head)]
    for level in levels:
        row = [str(level.concurrency), f"{level.speed:.0f}"]
        row += [str(level.over_none[arm]) if arm in level.over_none else "–" for arm in arms]
        row += [level.best, str(level.over_every[level.best]), f"{level.over_chosen:.3f}"]
        row += [f"{level.mean_length:.1f}", f"{level.of_itself:.3f}", str(level.rotations)]
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def write_plot(path: Path, levels: Sequence[Level], temperature: float) -> None:
    """Output tokens per second over no speculation by concurrency; the kind follows the suffix."""
    series: Series = {}
    for arm in order_arms({arm for level in levels for arm in level.over_none}):
        found = [(level.concurrency, level.over_none[arm]) for level in levels if arm in level.over_none]
        series[arm] = [(concurrency, r.value, r.low, r.high) for concurrency, r in found]
    draw(path, {f"temperature {temperature:g}": series})
