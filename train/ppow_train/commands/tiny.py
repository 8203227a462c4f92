"""`ppow tiny build`: the small target and drafters of the demo. Left out: how (tiny/)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click


@click.group()
def tiny() -> None:
    """The small target and drafters that the demo and the tests use."""


@tiny.command()
@click.option(
    "--output", default=Path("examples/tiny"), show_default=True, type=click.Path(path_type=Path),
    help="directory to build in; parts that are already there are kept",
)  # fmt: skip
@click.option("--seed", default=0, show_default=True, help="of text sampling, initialisation and batches")
@click.option("--target-steps", type=int, help="updates of the target (2,048 tokens each)")
@click.option("--eagle-steps", type=int, help="updates of the EAGLE-3 head")
@click.option("--causal-lm-steps", type=int, help="updates of the causal LM drafter")
def build(output: Path, **values: int | None) -> None:
    """Train the tiny pair from the standard library's source (about an hour on 2 cores)."""
    from ppow_train.tiny.build import build as run
    from ppow_train.tiny.recipe import TinyRecipe

    recipe = dataclasses.replace(
        TinyRecipe(), **{name: value for name, value in values.items() if value is not None}
    )
    run(output, recipe, click.echo)
