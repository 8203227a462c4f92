"""`ppow windows`: the log of windows of a run as a picture. Left out: the picture itself."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--output", type=click.Path(path_type=Path), help="PNG to write  [default: windows.png beside the log]"
)
def windows(path: Path, output: Path | None) -> None:
    """Draw which windows a run trained on, and what they earned.

    PATH is an adapter directory, or a windows.jsonl, of a finished or a running `ppow train`.
    """
    from ppow_train.errors import UserError
    from ppow_train.window_lines import read_window_log
    from ppow_train.window_plot import write_window_plot

    if output is not None and output.is_dir():
        raise UserError(f"{output} is a directory: name the PNG to write, such as {output / 'windows.png'}.")
    lines = read_window_log(path)
    output = output or (path if path.is_dir() else path.parent) / "windows.png"
    write_window_plot(output, lines)
    click.echo(f"{len(lines)} intervals, {lines[-1]['step']} updates: {output}")
