"""How long one engine step takes, by batch size and draft length: from a cost profile, and always from the clock.

Observations are the wall times between decode-only steps, brought to one pace of the machine (pace.py). They are kept
in cells of equal draft length and similar batch (step_cells.py), as the lower quartile of the last few: pauses and
stray prefill, which only ever add, do no harm, and a length that was timed two or three times has the benefit of the
doubt. Between and beyond cells stands a base, a ridge regression with no negative coefficient (so it grows in each): on
[profile, 1] where there is a cost profile, since a server adds time of its own to every step, else on
[1, B, K, K·B, context]. A cell shifts the base by what it saw. Left out: acceptance (acceptance.py) and the choice
(window.py). Pure Python: some 25 microseconds for a table of eleven lengths, ten for an observation, fits included.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Protocol

from vllm_ppow.isotonic import isotonic
from vllm_ppow.octave import octave
from vllm_ppow.pace import Pace
from vllm_ppow.ridge import ridge_from
from vllm_ppow.step_cells import Cell, Cells, bucket

# How far the base is taken to be from the truth (log scale, one standard deviation): what a cell saw itself, whose
# noise is measured, is weighed against. A profile may be further off, measured as it was on a machine that did other
# things: as far as cells say, up to the larger of the two.
BASE_ERROR, LARGEST_BASE_ERROR = 0.05, 0.3
# What the machine's pace adds to the differences between cells (log scale, one standard deviation): where a cell is
# weighed against a profile, and what is taken out of these differences to find how wrong the profile is. That is less,
# since a wrong one that is believed costs more than a right one that is doubted.
_PACE_ERROR, _LEAST_PACE_ERROR = 0.1, 0.02
# Observations of a draft length in one octave of batch sizes that identify its cost.
IDENTIFIED = 3
# The first steps of a cell are not counted.
FIRST_USES = 2
# By how much a length may look dearer than a longer one (log scale).
MOST_ABOVE_LONGER = 0.1
# The profile is asked for a request's context to so many tokens.
CONTEXT_GRAIN = 32
# Observations of a cell that tell how the machine's pace has changed since.
PACED = 10
# Of what steps take over a profile at least so much is a factor, the rest may be time that a server adds to every step.
# Lengths are timed one after the other on a machine whose pace wanders, so that a longer one may look as cheap as a
# shorter: the profile's shape would be given up for a constant.
_LEAST_FACTOR = 0.7
# Steps between fits, or as many as there are cells, since a fit takes about ten microseconds for each.
_REFIT_EVERY = 32


class Profile(Protocol):
    """What is needed of vllm_ppow.cost_profile.CostProfile."""

    def step_seconds(self, batch: int, num_draft_tokens: int, context: int | None = None) -> float:
        """Seconds of one engine step: target step over batch · (K + 1) tokens and K draft steps."""


class StepCost:
    """Seconds of a decode step as a function of batch size and draft length.

    Args:
        profile: measured costs to start from; None to learn everything from the clock.
    """

    def __init__(self, profile: Profile | None = None) -> None:
        self._profile = profile
        # A request grows by a few tokens every step: without rounding nothing would be found again.
        self._profiled = functools.lru_cache(maxsize=4096)(profile.step_seconds) if profile else None
        self._cells = Cells()
        self._octaves: dict[tuple[int, int], int] = {}
        # What the regression is drawn to: the profile as it is, or nothing.
        self._prior = [0.0] * 5 if profile is None else [1.0, 0.0]
        # Of the features; without a profile any unit does while nothing is learned.
        self._coefficients = [1.0, 0.0, 0.1, 0.0, 0.0] if profile is None else self._prior
        self._least = (0.0, 1.0)  # seconds that a step takes at least at a batch size
        self._pace = Pace()
        self._uses: dict[tuple[int, int], int] = {}  # steps seen by cell
        self._base_error = BASE_ERROR
        self._noise = 0.1  # of one observation around its cell's median, log scale
        self._now = 0
        self._fitted_at = -_REFIT_EVERY
        self._context = 0.0

    def observe(self, seconds: float, batch: int, num_draft_tokens: int, context: int = 0) -> None:
        """Take in one decode-only step between two steps that drafted alike.

        Args:
            seconds: wall time from the step before to this one (> 0).
            batch: requests in the step.
            num_draft_tokens: K, drafted in the step before and in this one.
            context: tokens of all its requests together that attention reads.
        """
        if seconds <= 0 or batch < 1 or self._is_first_use((bucket(batch), num_draft_tokens)):
            return
        self._now += 1
        self._context = context / batch
        cell = self._cells.at(bucket(batch), num_draft_tokens)
        seconds = self._at_constant_pace(seconds, cell, batch)
        cell.add(seconds, batch, context, self._now)
        cell.features = self._features(cell.batch, num_draft_tokens, cell.context)
        timed = (octave(batch), num_draft_tokens)
        self._octaves[timed] = self._octaves.get(timed, 0) + 1
        refit_at = self._fitted_at + max(_REFIT_EVERY, len(self._cells))
        if self._octaves[timed] <= IDENTIFIED or self._now >= refit_at:
            self._fit()
        else:
            self._update_shift(cell)

    def _at_constant_pace(self, seconds: float, cell: Cell, batch: int) -> float:
        """What a step would have taken when what its cell remembers was seen."""
        pace, near = self._pace, octave(batch)
        pace.advance(near)
        if len(cell.seconds) >= IDENTIFIED:
            deviation = math.log(seconds / cell.median) - pace.of(near)
            # mean absolute deviation · 1.25 = standard deviation; outliers are clipped
            self._noise += 0.02 * (1.25 * min(abs(deviation), 0.5) - self._noise)
            if len(cell.seconds) >= PACED:
                pace.correct(near, deviation, self._noise)
        return seconds * math.exp(-pace.of(near))

    def _is_first_use(self, cell: tuple[int, int]) -> bool:
        """Whether a step is among the first of a cell: kernels are chosen and buffers made in them."""
        uses = self._uses[cell] = self._uses.get(cell, 0) + 1
        return uses <= FIRST_USES

    def is_timed(self, batch: int, num_draft_tokens: int) -> bool:
        """Whether steps of that draft length were timed in this octave of batch sizes, often enough to tell."""
        return self._octaves.get((octave(batch), num_draft_tokens), 0) >= IDENTIFIED

    def wanted(self, batch: int, lengths: Sequence[int]) -> list[int]:
        """Draft lengths to try so that costs near this batch size are identified; none with a profile.

        Short ones only: they are cheap at any batch size, and longer ones are tried when these promise that they pay.
        An octave of batch sizes beside an identified one is extrapolated to.
        """
        if self._profile is not None:
            return []
        here = octave(batch)
        missing = self._unidentified(here, lengths)
        beside = missing and self._unidentified(here - 1, lengths) and self._unidentified(here + 1, lengths)
        return missing if beside else []

    def _unidentified(self, near: int, lengths: Sequence[int]) -> list[int]:
        """Of three short draft lengths, those that were not timed often enough in an octave of batch sizes."""
        corners = dict.fromkeys(lengths[min(i, len(lengths) - 1)] for i in (3, 0, 1))
        return [length for length in corners if self._octaves.get((near, length), 0) < IDENTIFIED]

    def step_seconds(self, batch: int, num_draft_tokens: int, context: int | None = None) -> float:
        """Expected seconds of one decode step at a steady draft length.

        Args:
            batch: requests (>= 1).
            num_draft_tokens: K >= 0.
            context: tokens of all requests together; None for what was seen last.
        """
        (log,) = self._logs(batch, (num_draft_tokens,), context)
        return math.exp(log)

    @property
    def observations(self) -> int:
        """Steps taken in so far."""
        return self._now

    def table(self, batch: int, lengths: Sequence[int], context: int | None = None) -> list[float]:
        """`step_seconds` at ascending draft lengths, made non-decreasing.

        A length that looks much dearer than a longer one was timed in a pause, since pauses only add: no more of it is
        believed than noise may be. What is left of such violations is pooled.
        """
        logs = self._logs(batch, lengths, context)
        least_of_longer = math.inf
        for i in reversed(range(len(logs))):
            logs[i] = min(logs[i], least_of_longer + MOST_ABOVE_LONGER)
            least_of_longer = min(least_of_longer, logs[i])
        return [math.exp(log) for log in isotonic(logs, [1.0] * len(logs))]

    def _logs(self, batch: int, lengths: Sequence[int], context: float | None) -> list[float]:
        """Log of the seconds at each draft length: the base, what cells say beyond it, and the machine's pace."""
        context = self._context * batch if context is None else context
        pace = self._pace.of(octave(batch))
        shifts = self._cells.shifts(bucket(batch), lengths)
        return [
            math.log(self._base(batch, length, context)) + shift + pace
            for length, shift in zip(lengths, shifts, strict=True)
        ]

    def _base(self, batch: int, length: int, context: float) -> float:
        return self._regressed(self._features(batch, length, context), batch)

    def _features(self, batch: float, length: int, context: float) -> list[float]:
        if self._profiled is None:
            return [1.0, batch, length, length * batch, context / 1024]
        rounded = CONTEXT_GRAIN * round(context / batch / CONTEXT_GRAIN)
        return [self._profiled(round(batch), length, rounded), 1.0]

    def _regressed(self, features: list[float], batch: float) -> float:
        """The regression, and never less than the least: after noise and jumps it may promise steps that are free."""
        seconds, at = self._least
        least = seconds * min(1.0, batch / at)
        return max(least, sum(c * x for c, x in zip(self._coefficients, features, strict=True)))

    def _update_shift(self, cell: Cell) -> None:
        """Weigh what a cell saw against the base by their variances.

        What it remembers are steps of a second or two, at one pace of the machine: where lengths are compared, that is
        an error too, beside which a profile tells more. A regression on a few features, whose own error is not known,
        does not.
        """
        seen, variance = self._beyond_base(cell)
        if self._profile is not None:
            variance += _PACE_ERROR**2
        # One step may have been a pause; several have their quickest.
        error = self._base_error if len(cell.seconds) >= IDENTIFIED else BASE_ERROR
        cell.shift = seen * error**2 / (error**2 + variance)

    def _beyond_base(self, cell: Cell) -> tuple[float, float]:
        """Log of what a cell saw over what the base says, and its variance: about π/2 · noise² / n is a quantile's."""
        seen = math.log(cell.typical / self._regressed(cell.features, cell.batch))
        return seen, 0.5 * math.pi * self._noise**2 / cell.weight(self._now)

    def _found_base_error(self) -> float:
        """How far the base is from what cells saw, their noise and the pace's taken out (method of moments, ours)."""
        beyond = [self._beyond_base(cell) for _, cell in self._cells if len(cell.seconds) >= IDENTIFIED]
        weights = [1.0 / (BASE_ERROR**2 + variance) for _, variance in beyond]
        if not weights:
            return BASE_ERROR
        excess = sum(w * (seen**2 - variance) for w, (seen, variance) in zip(weights, beyond, strict=True))
        square = excess / sum(weights) - _LEAST_PACE_ERROR**2
        return min(max(square, BASE_ERROR**2), LARGEST_BASE_ERROR**2) ** 0.5

    def _fit(self) -> None:
        """Fit the base to what the cells saw, in relative terms, and what the cells say beyond it."""
        self._fitted_at = self._now
        self._cells.forget(self._now)
        rows = [(cell.features, cell.typical, cell.weight(self._now)) for _, cell in self._cells]
        least = [0.0] * len(self._prior)
        if self._profile is not None:
            least[0] = _LEAST_FACTOR * _factor(rows)
        self._coefficients = ridge_from(least, rows, self._prior)
        self._least = min(_least(cell, length) for length, cell in self._cells)
        if self._profile is not None:
            self._base_error = self._found_base_error()
        for _, cell in self._cells:
            self._update_shift(cell)


def _least(cell: Cell, length: int) -> tuple[float, float]:
    """(seconds, batch): what a step at K = 0 takes at least, at the batch size of a cell that saw steps of K tokens.

    Verifying K + 1 tokens takes at most K + 1 times as long as one, and K passes of a drafter that is smaller than the
    target at most K times (ours).
    """
    return cell.typical / (2 * length + 1), cell.batch


def _factor(rows: Sequence[tuple[list[float], float, float]]) -> float:
    """Geometric mean of what was seen over the first feature, by weight."""
    logs = sum(weight * math.log(seconds / features[0]) for features, seconds, weight in rows)
    return math.exp(logs / sum(weight for _, _, weight in rows))
