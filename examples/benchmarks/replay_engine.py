"""An engine that is replayed: real texts, step times that were measured, and a pace that wanders as the machine's did.

A text is a list: how many tokens of a draft the target accepts behind its first token, behind its second, and so on. At
temperature 0 that decides everything a drafter and a target do, so that a run of minutes is replayed in a second, and
many runs tell what a window is worth beyond the luck of one. Left out: where texts and times come from
(replay_window.py), and requests that come and go: there are always as many as there were clients.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Iterator, Sequence

from vllm_ppow.window import DraftWindow

STEP_NOISE = 0.05  # of one step's time around the machine's pace, log scale


@dataclasses.dataclass(frozen=True)
class Machine:
    """What steps take at one load.

    Attributes:
        batch: requests.
        step_seconds: of a step that only decodes, by draft length from 0 on.
        prompt_tokens: of every request.
        prompt_seconds: of every prompt that a step also reads.
        pace_spread: standard deviation of the logarithm of the machine's pace.
        pace_seconds: after which the pace has forgotten 63 % of what it was.
    """

    batch: int
    step_seconds: tuple[float, ...]
    prompt_tokens: int
    prompt_seconds: float
    pace_spread: float
    pace_seconds: float


@dataclasses.dataclass
class Made:
    """Sums over steps.

    Attributes:
        seconds: they take at the machine's usual pace.
        tokens: that requests were given.
        drafted: steps by draft length.
    """

    seconds: float
    tokens: int
    drafted: list[int]


@dataclasses.dataclass
class _Request:
    text: Sequence[int]
    produced: int = 0

    def step(self, drafted: int) -> tuple[int, int | None]:
        """(tokens that a step gives it, of them accepted draft tokens; None: its prompt was read)."""
        if not self.produced:
            self.produced = 1
            return 1, None
        accepted = min(drafted, self.text[self.produced - 1])
        self.produced += accepted + 1
        return accepted + 1, accepted

    def is_over(self) -> bool:
        return self.produced > len(self.text)


class Engine:
    """Serves texts in random order, `machine.batch` at a time.

    Args:
        texts: accepted tokens by start.
        seed: of their order, the pace, and the noise of steps.
    """

    def __init__(self, machine: Machine, texts: Sequence[Sequence[int]], seed: int) -> None:
        self._machine, self._texts = machine, texts
        self._random = random.Random(seed)
        self._next = self._order(random.Random(f"{seed} texts"))
        self._requests = [_Request(next(self._next)) for _ in range(machine.batch)]
        for request in self._requests:  # not all of them begin at the same time
            request.produced = self._random.randrange(len(request.text))
        self._drafted = 0  # tokens of the drafts that the next step verifies
        self._log_pace = self._random.gauss(0.0, machine.pace_spread)

    def _order(self, random_order: random.Random) -> Iterator[Sequence[int]]:
        while True:
            yield from random_order.sample(self._texts, len(self._texts))

    def fixed(self, length: int, steps: int) -> Made:
        """Serve so many steps at one draft length."""
        return self._serve(steps, lambda decodes: length, None)

    def adaptive(self, window: DraftWindow, steps: int) -> Made:
        """Serve so many steps whose draft lengths a window chooses, which is told their outcome."""
        batch = self._machine.batch
        return self._serve(
            steps, lambda decodes: window.choose(batch, self._context(), decodes=decodes), window
        )

    def _context(self) -> int:
        """Tokens of all requests together."""
        return sum(self._machine.prompt_tokens + request.produced for request in self._requests)

    def _serve(self, steps: int, choose: Callable[[bool], int], window: DraftWindow | None) -> Made:
        made = Made(0.0, 0, [0] * len(self._machine.step_seconds))
        for _ in range(steps):
            prompts = sum(not request.produced for request in self._requests)
            length, context = choose(not prompts), self._context()
            verified, self._drafted = self._drafted, length
            accepted = self._step(verified, made, window)
            # It verifies drafts of one length and drafts another: what is neither is taken to be half of each.
            seconds = sum(self._machine.step_seconds[n] for n in (verified, length)) / 2
            made.drafted[length] += 1
            made.seconds += seconds + prompts * self._machine.prompt_seconds
            clock = seconds * self._pace(seconds)
            if window is None or prompts:
                continue
            if verified == length:
                window.observe_step(clock, self._machine.batch, length, context, accepted)
            else:
                window.observe_change(clock, self._machine.batch, max(verified, length))
        return made

    def _step(self, verified: int, made: Made, window: DraftWindow | None) -> int:
        """Give every request its tokens; the accepted ones of them, all together."""
        total = 0
        for at, request in enumerate(self._requests):
            tokens, accepted = request.step(verified)
            made.tokens += tokens
            if accepted is not None:
                total += accepted
                if window is not None:
                    window.observe_draft(verified, accepted)
            if request.is_over():
                self._requests[at] = _Request(next(self._next))
        return total

    def _pace(self, seconds: float) -> float:
        """What the clock shows over what a step takes at the usual pace (an Ornstein-Uhlenbeck process, ours)."""
        kept = math.exp(-seconds / self._machine.pace_seconds)
        drawn = self._random.gauss(0.0, self._machine.pace_spread * math.sqrt(1.0 - kept**2))
        self._log_pace = kept * self._log_pace + drawn
        return math.exp(self._log_pace + self._random.gauss(0.0, STEP_NOISE))
