"""`ppow export`: the merged drafter as a checkpoint that vLLM serves alone. Left out: writing it (export.py)."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command()
@click.option("--adapter", required=True, help="adapter directory or Hub repo id")
@click.option("--adapter-revision", "--revision", "revision", help="Hub revision of the adapter")
@click.option(
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="directory to write; must be empty or not exist",
)
@click.option(
    "--drafter",
    help="directory or Hub repo id of the base drafter  [default: the one the adapter was trained on]",
)
def export(adapter: str, revision: str | None, output: Path, drafter: str | None) -> None:
    """Write a drafter with its adapter merged in, as a checkpoint of its own.

    vLLM serves it with its own method, "eagle3" or "draft_model", with the same acceptance; the format is the base
    drafter's. Prints the speculative config.
    """
    from ppow_train.preflight import check_writable
    from vllm_ppow.artifact import read_adapter, whole_place
    from vllm_ppow.config import check_draft_model_path
    from vllm_ppow.resolve import resolve_base_drafter, resolve_directory

    check_writable(whole_place(output.absolute()).parent)
    from ppow_train.export import export_drafter

    directory, from_hub = resolve_directory(adapter, revision)
    loaded = read_adapter(directory)
    if loaded.config.drafter_type == "causal_lm":
        check_draft_model_path(output.absolute())
    config = export_drafter(loaded, resolve_base_drafter(loaded, from_hub, drafter), output.absolute())
    click.echo(json.dumps(config))
