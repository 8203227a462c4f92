"""`ppow tiny`: the small target and drafters of the demo, and a costlier target. Left out: how (tiny/)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from ppow_train.commands.options import SEED


@click.group()
def tiny() -> None:
    """The small target and drafters that the demo and the tests use."""


@tiny.command()
@click.option(
    "--output", default=Path("examples/tiny"), show_default=True, type=click.Path(path_type=Path),
    help="directory to build in; parts that are already there are kept",
)  # fmt: skip
@click.option(
    "--seed", type=SEED, default=0, show_default=True, help="of text sampling, initialisation and batches"
)
@click.option("--target-steps", type=click.IntRange(1), help="updates of the target (2,048 tokens each)")
@click.option("--eagle-steps", type=click.IntRange(1), help="updates of the EAGLE-3 head")
@click.option("--causal-lm-steps", type=click.IntRange(1), help="updates of the causal LM drafter")
def build(output: Path, **values: int | None) -> None:
    """Train the tiny pair from the standard library's source (about an hour on 2 cores)."""
    from ppow_train.preflight import check_writable

    check_writable(output)
    from ppow_train.tiny.build import build as run
    from ppow_train.tiny.recipe import TinyRecipe

    recipe = dataclasses.replace(
        TinyRecipe(), **{name: value for name, value in values.items() if value is not None}
    )
    run(output, recipe, click.echo)


@tiny.command()
@click.option(
    "--tiny", "source", default=Path("examples/tiny"), show_default=True, type=click.Path(path_type=Path),
    help="directory of the tiny pair",
)  # fmt: skip
@click.option("--output", required=True, type=click.Path(path_type=Path), help="directory to make")
@click.option("--layers", type=click.IntRange(1), default=64, show_default=True, help="of the target")
@click.option(
    "--intermediate-size", type=click.IntRange(1), default=1536, show_default=True,
    help="neurons of each feed-forward layer",
)  # fmt: skip
@click.option(
    "--adapter", type=click.Path(path_type=Path),
    help="adapter for the tiny target, as `make demo` trains one, to write as OUTPUT/adapter for the costlier target",
)  # fmt: skip
def costlier(source: Path, output: Path, layers: int, intermediate_size: int, adapter: Path | None) -> None:
    """Make a target that writes what the tiny one writes and costs more, as real targets do.

    Its added layers and neurons compute and add nothing: drafters are accepted as before, and pay for themselves.
    """
    from ppow_train.preflight import check_writable

    check_writable(output.parent)
    from ppow_train.tiny.costlier import carry_over, make_costlier
    from vllm_ppow.artifact import read_adapter

    if adapter is not None:
        read_adapter(adapter)  # before anything is made
    make_costlier(source, output, layers, intermediate_size)
    click.echo(f"{output / 'target'}: {layers} layers of {intermediate_size} neurons; drafters beside it")
    if adapter is not None:
        click.echo(f"{carry_over(adapter, output)}: the adapter for it")
