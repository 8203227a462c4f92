"""What a study compares, as a YAML file: cells, arms, seeds, learning rates. Left out: running it (run.py).

A cell is a drafter on a domain at a serving temperature; an arm is a set of training options with a name. Every arm
runs in every cell with every seed, from the same supervised start.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ppow_train.errors import UserError


@dataclasses.dataclass(frozen=True)
class Cell:
    """Where arms compete.

    Attributes:
        name: as the table shows it.
        drafter: directory or Hub repo id.
        prompts: JSONL file that trajectories for training and tuning come from.
        held_out: JSONL file of the prompts that are reported.
        temperature: of serving, and what is trained for.
        tuned_like: name of the cell whose learning rates are taken; its own where it is not given.
        learning_rates: tried for every arm where this cell is tuned; the arms' own where they are not given.
    """

    name: str
    drafter: str
    prompts: str
    held_out: str
    temperature: float
    tuned_like: str | None = None
    learning_rates: tuple[float, ...] | None = None


# Training options that the cell, the seed, the schedule or the study itself decides: an arm that set one would run as
# something else than the table says.
DECIDED_ELSEWHERE = (
    "serving_temperature",
    "seed",
    "max_steps",
    "learning_rate",
    "output_dir",
    "use_cpu",
    "save_strategy",
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A whole study.

    Attributes:
        target: directory or Hub repo id.
        cells, arms: what competes where; arms are training options by name; with `learning_rates` among them, these are
            tried for the arm.
        reference: the arm that all others are compared with.
        seeds: one run each per arm and cell; they change trajectories, initialisation and windows.
        learning_rates: tried for every arm with `tuning_seed`, on prompts that are set apart and never reported.
        tuning_prompts: how many of the training prompts are set apart for that, the last ones.
        steps: numbers of updates, each a study of its own.
        long_arms: arms that run for more than the first of `steps`; all where it is not given.
        options: training options of every arm.
        max_new_tokens: tokens of each trajectory.
        max_tokens: output tokens of each held-out prompt that the serving walk covers.
    """

    target: str
    cells: tuple[Cell, ...]
    arms: dict[str, dict[str, Any]]
    reference: str
    seeds: tuple[int, ...]
    learning_rates: tuple[float, ...]
    tuning_prompts: int
    steps: tuple[int, ...]
    options: dict[str, Any]
    max_new_tokens: int
    max_tokens: int
    tuning_seed: int = 100
    long_arms: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("cells", "arms", "seeds", "learning_rates", "steps"):
            if not getattr(self, name):
                raise UserError(f"The plan's {name} are empty: give at least one.")
        names = [cell.name for cell in self.cells]
        if len(set(names)) != len(names):
            raise UserError(f"The plan has two cells of one name: {', '.join(names)}.")
        for cell in self.cells:
            if cell.tuned_like is not None and cell.tuned_like not in names:
                raise UserError(f"Cell {cell.name} is tuned like {cell.tuned_like!r}, which is no cell.")
        for place, options in {"options": self.options, **self.arms}.items():
            if decided := [name for name in DECIDED_ELSEWHERE if name in options]:
                raise UserError(
                    f"The plan's {place} may not set {', '.join(decided)}: cells give temperatures, seeds, steps and "
                    "learning_rates the rest."
                )
        for arm in (self.reference, *(self.long_arms or ())):
            if arm not in self.arms:
                raise UserError(f"The plan names the arm {arm!r}, known are {', '.join(self.arms)}.")

    def arms_of(self, steps: int) -> list[str]:
        """Names of the arms that run for so many updates."""
        return list(self.arms) if steps == self.steps[0] else list(self.long_arms or self.arms)

    def rates_of(self, arm: str, cell: Cell) -> tuple[float, ...]:
        """Learning rates that are tried for an arm where a cell is tuned."""
        own = self.tuning_cell(cell).learning_rates or self.arms[arm].get("learning_rates")
        return tuple(own or self.learning_rates)

    def options_of(self, arm: str) -> dict[str, Any]:
        """Training options of an arm."""
        own = {name: value for name, value in self.arms[arm].items() if name != "learning_rates"}
        return {**self.options, **own}

    def tuning_cell(self, cell: Cell) -> Cell:
        """The cell that a cell takes its learning rates from."""
        return next(other for other in self.cells if other.name == (cell.tuned_like or cell.name))


def read_plan(path: Path) -> Plan:
    """Read a plan; paths in it are taken from the current directory.

    Raises:
        UserError: unreadable, or keys that are missing or unknown.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        cells = tuple(Cell(**_tuples(cell)) for cell in values.pop("cells"))
        return Plan(cells=cells, **_tuples(values))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, AttributeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path} is not a plan of a study ({reason}): see examples/benchmarks/study.yaml."
        ) from error


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    """Lists made tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
