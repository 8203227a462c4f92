"""How likely the target accepts a draft token, by position: learned while serving, forgotten as traffic changes.

What is kept is conditional, a_i = P(token i accepted | the i-1 before it were, and i tokens were drafted): a draft of 2
says nothing about position 3, and counts nothing there. How long the counted drafts were is kept too, since a_i depends
on it: what drafts of other lengths would get follows by other_lengths.py. Left out: what a draft costs (step_cost.py)
and what to do about it (window.py). Pure Python; `promises` costs some 25 microseconds.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from vllm_ppow.octave import octave
from vllm_ppow.other_lengths import accepted_by_length

# Request-steps after which an observation has lost 63 % of its weight. At 800 a probability of 0.5 is known to 0.018
# (one standard deviation), and a change of traffic is followed within 800 drafts: 25 steps of a batch of 32.
MEMORY = 800
# Observations that the expectation from the position before weighs.
PRIOR_STRENGTH = 8.0
# Drafts that a measured prior counts for when serving begins. They are forgotten like any others: enough that a warm-up
# with copies of one prompt does not end drafting, too few to matter after seconds of other traffic.
MEASURED = 64.0
# Where nothing is known at all: a drafter whose tokens are mostly accepted, so that drafting is tried.
MILD_PRIOR = 0.7

_RESCALE_AT = 1e12


class AcceptanceEstimate:
    """Conditional acceptance per position, from exponentially forgotten counts and a prior.

    A position with few counts is taken to be like the one before it (times what the prior says of the two), so that
    positions which were not drafted for long are extrapolated from the last well-known one.

    Args:
        maximum: positions, the configured num_speculative_tokens (>= 1).
        prior: unconditional acceptance per position as a cost profile or `ppow bench` reports it, of drafts as long as
            it is; empty if unknown, the last ratio goes on where it is too short.
        memory: request-steps of memory.
    """

    def __init__(self, maximum: int, prior: Sequence[float] = (), memory: int = MEMORY) -> None:
        if maximum < 1 or memory < 1:
            raise ValueError(f"AcceptanceEstimate needs maximum and memory >= 1, got {maximum} and {memory}.")
        self.maximum = maximum
        self._prior = conditional_acceptance(prior)[:maximum]
        self._growth = 1.0 / (1.0 - 1.0 / (memory + 1))
        self._weight = 1.0  # of the next observation; grows instead of decaying all counts
        self._trials = [0.0] * maximum
        self._accepted = [0.0] * maximum
        self._drafted = 0.0  # tokens of the drafts that `_trials[0]` counts
        if self._prior:  # later positions are taken to be like it, times what the prior says of the two
            self._trials[0], self._accepted[0] = MEASURED, MEASURED * self._prior[0]
            self._drafted = MEASURED * len(self._prior)
        self._survival: list[float] | None = None
        self._promises: list[float] | None = None

    def observe(self, num_draft_tokens: int, num_accepted_tokens: int) -> None:
        """Count one verified draft; a draft of length 0 says nothing."""
        self.observe_step({(num_draft_tokens, num_accepted_tokens): 1})

    def observe_step(self, outcomes: Mapping[tuple[int, int], int]) -> None:
        """Count the drafts that one step verified, as happened at the same time: each weighs what they do on average.

        Args:
            outcomes: requests by (drafted tokens, accepted tokens).
        """
        total = sum(times for (drafted, _), times in outcomes.items() if drafted > 0)
        if not total:
            return
        grown = self._growth**total
        each = self._weight * (grown - 1.0) / (self._growth - 1.0) / total
        # By position: drafts whose trials, and whose accepted tokens, end there.
        ends = [[0, 0] for _ in range(self.maximum + 1)]
        for (drafted, accepted), times in outcomes.items():
            reached = min(accepted + 1, drafted, self.maximum)
            ends[reached][0] += times
            ends[min(accepted, reached)][1] += times
            self._drafted += each * times * min(drafted, self.maximum)
        tried = kept = 0
        for position in range(self.maximum, 0, -1):
            tried += ends[position][0]
            kept += ends[position][1]
            self._trials[position - 1] += each * tried
            self._accepted[position - 1] += each * kept
        self._survival = self._promises = None
        self._weight *= grown
        if self._weight > _RESCALE_AT:
            self._rescale()

    def conditional(self) -> list[float]:
        """a_i for i = 1..maximum, each in [0, 1]."""
        strength = PRIOR_STRENGTH * self._weight
        estimates: list[float] = []
        for position in range(self.maximum):
            expected = self._expected(position, estimates[-1] if estimates else None)
            accepted = self._accepted[position] + strength * expected
            estimates.append(accepted / (self._trials[position] + strength))
        return estimates

    def survival(self) -> list[float]:
        """S_i = P(the first i drafted tokens are accepted) = a_1 · … · a_i, for i = 1..maximum."""
        if self._survival is None:
            self._survival = list(itertools.accumulate(self.conditional(), lambda s, a: s * a))
        return self._survival

    def promises(self) -> list[float]:
        """E[accepted tokens] of drafts of length 0..maximum, each length kept for good, [maximum + 1]."""
        if self._promises is None:
            self._promises = accepted_by_length(self.survival(), self._counted_length())
        return list(self._promises)

    def _counted_length(self) -> float:
        """Mean length of the drafts behind the counts; the maximum before there are any."""
        return self._drafted / self._trials[0] if self._trials[0] else float(self.maximum)

    def _expected(self, position: int, before: float | None) -> float:
        """What a position is taken to be before any observation of it, given the position before."""
        if before is None:
            return self._prior[0] if self._prior else MILD_PRIOR
        if position < len(self._prior) and self._prior[position - 1] > 0:
            return min(1.0, before * self._prior[position] / self._prior[position - 1])
        return before

    def _rescale(self) -> None:
        self._trials = [value / self._weight for value in self._trials]
        self._accepted = [value / self._weight for value in self._accepted]
        self._drafted /= self._weight
        self._weight = 1.0


class TrimmedAcceptance:
    """Accepted tokens per request by the maximum given to a step, where drafts are then trimmed request by request.

    Positions of trimmed drafts are reached by promising ones only, so conditional acceptance would promise too much of
    a maximum. What it brought is counted instead, by octave of the batch size, since trimming depends on that.

    Args:
        memory: request-steps of memory.
    """

    def __init__(self, memory: int = MEMORY) -> None:
        self._memory = memory
        self._counts: dict[tuple[int, int], tuple[float, float]] = {}  # accepted tokens, requests
        self._by_draft: dict[tuple[int, int], tuple[float, float]] = {}  # accepted tokens, drafts

    def observe(self, batch: int, maximum: int, num_accepted_tokens: int) -> None:
        """A decode-only step verified what was drafted under that maximum, for `batch` requests together."""
        self._add(self._counts, (octave(batch), maximum), num_accepted_tokens, batch)

    def observe_drafts(self, batch: int, length: int, num_accepted_tokens: int, drafts: int) -> None:
        """So many drafts that were trimmed to that length were verified in a step of `batch` requests."""
        self._add(self._by_draft, (octave(batch), length), num_accepted_tokens, drafts)

    def _add(
        self, counts: dict[tuple[int, int], tuple[float, float]], key: tuple[int, int], accepted: int, of: int
    ) -> None:
        before, among = counts.get(key, (0.0, 0.0))
        keep = max(0.0, 1.0 - of / self._memory)
        counts[key] = (keep * before + accepted, keep * among + of)

    def expected(self, batch: int, length: int, untrimmed: float) -> float:
        """E[accepted tokens] of a draft that was trimmed to that length: a promising one, if it is long.

        Args:
            untrimmed: of whole drafts of this length, which stands until something was counted.
        """
        accepted, drafts = self._by_draft.get((octave(batch), length), (0.0, 0.0))
        return (accepted + PRIOR_STRENGTH * untrimmed) / (drafts + PRIOR_STRENGTH)

    def promises(self, batch: int, untrimmed: Sequence[float]) -> list[float]:
        """E[accepted tokens per request] under a maximum of 0..num_speculative_tokens.

        Args:
            untrimmed: of whole drafts of these lengths, which stands until something was counted.
        """
        promised = list(untrimmed)
        for maximum in range(1, len(promised)):
            accepted, requests = self._counts.get((octave(batch), maximum), (0.0, 0.0))
            prior = PRIOR_STRENGTH * promised[maximum]
            promised[maximum] = (accepted + prior) / (requests + PRIOR_STRENGTH)
        return promised


def conditional_acceptance(unconditional: Sequence[float]) -> list[float]:
    """P(i accepted | i-1 accepted) from P(first i accepted); ends where nothing is ever accepted."""
    conditional: list[float] = []
    before = 1.0
    for share in unconditional:
        if before <= 0:
            break
        conditional.append(min(1.0, max(0.0, share / before)))
        before = share
    return conditional
