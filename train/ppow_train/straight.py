"""Step times of a cost profile, brought towards straight lines over the draft length as far as noise moved them (ours).

One drafted token more is one pass of the drafter more and one token more to verify, so that at one batch size a step
takes about α + β·K seconds. How far steps truly lie off such lines (kernels like some sizes better than others) is what
is left of their distances when the noise of measuring is taken out, which turns tell (turns.py). Every point is then
moved towards its line by the share of its distance that is noise (empirical Bayes: Efron and Morris 1975): not at all
on a quiet machine, most of the way on a shared one. Left out: measuring (profiling.py).
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence

_NORMAL = 1.4826  # standard deviation over median absolute deviation
_MEDIAN = math.pi / 2  # variance of a median over that of a mean

Seconds = Mapping[int, float]  # by draft length


def noise(turns: Sequence[Sequence[float]]) -> float:
    """Standard deviation of one turn's log seconds at one point; 0 where no point had two turns.

    From differences of turns that follow one another, which are as wide for three turns as for a dozen.

    Args:
        turns: log seconds of each point's turns at one pace.
    """
    steps = [abs(after - before) for logs in turns for before, after in itertools.pairwise(logs)]
    return _NORMAL * statistics.median(steps) / math.sqrt(2) if steps else 0.0


def line(seconds: Seconds) -> dict[int, float]:
    """α + β·K, β >= 0, that is nearest in relative terms, by draft length K (ours: Σ ((α + β·K) / s_K - 1)² least)."""
    ones = sum(1 / s for s in seconds.values())
    weights = sum(1 / s**2 for s in seconds.values())
    first = sum(n / s for n, s in seconds.items())
    cross = sum(n / s**2 for n, s in seconds.items())
    second = sum(n * n / s**2 for n, s in seconds.items())
    determinant = weights * second - cross**2
    beta = max(0.0, (weights * first - cross * ones) / determinant) if determinant > 0 else 0.0
    alpha = (ones - beta * cross) / weights
    return {n: alpha + beta * n for n in seconds}


def corrections(
    points: Mapping[tuple[int, int], Seconds], variances: Mapping[tuple[int, int], float]
) -> dict[tuple[int, int], dict[int, float]]:
    """Factor of every point's seconds.

    Args:
        points: (context, batch) -> measured seconds by draft length.
        variances: (context, batch) -> of the noise in each of these, log scale.
    """
    off: dict[tuple[int, int], dict[int, float]] = {}
    for place, seconds in points.items():
        straight = line(seconds)
        if len(seconds) > 2 and min(straight.values()) > 0:
            off[place] = {n: math.log(s / straight[n]) for n, s in seconds.items()}
    freedom = sum(len(logs) - 2 for logs in off.values())
    left = sum(value**2 for logs in off.values() for value in logs.values())
    expected = sum((len(logs) - 2) * variances[place] for place, logs in off.items())
    true = max(0.0, left - expected) / freedom if freedom else 0.0
    factors = {place: dict.fromkeys(seconds, 1.0) for place, seconds in points.items()}
    for place, logs in off.items():
        if variances[place] > 0:
            share = variances[place] / (variances[place] + true)
            factors[place] = {n: math.exp(-share * value) for n, value in logs.items()}
    return factors


def median_variance(sd: float, turns: int) -> float:
    """Variance of the median of so many turns of that standard deviation; 0 for one turn, whose noise is not known."""
    return _MEDIAN * sd**2 / turns if turns > 1 else 0.0
