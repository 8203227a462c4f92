"""Which runs a study consists of, and the learning rate that each of them has. Left out: doing them (run.py)."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator

from ppow_train.study.costs import Costs, equal_time_steps
from ppow_train.study.plan import Cell, Plan
from ppow_train.study.results import Measured, RunKey


def best_rate(plan: Plan, results: dict[RunKey, Measured], cell: Cell, arm: str) -> float | None:
    """The learning rate of an arm in a cell; None while its tuning is not finished."""
    tuned = plan.tuning_cell(cell)
    rates = plan.rates_of(arm, tuned)
    if len(rates) == 1:
        return rates[0]
    keys = [RunKey("tune", tuned.name, arm, plan.tuning_seed, plan.steps[0], rate) for rate in rates]
    if not all(key in results for key in keys):
        return None

    def accepted(key: RunKey) -> float:
        value = sum(results[key].accepted) / sum(results[key].drafts)
        return -math.inf if math.isnan(value) else value  # a rate at which training diverged is not the best

    return max(keys, key=accepted).learning_rate


def start_key(phase: str, cell: Cell) -> RunKey:
    """The supervised start of a cell."""
    return RunKey(phase, cell.name, None, 0, 0, 0.0)


def runs(
    plan: Plan,
    results: dict[RunKey, Measured],
    costs: Costs,
    only_cells: Collection[str] = (),
    only_arms: Collection[str] = (),
) -> Iterator[RunKey | None]:
    """All runs of a study in the order in which they are wanted; None for one whose learning rate is not known yet.

    Args:
        costs: of the arms, as far as they have been measured; one that costs more than the reference runs once more,
            for as many updates as the reference has in the same time.
        only_cells, only_arms: names of those that are wanted; all without it.
    """
    cells = [cell for cell in plan.cells if not only_cells or cell.name in only_cells]

    def wanted(arms: Iterable[str]) -> list[str]:
        return [arm for arm in arms if not only_arms or arm in only_arms]

    for cell in cells:
        yield start_key("report", cell)
    for tuned in dict.fromkeys(plan.tuning_cell(cell) for cell in cells):
        for arm in wanted(plan.arms):
            rates = plan.rates_of(arm, tuned)
            for rate in rates if len(rates) > 1 else ():
                yield RunKey("tune", tuned.name, arm, plan.tuning_seed, plan.steps[0], rate)
    for steps in plan.steps:
        for seed in plan.seeds:  # outside, so that every table has something to show early
            for cell in cells:
                for arm in wanted(plan.arms_of(steps)):
                    best = best_rate(plan, results, cell, arm)
                    # Once where the costs are alike, or not known.
                    for updates in dict.fromkeys(
                        (steps, equal_time_steps(costs, cell.drafter, arm, steps) or steps)
                    ):
                        yield None if best is None else RunKey("report", cell.name, arm, seed, updates, best)
