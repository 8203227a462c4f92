"""Click options made from the training options, so that each default and its help stand once. Left out: commands."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import click

from ppow_train.options import CHOICES, PPOWOptions

_KINDS = {"int": int, "float": float, "bool": bool, "str": str}

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


def _type_of(option: dataclasses.Field[Any]) -> Any:
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
            help=f"{option.metadata['help']}  [default: {option.default}]",
        )(command)
    return command


def given(values: dict[str, Any]) -> dict[str, Any]:
    """Only the training options that the user gave by flag."""
    names = {option.name for option in dataclasses.fields(PPOWOptions)}
    return {name: value for name, value in values.items() if name in names and value is not None}
