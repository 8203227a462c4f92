"""The tables of a study, in Markdown: gains over the start and over the reference arm. Left out: running it.

First what a reader looks for: every arm over the reference, a column for each cell, a table for each set of prompts.
Then a table for every cell, with what the first leaves out.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from ppow_train.errors import UserError
from ppow_train.study.costs import Costs, equal_time_steps
from ppow_train.study.intervals import NOTHING, Interval, Resampled, SeedSpread, difference, gain
from ppow_train.study.plan import Cell, Plan
from ppow_train.study.results import Measured, RunKey
from ppow_train.study.schedule import best_rate, start_key

_LOSS = "**−** "
_WIN = "**+** "
_OF_PROMPTS_ALONE = "† One seed, and too few arms beside it have several: an interval of prompts alone.\n"


@dataclasses.dataclass(frozen=True)
class _Chance:
    """What is chance in one cell.

    Attributes:
        groups: what each held-out prompt is drawn together with; None: every prompt by itself.
        gains, differences: how gains, and differences from the reference, vary with the seed; None where nobody can
            tell.
    """

    groups: Sequence[str] | None
    gains: SeedSpread | None
    differences: SeedSpread | None

    @classmethod
    def of(
        cls,
        plan: Plan,
        results: dict[RunKey, Measured],
        cell: Cell,
        steps: int,
        start: Measured,
        groups: Sequence[str] | None,
    ) -> _Chance:
        if groups is not None and len(groups) != len(start.drafts):
            raise UserError(
                f"{cell.held_out} has {len(groups)} prompts, results of the cell {cell.name!r} are of "
                f"{len(start.drafts)}: put the file back that they were measured on."
            )
        if not _accepted(start):  # no gain over it can be told
            return cls(groups, None, None)

        def gains_of(arm: str) -> dict[int, float]:
            by_seed = _by_seed(plan, results, cell, arm, steps)
            return {seed: _accepted(one) / _accepted(start) for seed, one in by_seed.items()}

        reference = gains_of(plan.reference)
        gains = {arm: gains_of(arm) for arm in plan.arms_of(steps)}
        return cls(
            groups,
            SeedSpread.pooled(list(one.values()) for one in gains.values()),
            SeedSpread.pooled(
                [value - reference[seed] for seed, value in one.items() if seed in reference]
                for arm, one in gains.items()
                if arm != plan.reference
            ),
        )


def tables(
    plan: Plan,
    results: dict[RunKey, Measured],
    costs: Costs,
    groups: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """All tables, as far as their runs are finished; every number of updates has its own.

    Args:
        groups: by held-out file, what each of its prompts is drawn together with (`prompts.read_groups`).

    Raises:
        UserError: another number of prompts was measured than a file has.
    """
    groups = groups or {}
    parts = []
    for held_out in dict.fromkeys(cell.held_out for cell in plan.cells):
        cells = [cell for cell in plan.cells if cell.held_out == held_out]
        found = (_overview(plan, results, cells, steps, groups.get(held_out)) for steps in plan.steps)
        parts += [text for text in found if text]
    for steps in plan.steps:
        for cell in plan.cells:
            rows = list(_rows(plan, results, costs, cell, steps, groups.get(cell.held_out)))
            # The start is that of every number of updates: alone it says nothing of a longer run.
            if len(rows) > 1 or (rows and steps == plan.steps[0]):
                parts.append(_table(plan, cell, steps, rows))
    text = "\n".join(parts)
    return text + f"\n{_OF_PROMPTS_ALONE}" * ("†" in text)


def origins(made_with: Counter[str | None]) -> str:
    """What made the runs, a line for each set of versions; nothing where none is on record."""
    if not any(made_with):
        return ""
    told = [
        f"- {runs}: {versions or 'versions not recorded'}\n" for versions, runs in made_with.most_common()
    ]
    return "\nRuns by what made them:\n\n" + "".join(told)


def _overview(
    plan: Plan,
    results: dict[RunKey, Measured],
    cells: list[Cell],
    steps: int,
    groups: Sequence[str] | None,
) -> str:
    """Every arm's gain over the reference's in points, best first; the reference's own gain over the start."""
    starts = {cell: results[key] for cell in cells if (key := start_key("report", cell)) in results}
    chance = {cell: _Chance.of(plan, results, cell, steps, start, groups) for cell, start in starts.items()}
    rows = []
    for arm in plan.arms_of(steps):
        found = [_compared(plan, results, cell, arm, steps, starts[cell], chance[cell]) for cell in starts]
        if any(seeds for _, seeds in found):
            known = [value.mean for value, seeds in found if seeds]
            mean = 0.0 if arm == plan.reference else sum(known) / len(known)
            told = [_bold(value, arm == plan.reference) if seeds else "–" for value, seeds in found]
            seeds = ", ".join(str(seeds) if seeds else "–" for _, seeds in found)
            rows.append((mean, " | ".join([f"| `{arm}`", *told, f"{seeds} |"])))
    if not rows:
        return ""
    accepted = ", ".join(f"{_accepted(start):.3f}" for start in starts.values())
    head = [
        f"### Over `{plan.reference}`, points of gain, {steps} updates",
        "",
        " | ".join(["| arm", *(cell.name for cell in starts), "seeds |"]),
        "|---" * (len(starts) + 2) + "|",
    ]
    body = [row for _, row in sorted(rows, reverse=True)]
    files = len(set(groups or ()))
    drawn = f" Intervals draw {files} source files." if groups and files < len(groups) else ""
    return "\n".join([*head, *body, "", f"Accepted per draft at the start: {accepted}.{drawn}"]) + "\n"


def _compared(
    plan: Plan,
    results: dict[RunKey, Measured],
    cell: Cell,
    arm: str,
    steps: int,
    start: Measured,
    chance: _Chance,
) -> tuple[Interval, int]:
    """An arm's difference from the reference, or the reference's gain, and on how many seeds (0: not known)."""
    own = _by_seed(plan, results, cell, arm, steps)
    if arm != plan.reference:
        reference = _by_seed(plan, results, cell, plan.reference, steps)
        return _difference(own, reference, start, chance)
    if not own:
        return NOTHING, 0
    one, base = (Resampled(each, len(own), chance.groups) for each in (list(own.values()), [start]))
    return gain(one, base, chance.gains), len(own)


def _bold(value: Interval, is_reference: bool) -> str:
    if is_reference:
        return f"gain {value.percent()}"
    return f"**{value.percent()}**" if value.is_clear_of_zero else value.percent()


def _table(plan: Plan, cell: Cell, steps: int, rows: list[tuple[float, str]]) -> str:
    rows = sorted(rows, reverse=True)
    head = [
        f"### {cell.name}, {steps} updates",
        "",
        "| arm | learning rate | seeds | accepted per draft | gain over the start, % | "
        f"over `{plan.reference}`, points | the same at equal wall time (updates) |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *(row for _, row in rows)]) + "\n"


def _rows(
    plan: Plan,
    results: dict[RunKey, Measured],
    costs: Costs,
    cell: Cell,
    steps: int,
    groups: Sequence[str] | None,
) -> Iterator[tuple[float, str]]:
    """Each arm with its mean, which sorts the table; arms with seeds missing are compared on those that are there."""
    start = results.get(start_key("report", cell))
    if start is None:
        return
    reference = _by_seed(plan, results, cell, plan.reference, steps)
    chance = _Chance.of(plan, results, cell, steps, start, groups)
    yield _accepted(start), f"| supervised start | – | – | {_accepted(start):.3f} | – | – | – |"
    for arm in plan.arms_of(steps):
        by_seed = _by_seed(plan, results, cell, arm, steps)
        seeds = [seed for seed in by_seed if seed in reference] or list(by_seed)
        if not seeds:
            continue
        runs = [by_seed[seed] for seed in seeds]
        own, base = (Resampled(each, len(seeds), chance.groups) for each in (runs, [start]))
        rate = best_rate(plan, results, cell, arm)
        gained = gain(own, base, chance.gains).percent()
        first = f"| `{arm}` | {rate:g} | {len(seeds)} | {own.mean:.3f} | {gained} | "
        if arm == plan.reference:
            yield own.mean, first + "– | – |"
            continue
        updates = equal_time_steps(costs, cell.drafter, arm, steps)
        over = _over(by_seed, reference, start, chance)
        if updates is None or updates == steps:
            timed = "as at equal windows" if updates else "not timed"
        else:
            shorter = _by_seed(plan, results, cell, arm, updates)
            timed = f"{_over(shorter, reference, start, chance)} ({updates})"
        yield own.mean, first + f"{over} | {timed} |"


def _over(arm: dict[int, Measured], reference: dict[int, Measured], start: Measured, chance: _Chance) -> str:
    """Difference of two gains as text, marked where it is clear of zero."""
    over, seeds = _difference(arm, reference, start, chance)
    if not seeds:
        return "–"
    mark = (_WIN if over.mean > 0 else _LOSS) if over.is_clear_of_zero else ""
    return mark + over.percent()


def _difference(
    arm: dict[int, Measured],
    reference: dict[int, Measured],
    start: Measured,
    chance: _Chance,
) -> tuple[Interval, int]:
    """Difference of two gains on the seeds that both have, and how many these are."""
    seeds = [seed for seed in arm if seed in reference]
    if not seeds:
        return NOTHING, 0
    runs = [arm[seed] for seed in seeds], [reference[seed] for seed in seeds], [start]
    one, other, base = (Resampled(each, len(seeds), chance.groups) for each in runs)
    return difference(one, other, base, chance.differences), len(seeds)


def _accepted(one: Measured) -> float:
    """Accepted tokens per draft, over all prompts."""
    return sum(one.accepted) / sum(one.drafts)


def _by_seed(
    plan: Plan, results: dict[RunKey, Measured], cell: Cell, arm: str, steps: int
) -> dict[int, Measured]:
    rate = best_rate(plan, results, cell, arm)
    if rate is None:
        return {}
    keys = {seed: RunKey("report", cell.name, arm, seed, steps, rate) for seed in plan.seeds}
    return {seed: results[key] for seed, key in keys.items() if key in results}
