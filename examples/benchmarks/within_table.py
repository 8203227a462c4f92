"""Results of turns within one engine: brought to equal shares of prompts, then compared as turns_table.py does.

Requests are shared by all arms, so that some turns have more prompts to read than others, by chance, and the steps that
read them are the longest. What lengths the adaptive window chose is known exactly; what they are worth is told by the
fixed lengths' turns as well, more surely than by its own turns alone. Left out: measuring.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import turns_table
from sweep_table import ADAPTIVE, length_of

TRIMMING = "by request"  # the arm whose drafts are trimmed request by request
_WHOLE = 0.95  # of a draft's tokens: vLLM cuts the last one of a request where it has no more room
NOTE = (
    "`none` here is a draft length of 0 in the same engine, whose drafter still reads every token. Seconds are brought "
    "to equal shares of prompts."
)


def whole_rotations(lines: list[dict[str, Any]], since: float, arms: int) -> list[dict[str, Any]]:
    """Turns of the rotations that began after `since` and are over, numbered from 0."""
    by_rotation: dict[int, list[dict[str, Any]]] = {}
    for line in lines:
        by_rotation.setdefault(line["rotation"], []).append(line)
    whole = [
        turns
        for _, turns in sorted(by_rotation.items())
        if len(turns) == arms and min(turn["began_at"] for turn in turns) >= since
    ]
    return [{**turn, "rotation": number} for number, turns in enumerate(whole) for turn in turns]


def read_turns(path: Path) -> list[dict[str, Any]]:
    """Whole lines of the file that the server appends to."""
    if not path.exists():
        return []
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def check_whole(turns: Sequence[dict[str, Any]]) -> None:
    """That drafts were of their arm's length where it is given, and no others: else nothing here compares anything.

    Raises:
        ValueError: names an arm whose drafts are shorter or longer.
    """
    for arm in sorted({turn["arm"] for turn in turns}):
        if (length := length_of(arm)) is None:
            continue
        of_arm = [turn for turn in turns if turn["arm"] == arm]
        verified, drafts = (sum(turn[name] for turn in of_arm) for name in ("verified", "drafts"))
        if not _WHOLE * length * drafts <= verified <= length * drafts or (length > 0) != (drafts > 0):
            raise ValueError(
                f"In turns of {arm} {drafts} drafts had {verified} tokens: the server's log may say why."
            )


def seconds_per_prompt_token(turns: Sequence[dict[str, Any]]) -> float:
    """Least squares of seconds = a_arm · steps + c · prompt tokens over all turns (ours): c, not below 0.

    Steps, not tokens: a turn's seconds are given, and what noise there is in how many tokens it made would be put down
    to its prompts, a fifth and more. Of steps, whose noise is the machine's pace, it is about a twentieth.
    """
    arms = sorted({turn["arm"] for turn in turns})
    rows = np.array(
        [
            [*(sum(turn["drafted"].values()) * (turn["arm"] == arm) for arm in arms), turn["prefilled"]]
            for turn in turns
        ],
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


def worth_of_choices(turns: Sequence[dict[str, Any]], best: str) -> turns_table.Ratio:
    """Tokens per second of the lengths that ours drafted, each as it was in the turns of fixed lengths, over `best`.

    Steps and tokens of lengths between measured ones are interpolated. What changing the length costs is left out: that
    is in the turns of ours alone. Interval as in turns_table.ratio.

    Args:
        turns: at equal prompts.
        best: an arm.
    """
    rotations = 1 + max(turn["rotation"] for turn in turns)
    named = {turn["arm"] for turn in turns}
    arms = {length: arm for arm in named if (length := length_of(arm)) is not None}
    lengths = sorted(arms)
    rows_of = {arms[length]: row for row, length in enumerate(lengths)}
    sums = np.zeros((len(lengths), 3, rotations))  # tokens, seconds, steps
    drafted = np.zeros((lengths[-1] + 1, rotations))
    for turn in turns:
        if turn["arm"] == TRIMMING:
            continue
        if turn["arm"] == ADAPTIVE:
            for length, steps in turn["drafted"].items():
                drafted[int(length), turn["rotation"]] += steps
        else:
            steps = sum(turn["drafted"].values())
            sums[rows_of[turn["arm"]], :, turn["rotation"]] += (turn["tokens"], turn["seconds"], steps)
    at = rows_of[best]

    def worth(rows: np.ndarray) -> float:
        made = sums[:, :, rows].sum(axis=2)
        every = np.arange(drafted.shape[0])
        times = drafted[:, rows].sum(axis=1)
        tokens, seconds = (times @ np.interp(every, lengths, made[:, i] / made[:, 2]) for i in (0, 1))
        return float(tokens / seconds / (made[at, 0] / made[at, 1]))

    first = min(turn["rotation"] for turn in turns)
    drawn = [worth(first + rows) for rows in turns_table.drawn_rotations(rotations - first)]
    low, high = np.percentile(drawn, turns_table.PERCENT)
    return turns_table.Ratio(worth(np.arange(first, rotations)), float(low), float(high))


def remark(line: dict[str, Any], level: turns_table.Level) -> str:
    """What the lengths that ours drafted at a level are worth.

    Args:
        line: as `comparable` gives it.
    """
    drafts = {int(length): steps for length, steps in line["drafts_by_length"][ADAPTIVE].items()}
    every = sum(drafts.values())
    shares = ", ".join(f"{n}: {drafts[n] / every:.0%}" for n in sorted(drafts) if drafts[n] / every >= 0.01)
    found = worth_of_choices(line["turns"], level.best)
    said = f"concurrency {level.concurrency}: its choices are worth {found} of {level.best} ({shares} of its steps)"
    counts = turns_table.counts_of(line, 0)
    if TRIMMING not in counts:
        return said
    trimmed = [turn for turn in line["turns"] if turn["arm"] == TRIMMING]
    each = sum(turn["verified"] for turn in trimmed) / sum(turn["requests"] for turn in trimmed)
    over, of_best = (turns_table.ratio(counts[TRIMMING], counts[arm]) for arm in (ADAPTIVE, level.best))
    return (
        f"{said}; {TRIMMING} it makes {over} of what it makes without, {of_best} of {level.best}, verifying {each:.1f} "
        "tokens a request and step"
    )


def remark_together(lines: Sequence[dict[str, Any]], ours: str = ADAPTIVE) -> str:
    """Ours over any one fixed K for all levels, where there are several.

    Args:
        lines: as `comparable` gives them.
    """
    found = turns_table.together([turns_table.counts_of(line, 0) for line in lines], ours)
    ratios = ", ".join(f"{over} of {arm}" for arm, over in found.items())
    return f"all concurrencies together (geometric mean) it makes {ratios}"


def of_as_many_verified(turns: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Tokens of a trimmed request-step, and seconds of a step, over those of one length of as many verified tokens.

    Between fixed lengths both are interpolated.

    Args:
        turns: at equal prompts.
    """

    def each(arm: str) -> tuple[float, float, float]:
        mine = [turn for turn in turns if turn["arm"] == arm]
        requests = sum(turn["requests"] for turn in mine)
        verified, tokens = (sum(turn[name] for turn in mine) / requests for name in ("verified", "tokens"))
        steps = sum(sum(turn["drafted"].values()) for turn in mine)
        return verified, tokens, sum(turn["seconds"] for turn in mine) / steps

    fixed = sorted(each(arm) for arm in {turn["arm"] for turn in turns} if length_of(arm) is not None)
    known = list(zip(*fixed, strict=True))
    verified, tokens, seconds = each(TRIMMING)
    usual_tokens, usual_seconds = (float(np.interp(verified, known[0], column)) for column in known[1:])
    return tokens / usual_tokens, seconds / usual_seconds


def remarks_by_request(lines: Sequence[dict[str, Any]]) -> list[str]:
    """The aims again, of drafts that are trimmed by request: what a CPU with a cost profile is served by default.

    Args:
        lines: as `comparable` gives them, all with that arm.
    """
    levels = [turns_table.judge(line, 0, TRIMMING) for line in lines]
    said = [f"{TRIMMING}, {verdict}: {text}" for verdict, text in turns_table.aims(levels)]
    chosen = ", ".join(f"{level.over_chosen:.3f} at {level.concurrency}" for level in levels)
    said.append(f"{TRIMMING}, over the best of the other half: {chosen}")
    found = [(line["concurrency"], *of_as_many_verified(line["turns"])) for line in lines]
    beside = ", ".join(f"{tokens:.3f} and {seconds:.3f} at {level}" for level, tokens, seconds in found)
    said.append(
        f"{TRIMMING}, tokens and step times over those of one length of as many verified tokens: {beside}"
    )
    if len(lines) > 1:
        said.append(f"{TRIMMING}, {remark_together(lines, TRIMMING)}")
    return said
