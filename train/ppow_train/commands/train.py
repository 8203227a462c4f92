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
    required=True,
    type=click.Path(path_type=Path),
    help='JSONL file, one {"prompt": "…"} per line',
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
@click.option("--json", "as_json", is_flag=True, help="print the result as one JSON object on stdout")
@training_options
def train(
    target: str,
    drafter: str,
    prompts: Path,
    held_out: Path | None,
    output: Path,
    config_file: Path | None,
    max_new_tokens: int,
    cache: Path,
    draft_sample_method: str,
    seed: int,
    device: str | None,
    parity: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train a LoRA adapter for a drafter on prompts of your own.

    The target continues every prompt once; windows of its continuations are what the drafter is trained on. The adapter
    directory is what vLLM is given as "model" of method ppow.
    """
    from ppow_train.data import read_prompts

    for file in (prompts, held_out):
        if file is not None:
            read_prompts(file)  # a malformed line is reported before models are loaded
    from ppow_train.config import check_keys, read_config_file

    values = {**(read_config_file(config_file) if config_file else {}), **given(options)}
    check_keys(values, "the command line")
    request = _Request(
        target,
        drafter,
        prompts,
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
    result, agreement = _run(request)
    _report(result, agreement, as_json)
    if agreement is not None and not agreement.holds:
        raise click.ClickException(
            "vLLM does not accept what training simulates (above): the adapter is written, do not trust its figures."
        )


@dataclasses.dataclass(frozen=True)
class _Request:
    """What the command line asked for; `values` are the training options that were given."""

    target: str
    drafter: str
    prompts: Path
    held_out: Path | None
    output: Path
    values: dict[str, Any]
    max_new_tokens: int
    cache: Path
    draft_sample_method: str
    seed: int
    device: str | None
    parity: bool


def _run(request: _Request) -> tuple[TrainingResult, Parity | None]:
    import torch

    from ppow_train.config import PPOWConfig
    from ppow_train.progress import make_progress
    from ppow_train.training import get_trajectories, load_pair, train_adapter

    device = request.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as scratch, make_progress() as progress:
        fixed = {"output_dir": scratch, "seed": request.seed, "use_cpu": device == "cpu"}
        config = PPOWConfig(**{**fixed, **request.values})
        pair = load_pair(request.target, request.drafter, device)

        def trajectories(file: Path, seed: int, extra_tokens: int = 0) -> Trajectories:
            return get_trajectories(
                pair,
                file,
                cache=request.cache,
                max_new_tokens=request.max_new_tokens + extra_tokens,
                temperature=config.serving_temperature,
                seed=seed,
                progress=progress,
            )

        held_out = None
        if request.held_out:  # K tokens longer: the last draft of a walk must fit
            held_out = trajectories(request.held_out, request.seed + 1, config.num_speculative_tokens)
        result = train_adapter(
            pair,
            trajectories(request.prompts, request.seed),
            config,
            request.output,
            held_out=held_out,
            draft_sample_method=request.draft_sample_method,
            facts={"prompts": request.prompts.name},
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
    from ppow_train.data import read_prompts
    from ppow_train.parity import check_parity
    from vllm_ppow.artifact import resolve_directory

    return check_parity(
        pair,
        result.adapter,
        resolve_directory(request.drafter)[0],
        read_prompts(request.held_out) if request.held_out else [],
        held_out,
        max_tokens=request.max_new_tokens,
        say=lambda text: click.echo(text, err=True),
    )


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
    spec = json.dumps({"method": "ppow", "model": str(result.adapter.directory)})
    click.echo(f"Adapter: {result.adapter.directory}")
    click.echo(f"Serve it: vllm serve {config.target.name_or_path} --speculative-config '{spec}'")
