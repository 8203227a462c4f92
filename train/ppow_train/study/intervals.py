"""What a difference is worth: means and 95 % intervals over seeds and prompts at once, paired by both.

Two things are chance: which prompts were held out, and the seed of a run (trajectories, initialisation, windows).
Prompts are resampled, the same draw for every arm, so that what the arms have in common drops out of a difference
(bootstrap). Prompts that come from one source file are drawn together, since they overlap and are alike: the file is
what was sampled (cluster bootstrap). Of G files or single prompts G − 1 are drawn (Rao and Wu 1988: G of G look a
little surer than they are), and as few of them do not tell their own spread, every draw is as far from the mean as
Student's t with G − 1 degrees of freedom is farther than a normal deviate (ours). Seeds are two to five: resampled they
would find differences where there are none. Their part is Student's t instead, of the spread over seeds pooled over the
arms of a cell (`SeedSpread`), which also tells what another seed might have given where there is one (ours).

tests/training/test_study_intervals.py simulates studies: such intervals cover the truth where files differ, and those
that draw single prompts too seldom. Left out: how results are laid out (table.py).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import numpy as np

from ppow_train.study.results import Measured

_RESAMPLES = 4_000
_SEED = 0
# Degrees of freedom below which a spread is not lent to an arm of one seed: t would make it several times as wide.
_DEGREES = 3


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
        """From figures of each arm by seed; None where no arm has several."""
        several = [np.asarray(values) for values in by_arm if len(values) > 1]
        degrees = sum(len(values) - 1 for values in several)
        if degrees == 0:
            return None
        squares = sum(float(((values - values.mean()) ** 2).sum()) for values in several)
        return cls((squares / degrees) ** 0.5, degrees)

    def draws(self, num_seeds: int) -> np.ndarray:
        """Deviations of a mean over seeds, one for each resampling; Student's t, the spread being estimated."""
        deviations = np.random.default_rng(_SEED + 1).standard_t(self.degrees, size=_RESAMPLES)
        return self.sd / num_seeds**0.5 * deviations


NOTHING = Interval(float("nan"), float("nan"), float("nan"))  # to compare with


class Resampled:
    """Accepted tokens per draft of an arm on S seeds: of each, of all, and of all under every resampling of B prompts.

    Args:
        measured: of each seed, in the same order for all arms that are compared; one alone for an untrained drafter.
        groups: what each prompt is drawn together with, [B] names; every prompt by itself where it is not given.
    """

    def __init__(
        self, measured: Sequence[Measured], num_seeds: int, groups: Sequence[str] | None = None
    ) -> None:
        drafts, accepted = (
            np.array([getattr(each, name) for each in measured]) for name in ("drafts", "accepted")
        )
        if len(measured) == 1:  # the same whatever the seed
            drafts, accepted = (values.repeat(num_seeds, axis=0) for values in (drafts, accepted))
        num_prompts = drafts.shape[1]
        names, group_of = np.unique(
            np.arange(num_prompts) if groups is None else np.array(groups), return_inverse=True
        )
        if len(group_of) != num_prompts:
            raise ValueError(f"{num_prompts} prompts were measured, {len(group_of)} have a group.")
        drawn, self.stretch = _resamplings(len(names))
        self.num_seeds = num_seeds
        self.by_seed = _over(accepted.sum(1), drafts.sum(1))
        self.mean = float(accepted.sum() / drafts.sum())
        counts = (np.bincount(group_of, weights=of.sum(0)) for of in (accepted, drafts))
        self.draws = _over(*(drawn @ of_group for of_group in counts))


@functools.lru_cache(maxsize=8)
def _resamplings(num_groups: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each of G groups is drawn, [resamples, G], and what makes a normal deviate Student's t, [resamples]."""
    degrees = max(1, num_groups - 1)
    drawn = np.random.default_rng(_SEED).multinomial(
        degrees, np.full(num_groups, 1 / num_groups), size=_RESAMPLES
    )
    return drawn, (degrees / np.random.default_rng(_SEED + 2).chisquare(degrees, size=_RESAMPLES)) ** 0.5


def gain(arm: Resampled, start: Resampled, spread: SeedSpread | None = None) -> Interval:
    """Accepted tokens per draft over the start's, minus 1; nan where the start has none accepted.

    Args:
        spread: of gains over seeds, of this arm and those beside it; without, the arm's own is taken.
    """
    mean, draws = _over(arm.mean, start.mean) - 1.0, _over(arm.draws, start.draws) - 1.0
    draws = mean + (draws - mean) * arm.stretch
    return _interval(mean, draws, _over(arm.by_seed, start.by_seed), spread)


def difference(
    arm: Resampled, reference: Resampled, start: Resampled, spread: SeedSpread | None = None
) -> Interval:
    """Gain of an arm minus that of the reference, both over the same start.

    Args:
        spread: of such differences over seeds, of this arm and those beside it; without, the arm's own is taken.
    """
    mean, draws = (
        _over(arm.mean - reference.mean, start.mean),
        _over(arm.draws - reference.draws, start.draws),
    )
    draws = mean + (draws - mean) * arm.stretch
    return _interval(mean, draws, _over(arm.by_seed - reference.by_seed, start.by_seed), spread)


def _over(values: np.ndarray | float, start: np.ndarray | float) -> np.ndarray:
    values, start = np.asarray(values), np.asarray(start)
    return np.divide(values, start, out=np.full(values.shape, np.nan), where=start > 0)


def _interval(
    mean: np.ndarray, draws: np.ndarray, by_seed: np.ndarray, spread: SeedSpread | None
) -> Interval:
    num_seeds = len(by_seed)
    spread = spread or SeedSpread.pooled([by_seed.tolist()])
    of_prompts_alone = spread is None or (num_seeds == 1 and spread.degrees < _DEGREES)
    if spread is not None and not of_prompts_alone:
        draws = draws + spread.draws(num_seeds)
    kept = draws[~np.isnan(draws)]  # a resampling without any draft says nothing
    low, high = np.quantile(kept, (0.025, 0.975)) if len(kept) else (np.nan, np.nan)
    return Interval(float(mean), float(low), float(high), of_prompts_alone)
