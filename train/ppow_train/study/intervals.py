"""What a difference is worth: means and 95 % intervals over seeds and prompts at once, paired by both.

Two things are chance: which prompts were held out, and the seed of a run (trajectories, initialisation, windows). Both
are resampled, the same draw for every arm, so that what the arms have in common drops out of a difference (two-way
bootstrap, ours). n − 1 of n are drawn (Rao and Wu 1988): n of n would make a mean of few seeds look surer than it is.
One seed says nothing of what another would have given: there the spread over seeds is taken from the arms beside it
that have several (`SeedSpread`). Left out: how results are laid out (table.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from ppow_train.study.results import Measured

_RESAMPLES = 4_000
_SEED = 0
_DEGREES = (
    3  # of freedom, at least: with fewer, Student's t makes an interval several times as wide as the spread
)


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval, in the unit of what was compared."""

    mean: float
    low: float
    high: float
    of_prompts_alone: bool = False  # one seed, and nothing is known of others

    @property
    def is_clear_of_zero(self) -> bool:
        """Whether zero lies outside, seeds and prompts considered."""
        return not self.of_prompts_alone and (self.low > 0 or self.high < 0)

    def percent(self) -> str:
        """As text, in per cent; a dash where there is nothing to compare with."""
        if np.isnan(self.mean):
            return "–"
        told = f"{100 * self.mean:+.1f} ({100 * self.low:+.1f} … {100 * self.high:+.1f})"
        return told + " †" * self.of_prompts_alone


@dataclasses.dataclass(frozen=True)
class SeedSpread:
    """How much a figure varies with the seed of a run, pooled over arms.

    Attributes:
        sd: standard deviation, in the unit of the figure.
        degrees: of freedom that it is known with.
    """

    sd: float
    degrees: int

    @classmethod
    def pooled(cls, by_arm: Iterable[Sequence[float]]) -> SeedSpread | None:
        """From figures of each arm by seed; None with fewer than `_DEGREES` degrees of freedom."""
        several = [np.asarray(values) for values in by_arm if len(values) > 1]
        degrees = sum(len(values) - 1 for values in several)
        if degrees < _DEGREES:
            return None
        squares = sum(float(((values - values.mean()) ** 2).sum()) for values in several)
        return cls((squares / degrees) ** 0.5, degrees)

    def draws(self) -> np.ndarray:
        """Deviations of a figure of one seed, one for each resampling; Student's t, the spread being estimated."""
        return self.sd * np.random.default_rng(_SEED + 1).standard_t(self.degrees, size=_RESAMPLES)


NOTHING = Interval(float("nan"), float("nan"), float("nan"))  # to compare with


class Resampled:
    """Accepted tokens per draft of an arm under every resampling of S seeds and B prompts.

    Args:
        measured: of each seed, in the same order for all arms that are compared; one alone for an untrained drafter.
    """

    def __init__(self, measured: Sequence[Measured], num_seeds: int) -> None:
        drafts, accepted = (
            np.array([getattr(each, name) for each in measured]) for name in ("drafts", "accepted")
        )
        if len(measured) == 1:  # the same whatever the seed
            drafts, accepted = (values.repeat(num_seeds, axis=0) for values in (drafts, accepted))
        random = np.random.default_rng(_SEED)
        # How often each seed and each prompt is drawn: [resamples, S] and [resamples, B].
        seeds, prompts = (
            random.multinomial(max(1, count - 1), np.full(count, 1 / count), size=_RESAMPLES)
            for count in drafts.shape
        )
        self.num_seeds = num_seeds
        self.mean = float(accepted.sum() / drafts.sum())
        self.draws = _over(*(((seeds @ values) * prompts).sum(-1) for values in (accepted, drafts)))


def gain(arm: Resampled, start: Resampled, spread: SeedSpread | None = None) -> Interval:
    """Accepted tokens per draft over the start's, minus 1; nan where the start has none accepted.

    Args:
        spread: of gains over seeds, for an arm with one; without, its interval is of prompts alone.
    """
    mean, draws = _over(arm.mean, start.mean) - 1.0, _over(arm.draws, start.draws) - 1.0
    return _interval(mean, draws, arm, spread)


def difference(
    arm: Resampled, reference: Resampled, start: Resampled, spread: SeedSpread | None = None
) -> Interval:
    """Gain of an arm minus that of the reference, both over the same start.

    Args:
        spread: of such differences over seeds, for an arm with one; without, its interval is of prompts alone.
    """
    mean = _over(arm.mean - reference.mean, start.mean)
    return _interval(mean, _over(arm.draws - reference.draws, start.draws), arm, spread)


def _over(values: np.ndarray | float, start: np.ndarray | float) -> np.ndarray:
    values, start = np.asarray(values), np.asarray(start)
    return np.divide(values, start, out=np.full(values.shape, np.nan), where=start > 0)


def _interval(mean: np.ndarray, draws: np.ndarray, arm: Resampled, spread: SeedSpread | None) -> Interval:
    if arm.num_seeds == 1:
        draws = draws + spread.draws() if spread is not None else draws
    kept = draws[~np.isnan(draws)]  # a resampling without any draft says nothing
    low, high = np.quantile(kept, (0.025, 0.975)) if len(kept) else (np.nan, np.nan)
    return Interval(float(mean), float(low), float(high), arm.num_seeds == 1 and spread is None)
