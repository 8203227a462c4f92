"""What a difference is worth: means and 95 % intervals over seeds and prompts at once, paired by both.

Two things are chance: which prompts were held out, and the seed of a run (trajectories, initialisation, windows). Both
are resampled, the same draw for every arm, so that what the arms have in common drops out of a difference (two-way
bootstrap, ours). n − 1 of n are drawn (Rao and Wu 1988): n of n would make a mean of few seeds look surer than it is.
Left out: how results are laid out (table.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from ppow_train.study.results import Measured

_RESAMPLES = 4_000
_SEED = 0


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval, in the unit of what was compared."""

    mean: float
    low: float
    high: float

    @property
    def is_clear_of_zero(self) -> bool:
        """Whether zero lies outside."""
        return self.low > 0 or self.high < 0

    def percent(self) -> str:
        """As text, in per cent; a dash where there is nothing to compare with."""
        if np.isnan(self.mean):
            return "–"
        return f"{100 * self.mean:+.1f} ({100 * self.low:+.1f} … {100 * self.high:+.1f})"


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
        self.mean = float(accepted.sum() / drafts.sum())
        self.draws = _over(*(((seeds @ values) * prompts).sum(-1) for values in (accepted, drafts)))


def gain(arm: Resampled, start: Resampled) -> Interval:
    """Accepted tokens per draft over the start's, minus 1; nan where the start has none accepted."""
    return _interval(_over(arm.mean, start.mean) - 1.0, _over(arm.draws, start.draws) - 1.0)


def difference(arm: Resampled, reference: Resampled, start: Resampled) -> Interval:
    """Gain of an arm minus that of the reference, both over the same start."""
    return _interval(
        _over(arm.mean - reference.mean, start.mean), _over(arm.draws - reference.draws, start.draws)
    )


def _over(values: np.ndarray | float, start: np.ndarray | float) -> np.ndarray:
    values, start = np.asarray(values), np.asarray(start)
    return np.divide(values, start, out=np.full(values.shape, np.nan), where=start > 0)


def _interval(mean: np.ndarray, draws: np.ndarray) -> Interval:
    kept = draws[~np.isnan(draws)]  # a resampling without any draft says nothing
    low, high = np.quantile(kept, (0.025, 0.975)) if len(kept) else (np.nan, np.nan)
    return Interval(float(mean), float(low), float(high))
