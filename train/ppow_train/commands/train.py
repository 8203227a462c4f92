"""`ppow train`: target, drafter and prompts in, adapter out. Left out: everything but the command line."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ppow_train.commands.options import given, training_options

if TYPE_CHECKING:
    from rich.progress import Progress

    from ppow_train.config import PPOWConfig
    from ppow_train.parity import Parity
    from ppow_train.training import Pair, TrainingResult
    from ppow_train.types import Trajectories


@click.command()
@click.option("--target", required=True, help="directory or Hub repo id of the target")
@click.option(
    "--drafter", required=True, help="directory or Hub repo id of the drafter (EAGLE-3 head or causal LM)"
)
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    help='JSONL file, one {"prompt": "…"} per line',
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="directory that `ppow data` wrote, instead of --prompts and --held-out",
)
@click.option(
    "--held-out",
    type=click.Path(path_type=Path),
    help="JSONL file of prompts to measure on, never trained on",
)
@click.option("--output", required=True, type=click.Path(path_type=Path), help="directory of the adapter")
@click.option(
    "--config", "config_file", type=click.Path(path_type=Path), help="YAML file of options; flags override it"
)
@click.option("--max-new-tokens", default=128, show_default=True, help="tokens of each trajectory at most")
@click.option(
    "--cache", default=Path("runs/trajectories"), show_default=True, type=click.Path(path_type=Path),
    help="where generated trajectories are kept for the next run",
)  # fmt: skip
@click.option(
    "--draft-sample-method",
    type=click.Choice(["probabilistic", "greedy"]),
    default="probabilistic",
    show_default=True,
    help="how vLLM will draw drafts at a temperature above 0",
)
@click.option("--seed", default=0, show_default=True, help="of trajectories, initialisation and windows")
@click.option("--device", default=None, help="cpu or cuda  [default: cuda where there is one]")
@click.option(
    "--parity/--no-parity",
    default=True,
    show_default=True,
    help="with --held-out: serve the adapter in vLLM at the end and fail unless it accepts what training simulates",
)
@click.option(
    "--estimate", is_flag=True, help="print the memory and time that the run will take, and train nothing"
)
@click.option("--json", "as_json", is_flag=True, help="print the result as one JSON object on stdout")
@training_options
@click.pass_context
def train(
    ctx: click.Context,
    target: str,
    drafter: str,
    prompts: Path | None,
    data: Path | None,
    held_out: Path | None,
    output: Path,
    config_file: Path | None,
    max_new_tokens: int,
    cache: Path,
    draft_sample_method: str,
    seed: int,
    device: str | None,
    parity: bool,
    estimate: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train a LoRA adapter for a drafter on prompts of your own.

    The target continues every prompt once, now or in `ppow data`; windows of its continuations are what the drafter is
    trained on. The adapter directory is what vLLM is given as "model" of method ppow.
    """
    _check_usage(ctx, prompts, data)
    from ppow_train.data import read_prompts

    for file in (prompts, held_out):
        if file is not None:
            read_prompts(file)  # a malformed line is reported before models are loaded
    if data is not None:
        from ppow_train.trajectory_store import read_manifest

        read_manifest(data)
    from ppow_train.config import check_keys, read_config_file

    values = {**(read_config_file(config_file) if config_file else {}), **given(options)}
    check_keys(values, "the command line")
    request = _Request(
        target,
        drafter,
        prompts,
        data,
        held_out,
        output,
        values,
        max_new_tokens,
        cache,
        draft_sample_method,
        seed,
        device,
        parity,
    )
    if estimate:
        _estimate(request, as_json)
        return
    result, agreement = _run(request)
    _report(result, agreement, as_json)
    if agreement is not None and not agreement.holds:
        raise click.ClickException(
            "vLLM does not accept what training simulates (above): the adapter is written, do not trust its figures."
        )


def _check_usage(ctx: click.Context, prompts: Path | None, data: Path | None) -> None:
    if (prompts is None) == (data is None):
        raise click.UsageError("give exactly one of --prompts and --data.")
    for name in ("held_out", "max_new_tokens", "cache") if data is not None else ():
        if ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            raise click.UsageError(
                f"--{name.replace('_', '-')} was settled by `ppow data`: drop it, or give --prompts."
            )


@dataclasses.dataclass(frozen=True)
class _Request:
    """What the command line asked for; `values` are the training options that were given."""

    target: str
    drafter: str
    prompts: Path | None
    data: Path | None
    held_out: Path | None
    output: Path
    values: dict[str, Any]
    max_new_tokens: int
    cache: Path
    draft_sample_method: str
    seed: int
    device: str | None
    parity: bool


def _load(request: _Request, scratch: str) -> tuple[PPOWConfig, Pair]:
    import torch

    from ppow_train.config import PPOWConfig
    from ppow_train.training import load_pair

    device = request.device or ("cuda" if torch.cuda.is_available() else "cpu")
    fixed = {"output_dir": scratch, "seed": request.seed, "use_cpu": device == "cpu"}
    return PPOWConfig(**{**fixed, **request.values}), load_pair(request.target, request.drafter, device)


def _estimate(request: _Request, as_json: bool) -> None:
    from ppow_train.estimate import estimate_run
    from ppow_train.progress import make_progress

    with tempfile.TemporaryDirectory() as scratch, make_progress() as progress:
        config, pair = _load(request, scratch)
        trajectories, _ = _splits(request, pair, config, progress)
        estimated = estimate_run(pair, trajectories, config, Path(scratch))
    click.echo(json.dumps(estimated.as_json()) if as_json else str(estimated))


def _run(request: _Request) -> tuple[TrainingResult, Parity | None]:
    from ppow_train.progress import make_progress
    from ppow_train.training import train_adapter

    with tempfile.TemporaryDirectory() as scratch, make_progress() as progress:
        config, pair = _load(request, scratch)
        trajectories, held_out = _splits(request, pair, config, progress)
        source = request.data or request.prompts
        result = train_adapter(
            pair,
            trajectories,
            config,
            request.output,
            held_out=held_out,
            draft_sample_method=request.draft_sample_method,
            facts={"prompts": source.name if source else None},
            progress=progress,
        )
    return result, _check_parity(request, pair, held_out, result) if held_out and request.parity else None


def _check_parity(
    request: _Request, pair: Pair, held_out: Trajectories, result: TrainingResult
) -> Parity | None:
    """The parity gate, where vLLM is installed; where it is not, say that nothing was checked."""
    if importlib.util.find_spec("vllm") is None:
        click.echo(
            "Not checked against vLLM, which is not installed here: run `ppow bench` where it is.", err=True
        )
        return None
    from ppow_train.parity import check_parity
    from vllm_ppow.artifact import resolve_directory

    return check_parity(
        pair,
        result.adapter,
        resolve_directory(request.drafter)[0],
        held_out,
        say=lambda text: click.echo(text, err=True),
    )


def _splits(
    request: _Request, pair: Pair, config: PPOWConfig, progress: Progress
) -> tuple[Trajectories, Trajectories | None]:
    """What is trained and what is measured on, from disk or generated now."""
    from ppow_train.training import get_trajectories
    from ppow_train.trajectory_store import load_splits

    if request.data is not None:
        return load_splits(request.data, pair.target_ref.fingerprint, config.serving_temperature)

    def generated(file: Path, seed: int, extra_tokens: int = 0) -> Trajectories:
        return get_trajectories(
            pair,
            file,
            cache=request.cache,
            max_new_tokens=request.max_new_tokens + extra_tokens,
            temperature=config.serving_temperature,
            seed=seed,
            progress=progress,
        )

    assert request.prompts is not None
    trajectories = generated(request.prompts, request.seed)
    if request.held_out is None:
        return trajectories, None
    # K tokens longer: the last draft of a simulated serving walk must fit.
    return trajectories, generated(request.held_out, request.seed + 1, config.num_speculative_tokens)


def _report(result: TrainingResult, parity: Parity | None, as_json: bool) -> None:
    config = result.adapter.config
    if as_json:
        value = {"adapter": str(result.adapter.directory), "training": config.training}
        click.echo(json.dumps(value | {"parity": parity.as_json() if parity else None}))
        return
    if result.before and result.after:
        before, after = result.before.num_accepted_tokens, result.after.num_accepted_tokens
        click.echo(
            f"Simulated accepted tokens per draft on held-out prompts: {before:.3f} -> {after:.3f} "
            f"({100 * (after / before - 1):+.1f} %)"
        )
    if parity:
        click.echo(
            f"Parity on the same prompts: simulated {parity.simulated.mean_accepted:.3f}, counted by vLLM "
            f"{parity.served.mean_accepted:.3f} accepted tokens per draft; by position "
            + ", ".join(
                f"{d:+.3f} (±{t:.3f})" for d, t in zip(parity.differences, parity.tolerances, strict=True)
            )
            + f": {'agree' if parity.holds else 'DIFFER'}"
        )
    click.echo(f"Peak memory: {config.training['peak_memory_bytes'] / 2**20:,.0f} MiB")
    spec = json.dumps({"method": "ppow", "model": str(result.adapter.directory)})
    click.echo(f"Adapter: {result.adapter.directory}")
    click.echo(f"Serve it: vllm serve {config.target.name_or_path} --speculative-config '{spec}'")
