"""An engine that is replayed: real texts, step times that were measured, and a pace that wanders as the machine's did.

At temperature 0 a text (replay_texts.py) decides everything a drafter and a target do, so that a run of minutes is
replayed in a second, and many runs tell what a window is worth beyond the luck of one. A step verifies drafts and then
makes the next ones; what the two take is kept apart, since drafts that are trimmed request by request are verified for
fewer tokens than the drafter made passes. Left out: where texts and times come from (replay_texts.py,
replay_window.py), and requests that come and go: there are always as many as there were clients.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from replay_texts import Text

from vllm_ppow.request_window import RequestWindow
from vllm_ppow.window import DraftWindow

STEP_NOISE = 0.05  # of one step's time around the machine's pace, log scale


@dataclasses.dataclass(frozen=True)
class Machine:
    """What steps take at one load.

    Attributes:
        batch: requests.
        step_seconds: of a step that only decodes, by draft length from 0 on: that many tokens verified, and drafted.
        draft_seconds: of them the drafter's, likewise.
        prompt_tokens: of every request.
        prompt_seconds: of every prompt that a step also reads.
        pace_spread: standard deviation of the logarithm of the machine's pace.
        pace_seconds: after which the pace has forgotten 63 % of what it was.
    """

    batch: int
    step_seconds: tuple[float, ...]
    draft_seconds: tuple[float, ...]
    prompt_tokens: int
    prompt_seconds: float
    pace_spread: float
    pace_seconds: float

    def verifying(self, mean_length: float) -> float:
        """Seconds of what is not the drafter's, of drafts of that many tokens in the mean."""
        lengths = range(len(self.step_seconds))
        other = [step - draft for step, draft in zip(self.step_seconds, self.draft_seconds, strict=True)]
        return float(np.interp(mean_length, lengths, other))


@dataclasses.dataclass
class Made:
    """Sums over steps.

    Attributes:
        seconds: they take at the machine's usual pace.
        tokens: that requests were given.
        drafted: steps by draft length, or by the maximum of drafts that were trimmed.
        verified: draft tokens.
    """

    seconds: float
    tokens: int
    drafted: list[int]
    verified: int = 0


@dataclasses.dataclass
class _Request:
    text: Text
    produced: int = 0
    draft: int = 0  # tokens of its draft that the next step verifies
    # Of these tokens, where they were trimmed.
    confidences: list[float] = dataclasses.field(default_factory=list)

    def step(self) -> tuple[int, int | None]:
        """(tokens that a step gives it, of them accepted draft tokens; None: its prompt was read)."""
        if not self.produced:
            self.produced = 1
            return 1, None
        accepted = min(self.draft, self.text.accepted[self.produced - 1])
        self.produced += accepted + 1
        return accepted + 1, accepted

    def is_over(self) -> bool:
        return self.produced > len(self.text.accepted)


class Engine:
    """Serves texts in random order, `machine.batch` at a time.

    Args:
        seed: of their order, the pace, and the noise of steps.
    """

    def __init__(self, machine: Machine, texts: Sequence[Text], seed: int) -> None:
        self._machine, self._texts = machine, texts
        self._random = random.Random(seed)
        self._next = self._order(random.Random(f"{seed} texts"))
        self._requests = [_Request(next(self._next)) for _ in range(machine.batch)]
        for request in self._requests:  # not all of them begin at the same time
            request.produced = self._random.randrange(len(request.text.accepted))
        self._drafted = 0  # length of the drafts that the next step verifies, or the maximum of trimmed ones
        self._drafting = 0.0  # what making them took, by the clock; 0 where nothing trims
        self._log_pace = self._random.gauss(0.0, machine.pace_spread)

    def _order(self, random_order: random.Random) -> Iterator[Text]:
        while True:
            yield from random_order.sample(self._texts, len(self._texts))

    def fixed(self, length: int, steps: int) -> Made:
        """Serve so many steps at one draft length."""
        return self._serve(steps, lambda decodes: length, None, None)

    def adaptive(self, window: DraftWindow, steps: int, trimming: RequestWindow | None = None) -> Made:
        """Serve so many steps whose draft lengths a window chooses, which is told their outcome.

        Args:
            trimming: trims drafts request by request below the length that the window chose.
        """
        batch = self._machine.batch
        return self._serve(
            steps, lambda decodes: window.choose(batch, self._context(), decodes=decodes), window, trimming
        )

    def _context(self) -> int:
        """Tokens of all requests together."""
        return sum(self._machine.prompt_tokens + request.produced for request in self._requests)

    def _serve(
        self,
        steps: int,
        choose: Callable[[bool], int],
        window: DraftWindow | None,
        trimming: RequestWindow | None,
    ) -> Made:
        made = Made(0.0, 0, [0] * len(self._machine.step_seconds))
        for _ in range(steps):
            prompts = sum(not request.produced for request in self._requests)
            decodes, before, tokens = not prompts, self._drafted, made.tokens
            length, context = choose(decodes), self._context()
            verified = sum(request.draft for request in self._requests)
            accepted = self._verify(made, window, trimming)
            seconds = self._machine.verifying(verified / self._machine.batch)
            clock = seconds * self._pace(seconds)
            if trimming is not None and self._drafting and decodes:
                batch = self._machine.batch
                trimming.verify_price.observe(batch, batch + verified, clock)
                trimming.observe_step(batch, made.tokens - tokens, clock + self._drafting)
            drafting, drafting_clock = self._draft(length, trimming)
            self._drafted = length
            made.drafted[length] += 1
            made.verified += verified
            made.seconds += seconds + drafting + prompts * self._machine.prompt_seconds
            if window is not None and decodes:
                self._tell(window, before, length, clock + drafting_clock, context, accepted)
        return made

    def _tell(
        self, window: DraftWindow, before: int, length: int, seconds: float, context: int, accepted: int
    ) -> None:
        if before == length:
            window.observe_step(seconds, self._machine.batch, length, context, accepted)
        else:
            window.observe_change(seconds, self._machine.batch, max(before, length))

    def _verify(self, made: Made, window: DraftWindow | None, trimming: RequestWindow | None) -> int:
        """Give every request its tokens; the accepted ones of them, all together."""
        total = 0
        for at, request in enumerate(self._requests):
            tokens, accepted = request.step()
            made.tokens += tokens
            if accepted is not None:
                total += accepted
                if window is not None:
                    window.observe_draft(request.draft, accepted)
                if trimming is not None and request.confidences:
                    trimming.observe(False, request.confidences, accepted)
            if request.is_over():
                self._requests[at] = _Request(next(self._next))
        return total

    def _draft(self, length: int, trimming: RequestWindow | None) -> tuple[float, float]:
        """Draft for every request that has been read; seconds at the usual pace, and by the clock."""
        if trimming is not None and length:
            seconds, clock = self._draft_trimmed(length, trimming)
        else:
            for request in self._requests:
                request.draft, request.confidences = (length if request.produced else 0), []
            seconds = self._machine.draft_seconds[length]
            clock = seconds * self._pace(seconds)
            if trimming is not None:
                trimming.pause()
        self._drafting = clock if trimming is not None else 0.0
        return seconds, clock

    def _draft_trimmed(self, most: int, trimming: RequestWindow) -> tuple[float, float]:
        """As `_draft`, pass by pass, until the drafter has had enough."""
        active = [bool(request.produced) for request in self._requests]
        trimming.begin(most, [False] * len(active), active)
        seconds = clock = 0.0
        for position in range(most):
            one = self._machine.draft_seconds[position + 1] - seconds
            by_clock = one * self._pace(one)
            seconds, clock = seconds + one, clock + by_clock
            if position:  # the first pass reads what was verified
                trimming.pass_price.observe(len(active), by_clock)
            if not trimming.add([_confidence(request, position) for request in self._requests]):
                break
        for request, draft, sure in zip(
            self._requests, trimming.lengths(), trimming.confidences, strict=True
        ):
            request.draft, request.confidences = draft, sure[:draft]
        return seconds, clock

    def _pace(self, seconds: float) -> float:
        """What the clock shows over what it takes at the usual pace (an Ornstein-Uhlenbeck process, ours)."""
        kept = math.exp(-seconds / self._machine.pace_seconds)
        drawn = self._random.gauss(0.0, self._machine.pace_spread * math.sqrt(1.0 - kept**2))
        self._log_pace = kept * self._log_pace + drawn
        return math.exp(self._log_pace + self._random.gauss(0.0, STEP_NOISE))


def _confidence(request: _Request, position: int) -> float:
    """How sure the drafter is of a draft's token; of requests that are being read nobody asks."""
    return request.text.confidence(request.produced - 1, position) if request.produced else 1.0
