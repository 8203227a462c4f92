"""Draft windows that take turns inside one engine on the GPU: the adaptive one, every fixed length, and none.

Engines beside each other need the GPU's memory several times over, and their rounds are seconds apart; here steps a
third of a second apart differ in their draft length only (../within_scheduler.py). Requests decode together, and turns
in which one of them had ended do not count. Left out: the pair and its engine (steps.py), what becomes of the turns
(summary.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import within_scheduler
from arms import Load
from engines import prompts
from sweep_table import ADAPTIVE, NONE, fixed
from turns_table import LEAST_ROTATIONS
from within_table import read_turns, whole_rotations

TURN_SECONDS = 0.3


@contextlib.contextmanager
def turns_in(file: Path, draft_lengths: Sequence[int], turn_seconds: float) -> Iterator[list[str]]:
    """Engines that start here have their windows take turns; the arms."""
    file.unlink(missing_ok=True)
    lengths: dict[str, int | None] = {NONE: 0} | {fixed(k): k for k in draft_lengths} | {ADAPTIVE: None}
    given = within_scheduler.Assignment(lengths, turn_seconds, "0", str(file))
    os.environ[within_scheduler.VARIABLE] = json.dumps(dataclasses.asdict(given))
    within_scheduler.register()
    try:
        yield list(lengths)
    finally:
        del os.environ[within_scheduler.VARIABLE]


def steady(turns: Sequence[dict[str, Any]], batch: int) -> list[dict[str, Any]]:
    """Turns in which every counted step held that many requests, none of which read its prompt."""
    return [
        turn
        for turn in turns
        if turn["requests"] == batch * sum(turn["drafted"].values()) and not turn["prefilled"]
    ]


def measure(
    llm: Any, file: Path, arms: Sequence[str], load: Load, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """One line of results for each batch size, as serve_within.py has them.

    Args:
        load: its rounds are rotations at each batch size, which shares its seconds with the others.

    Raises:
        SystemExit: a batch size did not get enough rotations in its time.
    """
    levels = []
    seconds = load.seconds / len(load.batches)
    for batch in load.batches:
        say(f"{batch} requests")
        since, turns = time.time(), []
        while len(turns) < load.rounds * len(arms) and time.time() - since < seconds:
            _generate(llm, batch, load)
            turns = whole_rotations(steady(read_turns(file), batch), since, len(arms))
        if len(turns) < LEAST_ROTATIONS * len(arms):
            raise SystemExit(
                f"{len(turns) // len(arms)} rotations of {batch} requests in {seconds:.0f} s, at least "
                f"{LEAST_ROTATIONS} are needed: give more --minutes, or fewer --draft-lengths."
            )
        levels.append({"concurrency": batch, "turns": turns[: load.rounds * len(arms)]})
    return levels


def _generate(llm: Any, batch: int, load: Load) -> None:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=load.max_tokens, ignore_eos=True, detokenize=False)
    ids = [{"prompt_token_ids": one} for one in prompts(batch, load.vocab_size)]
    llm.generate(ids, params, use_tqdm=False)
