"""What a study compares, as a YAML file: cells, arms, seeds, learning rates. Left out: running it (run.py).

A cell is a drafter on a domain at a serving temperature; an arm is a set of training options with a name. Every arm
runs in every cell with every seed, from the same supervised start.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

from ppow_train.errors import UserError
from ppow_train.ranges import require
from ppow_train.yaml_file import read_yaml


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

    def __post_init__(self) -> None:
        place = f"Cell {self.name}: "
        require(0 <= self.temperature < math.inf, f"{place}temperature", ">= 0", self.temperature)
        _check_rates(self.learning_rates or (), place)


# Training options that the cell, the seed, the schedule or the study itself decides: an arm that set one would run as
# something else than the table says. No facts of an arm (facts.py), unlike the options below.
DECIDED_ELSEWHERE = (
    "serving_temperature",
    "seed",
    "max_steps",
    "learning_rate",
    "output_dir",
    "use_cpu",
    "save_strategy",
)

# What a cell's trajectories, its judges and its start are made with, once for all arms.
_OF_ALL_ARMS = ("num_speculative_tokens", "target_dtype", "draft_sample_method")

# What `ppow train` does between updates, and a study does not: the table would say that it did.
_NOT_DONE = ("eval_steps", "early_stop_patience", "keep_best")

_NOT_SET = {
    DECIDED_ELSEWHERE: "cells give temperatures, seeds, steps and learning_rates the rest",
    _NOT_DONE: "a study measures the adapter after the last update only, drop it",
}


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
        _refuse("options", self.options, _NOT_SET)
        for arm, own in self.arms.items():
            _refuse(arm, own, {**_NOT_SET, _OF_ALL_ARMS: "all arms share it, set it in the plan's options"})
        self._check_numbers()
        for arm in (self.reference, *(self.long_arms or ())):
            if arm not in self.arms:
                raise UserError(f"The plan names the arm {arm!r}, known are {', '.join(self.arms)}.")

    def _check_numbers(self) -> None:
        place = "The plan's "
        _check_rates(self.learning_rates, place)
        for arm, own in self.arms.items():
            _check_rates(own.get("learning_rates") or (), f"{place}arm {arm}: ")
        for name, seeds in {"seeds": self.seeds, "tuning_seed": (self.tuning_seed,)}.items():
            for seed in seeds:
                require(0 <= seed < 2**32, place + name, "in 0..2^32 - 1", seed)
        for name, numbers in {"steps": self.steps, "max_new_tokens": (self.max_new_tokens,)}.items():
            for number in numbers:
                require(number >= 1, place + name, ">= 1", number)
        # An output's first token is never drafted.
        require(self.max_tokens >= 2, f"{place}max_tokens", ">= 2", self.max_tokens)
        # Without any, nothing tells one learning rate from another.
        least = int(any(len(self.rates_of(arm, cell)) > 1 for arm in self.arms for cell in self.cells))
        wanted = f">= {least}" + " where an arm has several learning_rates" * least
        require(self.tuning_prompts >= least, f"{place}tuning_prompts", wanted, self.tuning_prompts)

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
        UserError: unreadable, keys that are missing or unknown, or values that cannot be.
    """
    try:
        values = read_yaml(path)
    except ValueError as error:
        raise _no_plan(path, str(error)) from error
    _check_names(path, "it", Plan, values)
    if not isinstance(values["cells"], list):
        raise _no_plan(path, f"cells must be a list, got {type(values['cells']).__name__}")
    for number, cell in enumerate(values["cells"], start=1):
        _check_names(path, f"cell {number}", Cell, cell)
    cells = tuple(Cell(**_fields(Cell, cell, f"{path}, cell")) for cell in values.pop("cells"))
    values = _fields(Plan, values, str(path))
    values["options"] = _options(values["options"], f"{path}, options")
    values["arms"] = {
        _text(arm, f"{path}: an arm"): _options(own, f"{path}, arm {arm}")
        for arm, own in _mapping(values["arms"], f"{path}, arms").items()
    }
    return Plan(cells=cells, **values)


def _no_plan(path: Path, why: str) -> UserError:
    return UserError(f"{path} is not a plan of a study ({why}): see examples/benchmarks/study.yaml.")


def _check_names(path: Path, what: str, kind: type[Cell] | type[Plan], values: Any) -> None:
    """Refuse a plan or a cell that is no mapping, lacks a name or has one that there is not."""
    if values is None:
        raise _no_plan(path, f"{what} is empty")
    if not isinstance(values, dict):
        raise _no_plan(path, f"{what} must be a mapping of names to values, got {type(values).__name__}")
    fields = dataclasses.fields(kind)
    if unknown := [name for name in values if name not in {field.name for field in fields}]:
        raise _no_plan(path, f"{what} has the unknown key {unknown[0]!r}")
    needed = [field.name for field in fields if field.default is dataclasses.MISSING]
    if missing := [name for name in needed if name not in values]:
        raise _no_plan(path, f"{what} lacks {', '.join(missing)}")


def _fields(kind: type[Cell] | type[Plan], values: dict[str, Any], source: str) -> dict[str, Any]:
    """Values of a cell or a plan, all of whose names are known, with numbers, text and tuples where they belong."""
    known = {field.name: field for field in dataclasses.fields(kind)}
    return {name: _field(value, known[name], source) for name, value in values.items()}


def _field(value: Any, field: dataclasses.Field[Any], source: str) -> Any:
    from ppow_train.config import typed_value  # here, as it imports TRL

    written = str(field.type)
    if written == "str":
        return _text(value, f"{source}: {field.name}")
    if not written.startswith("tuple[") or (value is None and "None" in written):
        return typed_value(value, field, source)
    if not isinstance(value, list):
        raise UserError(f"{source}: {field.name} must be a list, got {value!r}: put it in brackets.")
    each = copy.copy(field)
    each.name, each.type = f"each of {field.name}", written.removeprefix("tuple[").partition(",")[0]
    return tuple(typed_value(one, each, source) for one in value)


def _options(values: Any, source: str) -> dict[str, Any]:
    """Training options, and an arm's learning_rates, with numbers where they belong: YAML reads `3e-3` as text."""
    from ppow_train.config import PPOWConfig, typed_value

    known = {field.name: field for field in dataclasses.fields(PPOWConfig)}
    rates = next(field for field in dataclasses.fields(Cell) if field.name == "learning_rates")
    typed = {}
    for name, value in _mapping(values, source).items():
        if name == rates.name:
            typed[name] = _field(value, rates, source)
        else:  # unknown ones are refused where the study begins
            typed[name] = typed_value(value, known[name], source) if name in known else value
    return typed


def _mapping(value: Any, source: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{source} must be a mapping of names to values, got {value!r}: write {{}} for none.")
    return value


def _text(value: Any, source: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{source} must be text, got {value!r}: put it in quotes.")
    return value


def _refuse(place: str, options: dict[str, Any], refused: dict[tuple[str, ...], str]) -> None:
    for names, why in refused.items():
        if found := [name for name in names if name in options]:
            raise UserError(f"The plan's {place} may not set {', '.join(found)}: {why}.")


def _check_rates(rates: tuple[float, ...], place: str) -> None:
    for rate in rates:
        require(0 < rate < math.inf, f"{place}learning_rates", "> 0", rate)
