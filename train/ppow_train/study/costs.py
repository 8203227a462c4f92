"""What an update of an arm costs in wall time, over an update of the reference, and what follows from it.

Arms differ in cost where they draft windows or look for critical ones; at equal wall time an arm has as many updates as
the reference affords. Kept by drafter, since a drafter's size decides. Left out: the measuring (run.py).
"""

from __future__ import annotations

import json
import os
import statistics
from pathlib import Path

_ALIKE = 0.1  # ratios this close to 1 are no difference that a busy machine can tell

Costs = dict[str, dict[str, list[float]]]  # drafter -> arm -> one ratio for each round


def equal_time_steps(costs: Costs, drafter: str, arm: str, steps: int) -> int | None:
    """Updates of an arm in the wall time of `steps` of the reference; None before it was measured."""
    ratios = costs.get(drafter, {}).get(arm)
    if ratios is None:
        return None
    ratio = statistics.median(ratios)
    return steps if abs(ratio - 1.0) <= _ALIKE else max(1, round(steps / ratio))


def read_costs(directory: Path) -> Costs:
    """What has been measured; empty before."""
    file = directory / "costs.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def write_costs(directory: Path, costs: Costs) -> None:
    """Whole or not at all."""
    temporary = directory / ".costs.json.part"
    temporary.write_text(json.dumps(costs, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, directory / "costs.json")
