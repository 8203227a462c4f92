"""The tables of a study, in Markdown: gains over the start and over the reference arm. Left out: running it."""

from __future__ import annotations

from collections.abc import Iterator

from ppow_train.study.costs import Costs, equal_time_steps
from ppow_train.study.intervals import Resampled, difference, gain
from ppow_train.study.plan import Cell, Plan
from ppow_train.study.results import Measured, RunKey
from ppow_train.study.schedule import best_rate, start_key

_LOSS = "**−** "
_WIN = "**+** "


def tables(plan: Plan, results: dict[RunKey, Measured], costs: Costs) -> str:
    """One table for every cell and number of updates, as far as they are finished."""
    parts = []
    for steps in plan.steps:
        for cell in plan.cells:
            rows = list(_rows(plan, results, costs, cell, steps))
            if rows:
                parts.append(_table(plan, cell, steps, rows))
    return "\n".join(parts)


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
    plan: Plan, results: dict[RunKey, Measured], costs: Costs, cell: Cell, steps: int
) -> Iterator[tuple[float, str]]:
    """Each arm with its mean, which sorts the table; arms with seeds missing are compared on those that are there."""
    start = results.get(start_key("report", cell))
    if start is None:
        return
    reference = _by_seed(plan, results, cell, plan.reference, steps)
    accepted = sum(start.accepted) / sum(start.drafts)
    yield accepted, f"| supervised start | – | – | {accepted:.3f} | – | – | – |"
    for arm in plan.arms_of(steps):
        by_seed = _by_seed(plan, results, cell, arm, steps)
        seeds = [seed for seed in by_seed if seed in reference] or list(by_seed)
        if not seeds:
            continue
        own, base = Resampled([by_seed[seed] for seed in seeds], len(seeds)), Resampled([start], len(seeds))
        rate = best_rate(plan, results, cell, arm)
        first = f"| `{arm}` | {rate:g} | {len(seeds)} | {own.mean:.3f} | {gain(own, base).percent()} | "
        if arm == plan.reference:
            yield own.mean, first + "– | – |"
            continue
        updates = equal_time_steps(costs, cell.drafter, arm, steps)
        over = _over(by_seed, reference, start)
        if updates is None or updates == steps:
            timed = "as at equal windows" if updates else "not timed"
        else:
            timed = f"{_over(_by_seed(plan, results, cell, arm, updates), reference, start)} ({updates})"
        yield own.mean, first + f"{over} | {timed} |"


def _over(arm: dict[int, Measured], reference: dict[int, Measured], start: Measured) -> str:
    """Difference of two gains on the seeds that both have."""
    seeds = [seed for seed in arm if seed in reference]
    if not seeds:
        return "–"
    one, other = (Resampled([of[seed] for seed in seeds], len(seeds)) for of in (arm, reference))
    over = difference(one, other, Resampled([start], len(seeds)))
    mark = (_WIN if over.mean > 0 else _LOSS) if over.is_clear_of_zero else ""
    return mark + over.percent()


def _by_seed(
    plan: Plan, results: dict[RunKey, Measured], cell: Cell, arm: str, steps: int
) -> dict[int, Measured]:
    rate = best_rate(plan, results, cell, arm)
    if rate is None:
        return {}
    keys = {seed: RunKey("report", cell.name, arm, seed, steps, rate) for seed in plan.seeds}
    return {seed: results[key] for seed, key in keys.items() if key in results}
