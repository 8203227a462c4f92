"""Windows that take turns inside one engine, a few seconds each: what serve_within.py has its server load.

A turn is a run of steps that belongs to one arm: a fixed draft length, or an adaptive window, which is asked and told
in its own turns only; one of these may trim drafts request by request, which is off in all other turns. All arms thus
share process, requests, caches and whatever else the machine does. A turn's first step verifies drafts of the arm
before and counts for nobody. Loaded by vLLM as a plugin (`register`), told what to do by an environment variable. Left
out: starting the server (serve_within.py), comparing (within_table.py).
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

VARIABLE = "PPOW_BENCHMARK_TURNS"  # JSON of an Assignment
LEAST_STEPS = 6  # of a turn, whatever they take


@dataclasses.dataclass(frozen=True)
class Assignment:
    """Who takes turns, and how.

    Attributes:
        lengths: arm -> its draft length; None: an adaptive window chooses.
        seconds: after which a turn ends.
        seed: of the orders.
        output: JSONL file that every turn is appended to when it is over.
        trimming: the arm that also trims drafts request by request, for which the engine must be made; None: none.
    """

    lengths: Mapping[str, int | None]
    seconds: float
    seed: str
    output: str
    trimming: str | None = None


@dataclasses.dataclass
class Turn:
    """A turn, and sums over its steps but the first.

    Attributes:
        rotation, position: where it stands.
        began_at: seconds since the epoch.
        begun, ended: steps, the first one included.
        seconds: wall time.
        tokens: that requests were given.
        prefilled: tokens of prompts.
        requests: request-steps.
        drafted: draft length, or what drafts were trimmed from -> steps.
        verified: drafted tokens, of all requests.
        drafts: that they were in.
    """

    rotation: int
    position: int
    arm: str
    began_at: float
    begun: int = 0
    ended: int = 0
    seconds: float = 0.0
    tokens: int = 0
    prefilled: int = 0
    requests: int = 0
    drafted: dict[int, int] = dataclasses.field(default_factory=dict)
    verified: int = 0
    drafts: int = 0


@dataclasses.dataclass(frozen=True)
class Step:
    """One engine step, from when it is scheduled until its output is there."""

    turn: Turn
    is_first: bool


class Turns:
    """Whose turn it is, and what was made in it.

    Args:
        arms: that take turns, each once in a rotation, in a new random order.
        write: is given every turn that is over.
        clock, wall: seconds; the latter since the epoch.
    """

    def __init__(
        self,
        arms: Sequence[str],
        seconds: float,
        seed: str,
        write: Callable[[Turn], None],
        clock: Callable[[], float] = time.perf_counter,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._arms, self._seconds, self._write, self._clock, self._wall = arms, seconds, write, clock, wall
        self._draw = random.Random(seed)
        self._order: list[str] = []
        self._rotation = -1
        self._ends_at = 0.0
        self._turn: Turn | None = None

    def begin(self) -> Step:
        """A step is scheduled: of the turn under way, or of the next one."""
        before = self._turn
        if before is None or (self._clock() >= self._ends_at and before.begun >= LEAST_STEPS):
            self._turn = self._next()
            if before is not None:
                self._write_if_over(before)
        turn = self._turn
        assert turn is not None
        turn.begun += 1
        return Step(turn, is_first=turn.begun == 1)

    def _next(self) -> Turn:
        if not self._order:
            self._rotation += 1
            self._order = self._draw.sample(self._arms, len(self._arms))
        position = len(self._arms) - len(self._order)
        self._ends_at = self._clock() + self._seconds
        return Turn(self._rotation, position, self._order.pop(0), self._wall())

    def end(self, step: Step, drafted: int, **made: float) -> None:
        """A step's output is there; steps end in the order in which they began.

        Args:
            drafted: draft length.
            made: of the step: seconds, tokens, prefilled, requests, verified, drafts.
        """
        turn = step.turn
        turn.ended += 1
        if not step.is_first:
            for name, value in made.items():
                setattr(turn, name, getattr(turn, name) + value)
            turn.drafted[drafted] = turn.drafted.get(drafted, 0) + 1
        self._write_if_over(turn)

    def _write_if_over(self, turn: Turn) -> None:
        if turn is not self._turn and turn.ended == turn.begun:
            self._write(turn)


class WindowInTurns:
    """DraftWindows that share one engine: each is asked and told in its own turns only, all count together.

    Attributes:
        length: of the turn under way, where it is given; else `asked` chooses it.
        asked: the window of the turn under way.
        told: the window whose doing it is what is observed; None: nobody's.
    """

    def __init__(self, first: Any, others: Sequence[Any] = ()) -> None:
        self._first = first
        for other in others:
            other.counts = first.counts
        self.length: int | None = None
        self.asked: Any = None
        self.told: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._first, name)

    @property
    def by_request(self) -> bool:
        """Whether drafts of the turn under way are trimmed by request."""
        return self.length is None and self.asked.by_request

    def choose(self, *arguments: Any) -> int:
        """The turn's draft length."""
        return self.asked.choose(*arguments) if self.length is None else self.length

    def observe_draft(self, *arguments: Any) -> None:
        """As DraftWindow has it, and the two that follow."""
        if self.told is not None:
            self.told.observe_draft(*arguments)

    def observe_step(self, *arguments: Any) -> None:
        if self.told is not None:
            self.told.observe_step(*arguments)

    def observe_change(self, *arguments: Any) -> None:
        if self.told is not None:
            self.told.observe_change(*arguments)


def windows_of(assignment: Assignment, built: Any, vllm_config: Any) -> dict[str, Any]:
    """The window of every arm that has one.

    Args:
        built: the engine's own.

    Raises:
        RuntimeError: the engine does not trim, and an arm should.
    """
    adaptive = [arm for arm, length in assignment.lengths.items() if length is None]
    if assignment.trimming is None:
        return dict.fromkeys(adaptive, built)
    if "request" not in built.counts.layers:
        raise RuntimeError("This engine does not trim drafts by request; its log says why.")
    from vllm_ppow.compat.window_policy import build_window
    from vllm_ppow.config import WINDOW_KEY

    extra = vllm_config.speculative_config.draft_load_config.model_loader_extra_config
    options = extra[WINDOW_KEY]
    extra[WINDOW_KEY] = {**options, "per_request": False}
    try:
        return {arm: built if arm == assignment.trimming else build_window(vllm_config) for arm in adaptive}
    finally:
        extra[WINDOW_KEY] = options


def in_turns(scheduler: type, assignment: Assignment) -> type:
    """A scheduler of vllm_ppow.scheduler whose arms take turns."""

    class InTurns(scheduler):  # type: ignore[misc, valid-type]
        ppow_window: Any

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._windows = windows_of(assignment, self.ppow_window, self.vllm_config)
            others = [window for window in self._windows.values() if window is not self.ppow_window]
            self.ppow_window = WindowInTurns(self.ppow_window, others)
            self.ppow_turns = Turns(
                list(assignment.lengths), assignment.seconds, assignment.seed, self._append
            )
            self._under_way: collections.deque[Step] = collections.deque()
            self._ended_at = 0.0

        def _append(self, turn: Turn) -> None:
            with Path(assignment.output).open("a") as file:
                file.write(json.dumps(dataclasses.asdict(turn)) + "\n")

        def _update_after_schedule(self, scheduler_output: Any) -> None:
            if scheduler_output.num_scheduled_tokens:
                step = self.ppow_turns.begin()
                self._under_way.append(step)
                arm = step.turn.arm
                self.ppow_window.length = assignment.lengths[arm]
                self.ppow_window.asked = self._windows.get(arm)
            super()._update_after_schedule(scheduler_output)

        def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
            scheduled = scheduler_output.num_scheduled_tokens
            if not scheduled:
                return super().update_from_output(scheduler_output, model_runner_output)
            step = self._under_way.popleft()
            self.ppow_window.told = None if step.is_first else self._windows.get(step.turn.arm)
            outputs = super().update_from_output(scheduler_output, model_runner_output)
            now = time.perf_counter()
            seconds, self._ended_at = now - self._ended_at, now
            verified = sum(map(len, scheduler_output.scheduled_spec_decode_tokens.values()))
            self.ppow_turns.end(
                step,
                scheduler_output.num_spec_tokens_to_schedule,
                seconds=seconds,
                tokens=sum(len(one.new_token_ids) for each in outputs.values() for one in each.outputs),
                prefilled=scheduler_output.total_num_scheduled_tokens - len(scheduled) - verified,
                requests=len(scheduled),
                verified=verified,
                drafts=len(scheduler_output.scheduled_spec_decode_tokens),
            )
            return outputs

    return InTurns


def register() -> None:
    """Entry point of group `vllm.general_plugins`: vLLM calls it in every process, also more than once."""
    if (text := os.environ.get(VARIABLE)) is None:
        return
    from vllm_ppow import scheduler

    assignment = Assignment(**json.loads(text))
    names = ("PPOWScheduler", "PPOWAsyncScheduler")
    if any(getattr(scheduler, name).__name__ != name for name in names):
        return  # is there already
    for name in names:
        setattr(scheduler, name, in_turns(getattr(scheduler, name), assignment))
