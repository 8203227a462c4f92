"""The tables of a study, in Markdown: gains over the start and over the reference arm. Left out: running it."""

from __future__ import annotations

from collections.abc import Iterator

from ppow_train.study.intervals import Resampled, difference, gain
from ppow_train.study.plan import Cell, Plan
from ppow_train.study.results import Measured, RunKey
from ppow_train.study.schedule import best_rate, start_key

_LOSS = "**−** "
_WIN = "**+** "


def tables(plan: Plan, results: dict[RunKey, Measured]) -> str:
    """One table for every cell and number of updates, as far as they are finished."""
    parts = []
    for steps in plan.steps:
        for cell in plan.cells:
            rows = list(_rows(plan, results, cell, steps))
            if rows:
                parts.append(_table(plan, cell, steps, rows))
    return "\n".join(parts)


def _table(plan: Plan, cell: Cell, steps: int, rows: list[tuple[float, str]]) -> str:
    rows = sorted(rows, reverse=True)
    head = [
        f"### {cell.name}, {steps} updates",
        "",
        "| arm | learning rate | seeds | accepted per draft | gain over the start, % | "
        f"over `{plan.reference}`, points |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *(row for _, row in rows)]) + "\n"


def _rows(plan: Plan, results: dict[RunKey, Measured], cell: Cell, steps: int) -> Iterator[tuple[float, str]]:
    """Each arm with its mean, which sorts the table; arms with seeds missing are compared on those that are there."""
    start = results.get(start_key("report", cell))
    if start is None:
        return
    found = {arm: _by_seed(plan, results, cell, arm, steps) for arm in plan.arms_of(steps)}
    reference = found.get(plan.reference, {})
    if not any(found.values()):
        return
    yield (
        sum(start.accepted) / sum(start.drafts),
        f"| supervised start | – | – | {_accepted(start)} | – | – |",
    )
    for arm, by_seed in found.items():
        seeds = [seed for seed in by_seed if seed in reference] or list(by_seed)
        if not seeds:
            continue
        own, base = Resampled([by_seed[s] for s in seeds], len(seeds)), Resampled([start], len(seeds))
        cells = [
            f"`{arm}`",
            f"{best_rate(plan, results, cell, arm):g}",
            str(len(seeds)),
            f"{own.mean:.3f}",
            gain(own, base).percent(),
        ]
        if arm == plan.reference or not set(seeds) <= set(reference):
            cells.append("–")
        else:
            over = difference(own, Resampled([reference[s] for s in seeds], len(seeds)), base)
            mark = (_WIN if over.mean > 0 else _LOSS) if over.is_clear_of_zero else ""
            cells.append(mark + over.percent())
        yield own.mean, "| " + " | ".join(cells) + " |"


def _by_seed(
    plan: Plan, results: dict[RunKey, Measured], cell: Cell, arm: str, steps: int
) -> dict[int, Measured]:
    rate = best_rate(plan, results, cell, arm)
    if rate is None:
        return {}
    keys = {seed: RunKey("report", cell.name, arm, seed, steps, rate) for seed in plan.seeds}
    return {seed: results[key] for seed, key in keys.items() if key in results}


def _accepted(measured: Measured) -> str:
    return f"{sum(measured.accepted) / sum(measured.drafts):.3f}"
