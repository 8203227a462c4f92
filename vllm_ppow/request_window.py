"""Draft lengths request by request: when the drafter leaves its loop, and which of its tokens are worth verifying.

Within the maximum that the scheduler gave for the step, a token is kept while its chance of being accepted, with all
before it, is worth more than its verification; another drafter pass is made while the tokens expected of it are worth
more than the pass. "Worth" is at the rate at which tokens are being produced: to maximise tokens per second is to
maximise tokens - rate · seconds (Dinkelbach). Rate and seconds are measured, until then a cost profile's; without one
the first drafts are of odd lengths, to find out what a token takes. Chances are calibrated top-1 probabilities.

Sampling stays lossless. What decides on token i of a request is the drafter's distribution q_i, through max q_i, and
the same of earlier positions: functions of the tokens before i, never of the token x_i drawn from q_i nor of a later
one. Given the tokens before it, keeping a token is then independent of what it is, so what is verified is still an
unbiased draft from q_i. (Other requests' tokens are drawn independently, so the end of the common loop may look at
them.) Every `_EXPLORE_EVERY`-th draft leaves one request untrimmed, by its number: what is never verified is never
learned.

Left out: where probabilities come from and how a loop is left (compat/draft_window.py). Pure Python.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_ppow.calibration import Calibration
from vllm_ppow.cost_profile import CostProfile
from vllm_ppow.octave import octave
from vllm_ppow.pass_price import PassPrice
from vllm_ppow.verify_price import VerifyPrice

# At worst, drafts that bring nothing at all, a few passes and tokens in so many steps cost about one percent.
_EXPLORE_EVERY = 32
# While the price of a token is not known, all drafts of a step are of one of these lengths in turn, so that it shows.
_LEARNING_LENGTHS = (3, 1)
# And again at every so many drafts, whatever their price, more often at first: slow first uses give a wrong one, and
# drafts that it ends, or never shortens, show no better.
_RELEARN_EVERY, _RELEARN_AT_FIRST, _FIRST_DRAFTS = 256, 8, 128
# Explored drafts go so deep in turn: mostly shallow, what is learned of one position is shared with all.
_EXPLORE_DEPTHS = (1, 2, 1, 4)
# Steps of memory of the rate of tokens at a batch size.
_RATE_MEMORY = 50
# Steps at a batch size before its rate is used.
_RATE_KNOWN = 4
_BINS = 10


class RequestWindow:
    """The policy of one drafter.

    Args:
        maximum: num_speculative_tokens.
        minimum: tokens that every draft has at least, where the scheduler's maximum for the step allows it.
        profile: measured costs to start from; None to learn prices from the clock alone, by drafts of odd lengths.
    """

    def __init__(self, maximum: int, minimum: int = 0, profile: CostProfile | None = None) -> None:
        self.minimum = minimum
        self._profile = profile
        self.calibrations = (
            Calibration(maximum),
            Calibration(maximum),
        )  # of greedy requests, of sampled ones
        self.pass_price = PassPrice(profile.pass_seconds if profile else None)
        # seconds of a token in everything else that a step does
        self.verify_price = VerifyPrice(profile.token_seconds if profile else None)
        self._rates: dict[int, tuple[float, float, int]] = {}  # batch octave -> tokens, seconds, steps
        self._next = [
            (0.0, 0.0)
        ] * _BINS  # by acceptance: sum and number of the acceptances one position later
        self._drafts = self._explorations = 0
        self._paused = False

    def pause(self) -> None:
        """The scheduler asked for no draft in this step."""
        self._paused = True

    def begin(self, limit: int, sampled: Sequence[bool], active: Sequence[bool]) -> None:
        """A draft of at most `limit` tokens for each request of a batch begins.

        Args:
            sampled: whether each request samples (temperature above 0).
            active: whether each request's draft will be used (prefill is over).
        """
        self._kinds, self._active = [int(s) for s in sampled], active
        batch = len(active)
        self.confidences: list[list[float]] = [[] for _ in range(batch)]
        self._survival = [1.0] * batch
        self._last = [1.0] * batch
        self._open = list(active)
        self._lengths = [0] * batch
        self._choose_explored(batch)
        rate, token_seconds = self._rate_at(batch), self.verify_price.seconds_per_token(batch)
        self._learning_length = self._next_learning_length(limit, token_seconds is None)
        self._token_price = rate * token_seconds if token_seconds is not None else 0.0
        self._pass_price = rate * self.pass_price.seconds(batch) if token_seconds is not None else 0.0

    def add(self, confidences: Sequence[float]) -> bool:
        """Take the drafter's top-1 probabilities at the next position; whether to draft the position after it.

        Args:
            confidences: max q_i of each request, [batch].
        """
        position = len(self.confidences[0])
        gain = 0.0
        for row, confidence in enumerate(confidences):
            self.confidences[row].append(confidence)
            if not self._active[row]:
                continue
            chance = self.calibrations[self._kinds[row]].acceptance(position, confidence)
            if position:
                self._learn_next(self._last[row], chance)
            self._survival[row] *= chance
            self._last[row] = chance
            if self._open[row] and self._keeps(row, position):
                self._lengths[row] = position + 1
                gain += max(0.0, self._survival[row] * self._expect_next(chance) - self._token_price)
            else:
                self._open[row] = False
        if position + 1 < self.minimum or (self._explored >= 0 and position + 1 < self._explored_depth):
            return True
        if self._learning_length is not None:
            return position + 1 < self._learning_length
        return any(self._open) and gain >= self._pass_price

    def lengths(self) -> list[int]:
        """Tokens of each request to verify."""
        return list(self._lengths)

    def observe(self, sampled: bool, confidences: Sequence[float], num_accepted_tokens: int) -> None:
        """A request's draft was verified, `confidences` being those of its tokens."""
        calibration = self.calibrations[int(sampled)]
        for position, confidence in enumerate(confidences[: num_accepted_tokens + 1]):
            calibration.observe(position, confidence, position < num_accepted_tokens)

    def observe_step(self, batch: int, tokens: int, seconds: float) -> None:
        """A decode-only step produced that many tokens (bonus tokens included) in that time, drafting included."""
        key = octave(batch)
        total, spent, steps = self._rates.get(key, (0.0, 0.0, 0))
        if steps >= _RATE_KNOWN:
            seconds = min(seconds, 5 * spent / min(steps, _RATE_MEMORY))  # a pause says nothing of the rate
        keep = 1 - 1 / _RATE_MEMORY if steps >= _RATE_MEMORY else 1.0
        self._rates[key] = (keep * total + tokens / batch, keep * spent + seconds, steps + 1)

    def _rate_at(self, batch: int) -> float:
        """Tokens per second at a batch size; while unknown the profile's, or 0: nothing has a price then."""
        total, spent, steps = self._rates.get(octave(batch), (0.0, 0.0, 0))
        if steps >= _RATE_KNOWN and spent > 0:
            return batch * total / spent
        return self._profile.most_tokens_per_second(batch) if self._profile else 0.0

    def _choose_explored(self, batch: int) -> None:
        """The request of this draft that is left untrimmed, -1 for none, and up to which position."""
        self._drafts += 1
        due = self._paused or self._drafts % _EXPLORE_EVERY == 0
        self._paused = False
        self._explored = self._explorations % batch if due and batch else -1
        self._explored_depth = _EXPLORE_DEPTHS[self._explorations % len(_EXPLORE_DEPTHS)]
        self._explorations += due

    def _next_learning_length(self, limit: int, unknown: bool) -> int | None:
        """What all drafts are cut to, to learn the price of a token; None: they are of what they are worth."""
        early = self._profile is None and self._drafts <= _FIRST_DRAFTS
        every = _RELEARN_AT_FIRST if early else _RELEARN_EVERY
        turn, rest = divmod(self._drafts, 1 if unknown else every)
        if rest:
            return None
        length = _LEARNING_LENGTHS[turn % len(_LEARNING_LENGTHS)]
        return length if limit > 1 else length // 2

    def _keeps(self, row: int, position: int) -> bool:
        if position < self.minimum or (row == self._explored and position < self._explored_depth):
            return True
        if self._learning_length is not None:
            return position < self._learning_length
        return self._survival[row] >= self._token_price

    def _learn_next(self, before: float, chance: float) -> None:
        index = min(int(before * _BINS), _BINS - 1)
        total, number = self._next[index]
        self._next[index] = (0.99 * total + chance, 0.99 * number + 1)

    def _expect_next(self, chance: float) -> float:
        """Expected acceptance one position later; like the one before it until known."""
        total, number = self._next[min(int(chance * _BINS), _BINS - 1)]
        return (total + 4 * chance) / (number + 4)
