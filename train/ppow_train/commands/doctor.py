"""`ppow doctor`: would this be served here, and why (not). Left out: the checks themselves (doctor.py)."""

from __future__ import annotations

import dataclasses
import json

import click

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@click.command()
@click.option("--target", required=True, help="directory or Hub repo id of the target")
@click.option("--adapter", required=True, help="adapter directory or Hub repo id")
@click.option("--adapter-revision", help="Hub revision of the adapter")
@click.option(
    "--drafter",
    "--base-drafter",
    "base_drafter",
    help="directory or Hub repo id of the base drafter  [default: the recorded one]",
)
@click.option(
    "-K",
    "--num-speculative-tokens",
    type=click.IntRange(1),
    help="tokens per draft  [default: the adapter's]",
)
@click.option("--allow-target-mismatch", is_flag=True, help="as in serving")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object on stdout")
@click.pass_context
def doctor(
    ctx: click.Context,
    target: str,
    adapter: str,
    adapter_revision: str | None,
    base_drafter: str | None,
    num_speculative_tokens: int | None,
    allow_target_mismatch: bool,
    as_json: bool,
) -> None:
    """Check target, drafter, adapter and vLLM, and say what would happen and why. Nothing is started.

    Exits with 1 if it would not be served.
    """
    from ppow_train.doctor import Question, examine

    diagnosis = examine(
        Question(
            target, adapter, adapter_revision, base_drafter, num_speculative_tokens, allow_target_mismatch
        )
    )
    if as_json:
        checks = [dataclasses.asdict(check) for check in diagnosis.checks]
        value = {"serves": diagnosis.serves, "checks": checks, "speculative_config": diagnosis.native}
        click.echo(json.dumps(value, indent=2))
    else:
        width = max(len(check.name) for check in diagnosis.checks)
        for check in diagnosis.checks:
            status = click.style(f"{check.status:<5}", fg=_COLOURS[check.status])
            click.echo(f"{status} {check.name:<{width}} {check.detail}")
            if check.remedy:
                click.echo(f"{'':<{width + 7}}→ {check.remedy}")
        if diagnosis.native:
            click.echo(f"vLLM would be given {json.dumps(diagnosis.native)}")
        click.echo("It would be served." if diagnosis.serves else "It would not be served.")
    ctx.exit(0 if diagnosis.serves else 1)
