"""Results of turns within one engine: brought to equal shares of prompts, then compared as turns_table.py does.

Requests are shared by all arms, so that some turns have more prompts to read than others, by chance, and the steps that
read them are the longest. Left out: measuring.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

NOTE = (
    "`none` here is a draft length of 0 in the same engine, whose drafter still reads every token. Seconds are brought "
    "to equal shares of prompts."
)


def seconds_per_prompt_token(turns: Sequence[dict[str, Any]]) -> float:
    """Least squares of seconds = a_arm · tokens + c · prompt tokens over all turns (ours): c, not below 0."""
    arms = sorted({turn["arm"] for turn in turns})
    rows = np.array(
        [[*(turn["tokens"] * (turn["arm"] == arm) for arm in arms), turn["prefilled"]] for turn in turns],
        dtype=float,
    )
    seconds = np.array([turn["seconds"] for turn in turns])
    return max(0.0, float(np.linalg.lstsq(rows, seconds, rcond=None)[0][-1]))


def at_equal_prompts(turns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Turns as if each had read prompts in proportion to the tokens that it made."""
    each = seconds_per_prompt_token(turns)
    share = sum(turn["prefilled"] for turn in turns) / sum(turn["tokens"] for turn in turns)
    return [
        {**turn, "seconds": turn["seconds"] - each * (turn["prefilled"] - share * turn["tokens"])}
        for turn in turns
    ]


def comparable(line: dict[str, Any], warm_rotations: int) -> dict[str, Any]:
    """A line of results as turns_table.judge takes it, of the rotations that are judged."""
    kept = [turn for turn in line["turns"] if turn["rotation"] >= warm_rotations]
    drafted: dict[str, dict[str, int]] = {}
    for turn in kept:
        of_arm = drafted.setdefault(turn["arm"], {})
        for length, steps in turn["drafted"].items():
            of_arm[length] = of_arm.get(length, 0) + steps
    return {**line, "turns": at_equal_prompts(kept), "drafts_by_length": drafted}
