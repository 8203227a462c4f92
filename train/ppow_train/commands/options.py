"""Click options made from the training options, so that each default and its help stand once. Left out: commands."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import click

from ppow_train.errors import UserError
from ppow_train.options import CHOICES, PPOWOptions
from ppow_train.ranges import MOST_SEED, check_range

_KINDS = {"int": int, "float": float, "bool": bool, "str": str}

SEED = click.IntRange(0, MOST_SEED)
DEVICES = ("cpu", "cuda")
# vLLM's names; it takes "half" and "float" for two of them as well.
DTYPES = ("auto", "bfloat16", "float16", "float32")


def dtype_option(help: str) -> Callable[[Callable], Callable]:
    """`--dtype`, the same everywhere: a name that is none is refused before an engine starts."""
    return click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True, help=help)


def device_option(prefix: str = "") -> Callable[[Callable], Callable]:
    """`--device`; `prefix` says what of a command it is for."""
    return click.option(
        "--device",
        type=click.Choice(DEVICES),
        default=None,
        help=f"{prefix}where models run  [default: cuda where there is one]",
    )


class _Names(click.ParamType):
    """Names separated by commas, as a list."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        names = [name.strip() for name in str(value).split(",")]
        if not all(names):
            self.fail(f"{value!r} is not a list of names separated by commas", param, ctx)
        return names


class ObjectiveName(click.ParamType):
    """An objective, as `parse_objective` normalises it."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from ppow_train.objectives.names import parse_objective

        try:
            return parse_objective(value)
        except UserError as error:
            self.fail(str(error), param, ctx)


def parse_rates(ctx: click.Context, parameter: click.Parameter, given: Sequence[str]) -> dict[str, float]:
    """Callback that reads OBJECTIVE=RATE, a learning rate each."""
    from ppow_train.objectives.names import parse_objective

    parsed = {}
    for rate in given:
        name, _, value = rate.rpartition("=")
        try:
            number = float(value)
            check_range("learning_rate", number)
            parsed[parse_objective(name)] = number
        except ValueError as error:  # a UserError is one
            raise click.BadParameter(f"expected OBJECTIVE=RATE, got {rate!r} ({error})") from error
    return parsed


def _in_range(name: str) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """Callback that makes a value which a training option cannot have wrong usage."""

    def check(ctx: click.Context, parameter: click.Parameter, value: Any) -> Any:
        try:
            check_range(name, value)
        except UserError as error:
            raise click.BadParameter(str(error)) from error
        return value

    return check


def _type_of(option: dataclasses.Field[Any]) -> Any:
    if option.name == "objective":
        return ObjectiveName()
    if option.name in CHOICES:
        return click.Choice(CHOICES[option.name])
    return _Names() if "list[" in str(option.type) else _KINDS[str(option.type).split(" ")[0]]


def training_options(command: Callable) -> Callable:
    """Add a flag for every training option; those not given are None."""
    for option in reversed(dataclasses.fields(PPOWOptions)):
        name = "--" + option.name.replace("_", "-")
        kind = _type_of(option)
        command = click.option(
            f"{name}/--no-{name[2:]}" if kind is bool else name,
            option.name,
            type=kind,
            default=None,
            callback=_in_range(option.name),
            help=f"{option.metadata['help']}  [default: {option.default}]",
        )(command)
    return command


def given(values: dict[str, Any]) -> dict[str, Any]:
    """Only the training options that the user gave by flag."""
    names = {option.name for option in dataclasses.fields(PPOWOptions)}
    return {name: value for name, value in values.items() if name in names and value is not None}
