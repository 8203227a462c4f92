"""What a difference is worth: means and 95 % intervals over seeds and prompts at once, paired by both.

Two things are chance: which prompts were held out, and the seed of a run (trajectories, initialisation, windows). Both
are resampled, the same draw for every arm, so that what the arms have in common drops out of a difference (two-way
bootstrap, ours). Left out: how results are laid out (table.py).
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
        """As text, in per cent."""
        return f"{100 * self.mean:+.1f} ({100 * self.low:+.1f} … {100 * self.high:+.1f})"


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
        seeds = random.integers(len(drafts), size=(_RESAMPLES, len(drafts)))
        prompts = random.integers(drafts.shape[1], size=(_RESAMPLES, drafts.shape[1]))
        self.mean = float(accepted.sum() / drafts.sum())
        self.draws = np.array(
            [
                accepted[np.ix_(seed, prompt)].sum() / drafts[np.ix_(seed, prompt)].sum()
                for seed, prompt in zip(seeds, prompts, strict=True)
            ]
        )


def gain(arm: Resampled, start: Resampled) -> Interval:
    """Accepted tokens per draft over the start's, minus 1."""
    return _interval(arm.mean / start.mean - 1.0, arm.draws / start.draws - 1.0)


def difference(arm: Resampled, reference: Resampled, start: Resampled) -> Interval:
    """Gain of an arm minus that of the reference, both over the same start."""
    return _interval((arm.mean - reference.mean) / start.mean, (arm.draws - reference.draws) / start.draws)


def _interval(mean: float, draws: np.ndarray) -> Interval:
    low, high = np.quantile(draws, (0.025, 0.975))
    return Interval(mean, float(low), float(high))
