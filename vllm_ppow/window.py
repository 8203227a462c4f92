"""Draft window policy: how many tokens each engine step drafts, so that tokens per second are most.

One number K per step, for the whole batch: the one that maximises (B + B · E[accepted(K)]) / step_seconds(B, K), with
accepted tokens from acceptance.py and seconds from step_cost.py. Now and then it drafts a little longer or shorter for
two steps, so that what it knows of other lengths stays true; these probes may cost half a percent of throughput, and
two percent where a length was never timed. Where changing the length makes the engine pause, it is changed less
(change_cost.py). K = 0 is a choice like any other, and probed out of. Left out: where vLLM asks for K and reports
outcomes (scheduler.py), and lengths that differ between requests (compat/draft_window.py). Pure Python.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from vllm_ppow.acceptance import AcceptanceEstimate, TrimmedAcceptance
from vllm_ppow.change_cost import ChangeCost
from vllm_ppow.octave import octave
from vllm_ppow.speedup import tokens_per_second
from vllm_ppow.step_cells import bucket
from vllm_ppow.step_cost import StepCost

# A new K must promise this much more than the one of the step before, and what changing costs (change_cost.py) must
# come back within so many steps.
HYSTERESIS, PAID_BACK_WITHIN = 0.005, 64
# Share of throughput that probes may cost: of lengths that were timed at such batch sizes, and of others. Where our
# drafter trims by request there is little to find out: drafts that do not pay it ends by itself.
PROBE_BUDGET, FIRST_PROBE_BUDGET, TRIMMED_PROBE_BUDGET = 0.005, 0.02, 0.001
# Steps between probes, whatever they cost.
PROBE_EVERY = (24, 1024)
# Steps that also prefill are not timed: probes wait for others, but no longer than this many times as long.
_PATIENCE = 4
# A probe holds its K for so many steps: the first drafts it, the others also verify it and are timed. The first of
# these do not count where the length is new (step_cost.py), so a first probe is longer. Through as many steps that also
# prefill as are to be timed it is held besides: under load few others come one after the other.
_PROBE_STEPS, _FIRST_PROBE_STEPS = 2, 5
# Probes that a length which was never timed gets before others, in one octave of batch sizes.
_FIRST_PROBES = 6
# Steps given to one draft length while costs are being identified, even if none of them could be timed; _PATIENCE times
# as many that also prefill.
_LEARNING_STEPS = 8
# Every so many steps the choice is computed anew for batch sizes that are alike, and what drafts promise; in between
# both stand.
_DECIDE_EVERY = 4


@dataclasses.dataclass
class WindowCounts:
    """What the window did since the engine started; counts and sums only, divided by whoever reads them.

    Attributes:
        chosen: steps by number of draft tokens chosen, [num_speculative_tokens + 1]; where drafts are trimmed by
            request, the most that any could have.
        probes: steps of them that were probes or learned costs.
        requests: request-steps that a draft length was chosen for.
        speedup: Σ over steps of expected rate at K over expected rate at K = 0.
        drafts: drafts verified, or refused by a grammar.
        drafted, accepted: their tokens that were verified, and those accepted.
        predicted: Σ over these drafts of the accepted tokens that were expected of their length, as they were chosen:
            whole, or trimmed by request.
        absolute_error: Σ over steps of |predicted - accepted| in that step.
        layers: names of the layers that decide lengths here.
    """

    chosen: list[int]
    probes: int = 0
    requests: int = 0
    speedup: float = 0.0
    drafts: int = 0
    drafted: int = 0
    accepted: int = 0
    predicted: float = 0.0
    absolute_error: float = 0.0
    layers: tuple[str, ...] = ("step",)

    def __sub__(self, before: WindowCounts) -> WindowCounts:
        """What was added since `before`."""
        values = {
            field.name: getattr(self, field.name) - getattr(before, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("chosen", "layers")
        }
        chosen = [now - then for now, then in zip(self.chosen, before.chosen, strict=True)]
        return WindowCounts(chosen, **values, layers=self.layers)

    def copy(self) -> WindowCounts:
        """A snapshot, to subtract later."""
        return dataclasses.replace(self, chosen=list(self.chosen))


@dataclasses.dataclass(frozen=True)
class _Decision:
    """What is best for batch sizes that are alike.

    Attributes:
        step: when it was made.
        length: that promises most, but for what changing costs.
        promised: tokens per second of each length.
        at_zero: tokens per second without drafts.
        seconds: of a step at each length.
    """

    step: int
    length: int
    promised: list[float]
    at_zero: float
    seconds: list[float]


@dataclasses.dataclass
class _Held:
    """A probe under way: its length, how many steps more, and how many that also prefill; wait of each in steps."""

    length: int
    steps: int
    prefilling: int
    wait: float


class DraftWindow:
    """The policy of one engine: told what happened, asked for the next step's draft length.

    Args:
        lengths: draft lengths to choose from, ascending; the last is num_speculative_tokens.
        acceptance: estimate to use and feed.
        cost: costs to use and feed.
        trimmed: what maxima bring, where drafts are trimmed by request and `lengths` are their maxima.
        by_request: whether it is our drafter that trims them.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        acceptance: AcceptanceEstimate,
        cost: StepCost,
        trimmed: TrimmedAcceptance | None = None,
        by_request: bool = False,
    ) -> None:
        if not lengths or list(lengths) != sorted(set(lengths)) or lengths[0] < 0:
            raise ValueError(f"Draft lengths must ascend from 0 or more, got {list(lengths)}.")
        self.lengths = tuple(lengths)
        self.acceptance, self.cost, self.trimmed, self.by_request = acceptance, cost, trimmed, by_request
        self.counts = WindowCounts([0] * (self.lengths[-1] + 1))
        self.changing = ChangeCost()
        self._current = self.lengths[-1]
        self._held: _Held | None = None
        self._learning: dict[tuple[int, int], float] = {}
        self._first_probes: dict[tuple[int, int], int] = {}
        self._since_probe = 0.0
        self._probes = 0
        self._decided: dict[int, _Decision] = {}
        self._step = 0
        # (drafted, accepted) -> requests, of the step under way
        self._outcomes: dict[tuple[int, int], int] = {}
        self._promise = acceptance.promises()
        self._promised_at = 0

    def choose(self, batch: int, context: int | None = None, decodes: bool = True, sampled: int = 0) -> int:
        """Draft length for the next draft of a step.

        Args:
            batch: requests (>= 1).
            context: tokens of all of them together.
            decodes: whether the step only decodes, so that its time tells something.
            sampled: of the requests, those that sample: nothing to this policy, which serves whatever comes; two of
                them share the traffic by it (traffic_window.py).
        """
        self._step += 1
        self._since_probe += 1
        self._close_step(batch)
        best = self._best(batch, context)
        length = self._choose(best, batch, decodes)
        counts = self.counts
        counts.chosen[length] += 1
        counts.requests += batch
        if length != best.length:
            counts.probes += 1
        counts.speedup += best.promised[self.lengths.index(length)] / best.at_zero
        return length

    def observe_draft(
        self, num_draft_tokens: int, num_accepted_tokens: int, num_refused_tokens: int = 0
    ) -> None:
        """One request's draft was verified.

        Args:
            num_draft_tokens: drafted.
            num_accepted_tokens: of them, accepted.
            num_refused_tokens: of them, the last ones, that a grammar refused before verification. The first of these
                is a rejection like any other; verified they are not, and not counted as vLLM does not.
        """
        if num_draft_tokens < 1:
            return
        counts = self.counts
        counts.drafts += 1
        counts.drafted += num_draft_tokens - num_refused_tokens
        counts.accepted += num_accepted_tokens
        # Called for every request of every step: all else is done once a step, for those of one outcome together.
        outcome = (num_draft_tokens, num_accepted_tokens)
        self._outcomes[outcome] = self._outcomes.get(outcome, 0) + 1

    def observe_step(
        self,
        seconds: float,
        batch: int,
        num_draft_tokens: int,
        context: int = 0,
        num_accepted_tokens: int = 0,
    ) -> None:
        """A decode-only step at a steady draft length took this long and accepted that much of all its drafts."""
        self._compare(seconds, batch, num_draft_tokens, changed=False)
        self.cost.observe(seconds, batch, num_draft_tokens, context)
        if self.trimmed is not None:
            self.trimmed.observe(batch, num_draft_tokens, num_accepted_tokens)

    def observe_change(self, seconds: float, batch: int, longer: int) -> None:
        """A decode-only step took this long that verified drafts of one length and drafted another.

        Args:
            longer: the larger of the two lengths.
        """
        self._compare(seconds, batch, longer, changed=True)

    def _compare(self, seconds: float, batch: int, num_draft_tokens: int, changed: bool) -> None:
        """Tell `changing` how much longer than expected a step took, if enough is known to expect anything."""
        decision = self._decided.get(bucket(batch))
        if (
            decision is None
            or num_draft_tokens not in self.lengths
            or not self.cost.is_timed(batch, num_draft_tokens)
        ):
            return
        expected = decision.seconds[self.lengths.index(num_draft_tokens)]
        self.changing.observe(seconds / expected - 1.0, changed)

    def _close_step(self, batch: int) -> None:
        """Learn from the step's outcomes, and book how far its acceptance was from what was promised."""
        predicted, accepted = 0.0, 0
        for (num_draft_tokens, num_accepted_tokens), times in self._outcomes.items():
            predicted += times * self._expected(batch, min(num_draft_tokens, self.lengths[-1]))
            accepted += times * num_accepted_tokens
        if self.trimmed is not None:
            for (num_draft_tokens, num_accepted_tokens), times in self._outcomes.items():
                self.trimmed.observe_drafts(batch, num_draft_tokens, times * num_accepted_tokens, times)
        self.acceptance.observe_step(self._outcomes)
        self.counts.predicted += predicted
        self.counts.absolute_error += abs(predicted - accepted)
        self._outcomes.clear()

    def _expected(self, batch: int, num_draft_tokens: int) -> float:
        """E[accepted tokens] of a draft that has become so long."""
        promised = self._promise[num_draft_tokens]
        return promised if self.trimmed is None else self.trimmed.expected(batch, num_draft_tokens, promised)

    def _choose(self, best: _Decision, batch: int, decodes: bool) -> int:
        """The best length, or another one to learn from."""
        if self._held is not None:
            return self._hold(self._held, decodes)
        if (unlearned := self._unlearned(batch, decodes)) is not None:
            return unlearned
        probe = self._due_probe(batch, best, decodes)
        return best.length if probe is None else probe

    def _hold(self, held: _Held, decodes: bool) -> int:
        """Length of the probe under way, in one step more of it."""
        if decodes:
            held.steps -= 1
        else:
            held.prefilling -= 1
            self._since_probe -= held.wait  # what it costs is made up for
        if not held.steps or not held.prefilling:
            self._held = None
        return held.length

    def _best(self, batch: int, context: int | None) -> _Decision:
        """The decision that stands for such batch sizes, made anew where it is due."""
        changing = self.changing.steps
        decided = self._decided.get(bucket(batch))
        if (
            decided is not None
            and self._step < decided.step + _DECIDE_EVERY
            and (not changing or decided.length == self._current)
        ):
            return decided
        if self._step >= self._promised_at + _DECIDE_EVERY:
            self._promise, self._promised_at = self.acceptance.promises(), self._step
        promises = self._promise if self.trimmed is None else self.trimmed.promises(batch, self._promise)
        seconds = self.cost.table(batch, self.lengths, context)
        promised = [
            tokens_per_second(batch, promises[length], second)
            for length, second in zip(self.lengths, seconds, strict=True)
        ]
        most = max(promised)
        at = self.lengths.index(self._current)
        if promised[at] * (1 + HYSTERESIS + changing / PAID_BACK_WITHIN) < most:
            self._current = self.lengths[promised.index(most)]
        at_zero = batch / self.cost.step_seconds(batch, 0, context) if self.lengths[0] else promised[0]
        best = _Decision(self._step, self._current, promised, at_zero, seconds)
        self._decided[bucket(batch)] = best
        return best

    def _unlearned(self, batch: int, decodes: bool) -> int | None:
        """A draft length whose cost near this batch size is not known yet, a bounded number of steps each."""
        for length in self.cost.wanted(batch, self.lengths):
            spent = self._learning.get((octave(batch), length), 0)
            if spent < _LEARNING_STEPS:
                self._learning[octave(batch), length] = spent + (1.0 if decodes else 1.0 / _PATIENCE)
                return length
        return None

    def _due_probe(self, batch: int, decided: _Decision, decodes: bool) -> int | None:
        """The length to probe now, if its turn has come: mostly the next longer one, the dearer the rarer."""
        if self._since_probe < PROBE_EVERY[0]:
            return None
        best, promised = decided.length, decided.promised
        probe = self._next_probe(batch, best)
        if probe is None:
            return None
        slower = promised[self.lengths.index(best)] / promised[self.lengths.index(probe)] - 1.0
        tokens = (1.0 + self._promise[probe]) / (1.0 + self._promise[best])
        is_new = not self.cost.is_timed(batch, probe)
        usual = TRIMMED_PROBE_BUDGET if self.by_request and best else PROBE_BUDGET
        held, budget = (_FIRST_PROBE_STEPS, FIRST_PROBE_BUDGET) if is_new else (_PROBE_STEPS, usual)
        steps = held * slower * tokens / budget  # what the probe loses, in steps at the best length
        wait = min(max(steps, PROBE_EVERY[0]), PROBE_EVERY[1])
        wait += 2 * self.changing.steps / budget  # to the probe's length and back
        if self._since_probe < (wait if decodes else _PATIENCE * wait):
            return None
        self._since_probe = 0.0
        self._probes += 1
        self._held = _Held(probe, held - 1, held - 1, wait / held)
        if is_new:
            key = (octave(batch), probe)
            self._first_probes[key] = self._first_probes.get(key, 0) + 1
        return probe

    def _next_probe(self, batch: int, best: int) -> int | None:
        """The length to probe next; None where there is no other.

        One beside the best that was never timed at such batch sizes comes first, a bounded number of times: traffic may
        leave it untimed all the same, and others must have their turn.
        """
        at = self.lengths.index(best)
        for beside in self.lengths[max(0, at - 1) : at] + self.lengths[at + 1 : at + 2]:
            if not self.cost.is_timed(batch, beside):
                spent = self._first_probes.get((octave(batch), beside), 0)
                if spent < _FIRST_PROBES:
                    return beside
        others = self._neighbours(best)
        return others[self._probes % len(others)] if others else None

    def _neighbours(self, best: int) -> list[int]:
        """Lengths around the best in the order they are probed: next longer, next shorter, longer, half, far longer."""
        at, last = self.lengths.index(best), len(self.lengths) - 1
        turns = (at + 1, at - 1, at + 1, at + 2, at // 2, at + 1, at - 1, at + 4)
        return [self.lengths[turn] for turn in turns if 0 <= turn <= last and turn != at]
