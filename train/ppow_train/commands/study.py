"""`ppow study`: every objective against the supervised start, by a plan. Left out: everything but the command line."""

from __future__ import annotations

from pathlib import Path

import click

from ppow_train.commands.options import DEVICES
from ppow_train.errors import UserError


@click.command()
@click.argument("plan", type=click.Path(path_type=Path))
@click.option(
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="directory of results; the same one goes on",
)
@click.option(
    "--device", type=click.Choice(DEVICES), default="cpu", show_default=True, help="where models run"
)
@click.option("--cell", "cells", multiple=True, help="do only these cells of the plan now  [default: all]")
@click.option("--arm", "arms", multiple=True, help="do only these arms of the plan now  [default: all]")
@click.option("--table-only", is_flag=True, help="print what is there, run nothing")
def study(
    plan: Path, output: Path, device: str, cells: tuple[str, ...], arms: tuple[str, ...], table_only: bool
) -> None:
    """Compare training arms at equal windows: tuned learning rates, several seeds, 95 % intervals paired by prompt.

    PLAN is a YAML file (examples/benchmarks/study.yaml). Acceptance is the expected serving walk on held-out prompts.
    Start the same command several times to work at one study with several processes.
    """
    from ppow_train.preflight import check_writable
    from ppow_train.prompts import read_groups

    check_writable(output)
    from ppow_train.study.costs import read_costs
    from ppow_train.study.plan import read_plan
    from ppow_train.study.results import Results
    from ppow_train.study.table import origins, tables

    wanted = read_plan(plan)
    _check_names("cell", cells, [cell.name for cell in wanted.cells])
    _check_names("arm", arms, list(wanted.arms))
    if table_only and not output.is_dir():
        raise UserError(
            f"There is no directory {output} to print a table of: give that of a study, or drop --table-only."
        )
    results = Results(output)
    if table_only:
        from ppow_train.study.facts import check_facts, plan_facts

        check_facts(results, plan_facts(wanted))
    else:
        from ppow_train.machine import choose_device
        from ppow_train.study.run import Study

        choose_device(device)
        Study(wanted, results, device, cells, arms, say=lambda text: click.echo(text, err=True)).finish()
    groups = {cell.held_out: read_groups(Path(cell.held_out)) for cell in wanted.cells}
    text = tables(wanted, results.read(), read_costs(output), groups) + origins(results.made_with())
    (output / "table.md").write_text(text, encoding="utf-8")
    click.echo(text)


def _check_names(option: str, given: tuple[str, ...], known: list[str]) -> None:
    for name in given:
        if name not in known:
            raise click.UsageError(f"--{option} must be one of the plan's: {'; '.join(known)}; got {name!r}.")
