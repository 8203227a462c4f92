"""Output tokens per second of several engines on the same GPU: as many up at once as fit, loaded in turns.

A GPU's pace changes with its temperature and with what else the machine does, so that what counts are ratios of runs
that are neighbours in time: in every round each arm continues the same prompts, one arm at a time while the others
wait. Where not all fit, they come in groups, each with the arm NONE. Left out: which arms (steps.py), tables
(summary.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from engines import prompts

from ppow_train.errors import UserError
from ppow_train.serving_eval import Engine, EngineOptions, Run
from vllm_ppow.compat.capabilities import V2_RUNNER

NONE = "none"


@dataclasses.dataclass(frozen=True)
class Arm:
    """One engine.

    Attributes:
        spec: its speculative config; None: no speculation.
        runner: value of VLLM_USE_V2_MODEL_RUNNER, "0" or "1"; None leaves the choice to vLLM.
    """

    name: str
    spec: dict[str, Any] | None
    runner: str | None


@dataclasses.dataclass(frozen=True)
class Load:
    """What every arm is given.

    Attributes:
        batches: requests that decode together, one figure per batch size and round.
        max_tokens: output tokens of each.
        rounds: that are measured, after one that is not.
        seconds: no round begins later than this after the first began.
        vocab_size: that prompts are drawn from.
    """

    batches: tuple[int, ...]
    max_tokens: int
    rounds: int
    seconds: float
    vocab_size: int


def groups(arms: Sequence[Arm], at_once: int) -> list[list[Arm]]:
    """Arms that are up together, at most `at_once` (>= 1); with 2 or more, NONE is in every group that it fits in."""
    base = [arm for arm in arms if arm.name == NONE]
    others = [arm for arm in arms if arm.name != NONE]
    if at_once < 2 or not base:
        return [[*arms[i : i + at_once]] for i in range(0, len(arms), at_once)]
    size = at_once - 1
    return [base + others[i : i + size] for i in range(0, max(1, len(others)), size)]


def measure(
    group: Sequence[Arm],
    options: EngineOptions,
    load: Load,
    results: Path,
    say: Callable[[str], None],
) -> list[str]:
    """Measure the arms of one group and append each figure to `results`, a JSONL file, as soon as it is known.

    Args:
        options: of every engine; `neighbours` is set here.

    Returns:
        One sentence for each arm that did not start; the others are measured.
    """
    with contextlib.ExitStack() as stack:
        up, failures = _start(stack, group, dataclasses.replace(options, neighbours=len(group) - 1))
        for one in failures:
            say(one)
        for figure in _rounds(up, load, say):
            _append(results, figure)
    return failures


def _start(
    stack: contextlib.ExitStack, group: Sequence[Arm], options: EngineOptions
) -> tuple[dict[str, Engine], list[str]]:
    """Engines that came up, by name, and what became of the others."""
    started = {}
    for arm in group:
        with _runner(arm.runner):
            started[arm.name] = stack.enter_context(Engine(arm.name, options, arm.spec))
    up, failures = {}, []
    for name, engine in started.items():
        try:
            engine.wait_until_ready()
        except UserError as error:
            failures.append(str(error))
        else:
            up[name] = engine
    return up, failures


@contextlib.contextmanager
def _runner(value: str | None) -> Iterator[None]:
    """The environment that an engine's process is started with."""
    before = os.environ.pop(V2_RUNNER, None)
    if value is not None:
        os.environ[V2_RUNNER] = value
    try:
        yield
    finally:
        os.environ.pop(V2_RUNNER, None)
        if before is not None:
            os.environ[V2_RUNNER] = before


def _rounds(up: dict[str, Engine], load: Load, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Figures of every arm at every batch size; which arm begins changes from round to round."""
    names = list(up)
    began = time.monotonic()
    for number in range(-1, load.rounds):
        if number >= 0 and time.monotonic() - began > load.seconds:
            return
        say(f"round {number + 1} of {load.rounds}" if number >= 0 else "warm-up")
        turn = max(number, 0) % max(len(names), 1)
        for batch in load.batches:
            for name in names[turn:] + names[:turn]:
                run = up[name].run(
                    prompts(batch, load.vocab_size),
                    max_tokens=load.max_tokens,
                    temperature=0.0,
                    ignore_eos=True,  # a random draft that is accepted may be the end of a text
                )
                if number >= 0:
                    yield {"round": number, "arm": name, "batch": batch, **_figures(run, batch, load)}


def _figures(run: Run, batch: int, load: Load) -> dict[str, Any]:
    if run.num_tokens != batch * load.max_tokens:
        raise UserError(
            f"{batch} requests ended after {run.num_tokens} tokens instead of {batch * load.max_tokens}: "
            "their speed cannot be compared."
        )
    counts = run.counts
    return {
        "tokens_per_second": run.tokens_per_second,
        "steps": len(run.step_seconds),
        "median_step_seconds": statistics.median(run.step_seconds),
        "longest_step_seconds": max(run.step_seconds),  # a pause of one step, or all steps slower?
        "allocation_retries": run.allocation_retries,
        **(
            {
                "num_drafts": counts.num_drafts,
                "num_draft_tokens": counts.num_draft_tokens,
                "num_accepted_tokens": counts.num_accepted_tokens,
            }
            if counts is not None
            else {}
        ),
    }


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
