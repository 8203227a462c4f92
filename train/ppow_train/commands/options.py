"""Click options made from the training options, so that each default and its help stand once. Left out: commands."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import click

from ppow_train.options import CHOICES, PPOWOptions

_KINDS = {"int": int, "float": float, "bool": bool, "str": str}


def training_options(command: Callable) -> Callable:
    """Add a flag for every training option that is no list; those not given are None."""
    for option in reversed(dataclasses.fields(PPOWOptions)):
        kind = str(option.type).split(" ")[0]
        if "list[" in str(option.type):
            continue
        choices = CHOICES.get(option.name)
        name = "--" + option.name.replace("_", "-")
        declaration = f"{name}/--no-{name[2:]}" if kind == "bool" else name
        command = click.option(
            declaration,
            option.name,
            type=click.Choice(choices) if choices else _KINDS[kind],
            default=None,
            help=f"{option.metadata['help']}  [default: {option.default}]",
        )(command)
    return command


def given(values: dict[str, Any]) -> dict[str, Any]:
    """Only the training options that the user gave by flag."""
    names = {option.name for option in dataclasses.fields(PPOWOptions)}
    return {name: value for name, value in values.items() if name in names and value is not None}
