"""`ppow train`: target, drafter and prompts in, adapter out. Left out: running it (training_run.py)."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ppow_train.commands import training_run
from ppow_train.commands.engine_arguments import engine_argument_option
from ppow_train.commands.options import SEED, device_option, given, training_options
from ppow_train.commands.training_run import Outcome, Request
from ppow_train.errors import UserError
from ppow_train.preflight import RUN, check_writable
from vllm_ppow.artifact import PPOW_CONFIG, check_output

if TYPE_CHECKING:
    from ppow_train.parity import Parity
    from ppow_train.push import Push
    from ppow_train.training import TrainingResult


@click.command()
@click.option("--target", required=True, help="directory or Hub repo id of the target")
@click.option(
    "--drafter", required=True, help="directory or Hub repo id of the drafter (EAGLE-3 head or causal LM)"
)
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    help="JSONL file of prompts, chats or logged requests",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="directory that `ppow data` wrote, instead of --prompts and --held-out",
)
@click.option(
    "--held-out",
    type=click.Path(path_type=Path),
    help="the same, to measure on, never trained on",
)
@click.option("--output", required=True, type=click.Path(path_type=Path), help="directory of the adapter")
@click.option(
    "--overwrite", is_flag=True, help="replace an adapter at --output, with all that lies beside it there"
)
@click.option(
    "--config", "config_file", type=click.Path(path_type=Path), help="YAML file of options; flags override it"
)
@click.option(
    "--max-new-tokens", type=click.IntRange(1), default=128, show_default=True,
    help="tokens of each trajectory at most",
)  # fmt: skip
@click.option(
    "--cache", default=Path("runs/trajectories"), show_default=True, type=click.Path(path_type=Path),
    help="where generated trajectories are kept for the next run",
)  # fmt: skip
@click.option(
    "--checkpoints", type=click.Path(path_type=Path),
    help="directory of training state while the run is unfinished  [default: OUTPUT.checkpoints]",
)  # fmt: skip
@click.option(
    "--resume", is_flag=True, help="go on with the unfinished run in --checkpoints, if there is one"
)
@click.option(
    "--seed", type=SEED, default=0, show_default=True, help="of trajectories, initialisation and windows"
)
@device_option()
@click.option(
    "--parity/--no-parity",
    default=True,
    show_default=True,
    help="with --held-out: serve the adapter in vLLM at the end and fail unless it accepts what training simulates",
)
@engine_argument_option("with --parity: ")
@click.option(
    "--cost-profile", type=click.Path(path_type=Path),
    help="file that `ppow profile` wrote, or adapter directory that has one: where draft_cost_ratio is taken from",
)  # fmt: skip
@click.option(
    "--estimate", is_flag=True, help="print the memory and time that the run will take, and train nothing"
)
@click.option("--json", "as_json", is_flag=True, help="print the result as one JSON object on stdout")
@training_options
@click.pass_context
def train(
    ctx: click.Context,
    config_file: Path | None,
    checkpoints: Path | None,
    cost_profile: Path | None,
    estimate: bool,
    as_json: bool,
    overwrite: bool,
    **arguments: Any,
) -> None:
    """Train a LoRA adapter for a drafter on prompts of your own.

    The target continues every prompt, now or in `ppow data`; windows of its continuations are what the drafter is
    trained on. The adapter directory is what vLLM is given as "model" of method ppow.
    """
    prompts, data, held_out = (arguments[name] for name in ("prompts", "data", "held_out"))
    _check_usage(ctx, prompts, data)
    if arguments["engine_arguments"] and not (arguments["parity"] and (held_out or data)):
        raise click.UsageError(
            "--engine-arg is for parity, which takes --held-out or --data: drop it, or --no-parity."
        )
    output, cache = arguments["output"], arguments["cache"]
    checkpoints = checkpoints or output.parent / f"{output.name}.checkpoints"
    if not estimate:
        _check_places(output, checkpoints, overwrite, arguments["resume"])
    if prompts is not None:
        check_writable(cache, "--cache")
    from ppow_train.prompts import read_requests

    for file in (prompts, held_out):
        if file is not None:
            read_requests(file)  # a malformed line is reported before models are loaded
    if data is not None:
        from ppow_train.trajectory_store import read_manifest

        read_manifest(data)
    from ppow_train.config import check_keys, read_config_file

    values = {**(read_config_file(config_file) if config_file else {}), **given(arguments)}
    if "seed" not in values or ctx.get_parameter_source("seed") is not click.core.ParameterSource.DEFAULT:
        values["seed"] = arguments["seed"]
    _check_cache(ctx, data, values.get("target_cache"))
    if values.get("target_cache") == "disk":
        check_writable(cache, "--cache")
    if data is not None and "continuations" in values:
        raise click.UsageError("continuations were settled by `ppow data`: drop them, or give --prompts.")
    if cost_profile is not None:
        values["draft_cost_ratio"] = _measured_cost(ctx, cost_profile)
    check_keys(values, "the command line")
    _tell_unused(values, data)
    push = _take_push(values, output, arguments["parity"], held_out is not None or data is not None)
    rest = {field.name for field in dataclasses.fields(Request)} - {"values", "checkpoints"}
    request = Request(
        values=values,
        checkpoints=checkpoints,
        **{name: arguments[name] for name in rest},
    )
    if estimate:
        _tell_estimate(request, as_json)
    else:
        _finish(request, push, as_json)


def _check_places(output: Path, checkpoints: Path, overwrite: bool, resume: bool) -> None:
    """Refuse now what the run could not write after the target has continued all prompts, or would destroy.

    An adapter at `output` is replaced where that was asked for, now or when the run began that is resumed.
    """
    final, state = check_output(output), checkpoints.resolve()
    if final == state or final in state.parents or state in final.parents:
        raise UserError(
            f"--checkpoints {checkpoints} and --output {output} must lie apart: each is replaced or deleted as a whole."
        )
    if (final / PPOW_CONFIG).is_file() and not (overwrite or (resume and (state / RUN).is_file())):
        raise UserError(
            f"{output} holds an adapter: name another --output, or add --overwrite to replace it, with its cost "
            "profile and all else that lies there."
        )
    check_writable(final.parent)
    check_writable(checkpoints, "--checkpoints")


def _tell_unused(values: dict[str, Any], data: Path | None) -> None:
    """Say which of the given options change nothing; they are recorded all the same."""
    from ppow_train.trajectory_store import read_manifest
    from ppow_train.unused_options import unused_options

    settled = {} if data is None else {"continuations": read_manifest(data).facts.get("continuations", 1)}
    for reason, names in unused_options(values | settled).items():
        verb = "is" if len(names) == 1 else "are"
        click.echo(f"{', '.join(names)} {verb} not used {reason}.", err=True)


def _measured_cost(ctx: click.Context, path: Path) -> float:
    """draft_cost_ratio of one request, as measured; a flag, so that it overrides the config file."""
    from vllm_ppow.cost_profile import COST_PROFILE_FILE, read_profile_file

    if ctx.params["draft_cost_ratio"] is not None:
        raise click.UsageError("give only one of --cost-profile and --draft-cost-ratio.")
    ratio = read_profile_file(path / COST_PROFILE_FILE if path.is_dir() else path).draft_cost_ratio()
    click.echo(f"draft_cost_ratio {ratio:.4f}, as measured in {path}", err=True)
    return ratio


def _tell_estimate(request: Request, as_json: bool) -> None:
    estimated = training_run.estimate(request)
    if estimated is not None:
        click.echo(json.dumps(estimated.as_json()) if as_json else str(estimated))


def _finish(request: Request, push: Push | None, as_json: bool) -> None:
    """Run, tell, and upload what may be uploaded."""
    from ppow_train.card import write_card
    from ppow_train.push import push_adapter

    outcome = training_run.run(request)
    if outcome is None:
        return  # another process reports
    result, agreement = outcome.result, outcome.parity
    checked = agreement.as_json() if agreement else None
    write_card(result.adapter.directory, result.adapter.config, checked)
    _report(result, agreement, as_json)
    diverged, failure = _divergence(result), _failure(outcome)
    if diverged and failure:
        click.echo(diverged, err=True)
    if told := failure or diverged:
        raise click.ClickException(told + (" It was not uploaded." if push else ""))
    if push is not None:
        if request.parity and agreement is None:
            raise click.ClickException(
                "nothing was held out, so parity was not checked: it was not uploaded."
            )
        click.echo(f"Uploaded: {push_adapter(result.adapter, push, checked)}", err=as_json)


def _divergence(result: TrainingResult) -> str | None:
    """Why the run did not get to its end, if it did not."""
    chosen = result.adapter.config.training.get("selection") or {}
    if "diverged_at_update" not in chosen:
        return None
    return (
        f"training diverged at update {chosen['diverged_at_update']}: the adapter of update "
        f"{chosen['written_after_updates']}, the best until then on held-out prompts, was kept and is written; for a "
        "run that gets to its end, lower --learning-rate, or give --target-dtype float32."
    )


def _failure(outcome: Outcome) -> str | None:
    """What is wrong with the adapter that was written, or was not found out about it."""
    adapter, agreement = outcome.result.adapter, outcome.parity
    if outcome.parity_failure is not None:
        return (
            f"parity with vLLM was not checked ({outcome.parity_failure}): the adapter is written, check it with "
            f"`ppow bench --adapter {adapter.directory} --prompts FILE`."
        )
    if agreement is not None and not agreement.holds:
        return f"{agreement.problem} (figures above): the adapter is written, do not trust its figures."
    if adapter.config.training.get("gain_above_zero") is False:
        return (
            "on held-out prompts it accepts no more than the drafter alone: the adapter is written, do not serve it; "
            f"{_better(adapter.config.training)}."
        )
    return None


def _better(training: dict[str, Any]) -> str:
    """Where an adapter may be found that gains, when the one that was written does not."""
    chosen = training.get("selection")
    if chosen is not None and not chosen["keep_best"]:
        numbers = [point for point in chosen["curve"] if not math.isnan(point[1])]
        updates, accepted = max(numbers, key=lambda point: point[1], default=(0, 0.0))
        if updates not in (0, chosen["written_after_updates"]):
            return f"the one after {updates} updates accepted more ({accepted:.3f}): drop --no-keep-best"
    return "--eval-steps and a lower --learning-rate may find one that gains"


def _take_push(values: dict[str, Any], output: Path, parity: bool, has_held_out: bool) -> Push | None:
    """Where to upload to, asked before hours of training; nothing is uploaded unchecked unless told so."""
    from ppow_train.push import take_push

    if values.get("push_to_hub") and parity:
        if not has_held_out:
            raise UserError("push_to_hub waits for parity, which needs --held-out: give it, or --no-parity.")
        if importlib.util.find_spec("vllm") is None:
            raise UserError(
                "push_to_hub waits for parity, which needs vLLM: install it (pip install '.[cpu]' or '.[gpu]' in a "
                "checkout), or give --no-parity."
            )
    return take_push(values, output)


def _check_usage(ctx: click.Context, prompts: Path | None, data: Path | None) -> None:
    if (prompts is None) == (data is None):
        raise click.UsageError("give exactly one of --prompts and --data.")
    for name in ("held_out", "max_new_tokens") if data is not None else ():
        if ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            raise click.UsageError(
                f"--{name.replace('_', '-')} was settled by `ppow data`: drop it, or give --prompts."
            )


def _check_cache(ctx: click.Context, data: Path | None, target_cache: str | None) -> None:
    """With --data nothing is generated: --cache is then of use for the target's states on disk alone."""
    is_given = ctx.get_parameter_source("cache") is not click.core.ParameterSource.DEFAULT
    if data is not None and is_given and target_cache != "disk":
        raise click.UsageError(
            "--cache was settled by `ppow data`: drop it, or give --prompts, or --target-cache disk."
        )


def _report(result: TrainingResult, parity: Parity | None, as_json: bool) -> None:
    from ppow_train.report import CURVE

    config = result.adapter.config
    if as_json:
        value = {"adapter": str(result.adapter.directory), "training": config.training}
        click.echo(json.dumps(value | {"parity": parity.as_json() if parity else None}))
        return
    if result.before and result.after:
        before, after = result.before.mean_accepted, result.after.mean_accepted
        click.echo(
            f"Expected accepted tokens per draft on {len(result.before.num_drafts)} held-out prompts: "
            f"{before:.3f} -> {after:.3f}" + (f" ({100 * (after / before - 1):+.1f} %)" if before else "")
        )
    if (chosen := config.training.get("selection")) is not None:
        updates = config.training["updates"]
        which = (
            f"after {chosen['written_after_updates']} of {updates} updates, by"
            if chosen["keep_best"]
            else f"after the last of {updates} updates, best or not (--no-keep-best); the curve is of"
        )
        curve = result.adapter.directory / CURVE
        click.echo(f"Written: the adapter {which} {chosen['prompts']} other held-out prompts ({curve})")
    if parity:
        _report_parity(parity)
    click.echo(f"Peak memory: {config.training['peak_memory_bytes'] / 2**20:,.0f} MiB")
    spec = json.dumps({"method": "ppow", "model": str(result.adapter.directory)})
    click.echo(f"Adapter: {result.adapter.directory}")
    click.echo(f"Serve it: vllm serve {config.target.name_or_path} --speculative-config '{spec}'")


def _report_parity(parity: Parity) -> None:
    positions = ", ".join(
        f"{d:+.3f} (±{t:.3f})" for d, t in zip(parity.differences, parity.tolerances, strict=True)
    )
    click.echo(
        f"Parity on the same prompts: simulated {parity.simulated.mean_accepted:.3f}, counted by vLLM "
        f"{parity.served.mean_accepted:.3f} accepted tokens per draft; by position {positions}; on vLLM's own texts "
        f"expected {parity.expected.mean_accepted:.3f} (±{parity.tolerance:.3f}), without the adapter "
        f"{parity.bare.mean_accepted:.3f}: {'agree' if parity.holds else 'DIFFER'}"
    )
