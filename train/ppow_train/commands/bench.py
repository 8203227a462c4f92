"""`ppow bench`: an adapter against its bare drafter and no speculation, in vLLM. Left out: measuring (benchmark.py)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ppow_train.commands.engine_arguments import engine_argument_option
from ppow_train.commands.options import dtype_option

if TYPE_CHECKING:
    from ppow_train.benchmark import ArmResult


@click.command()
@click.option("--adapter", required=True, help="adapter directory or Hub repo id")
@click.option(
    "--prompts",
    required=True,
    type=click.Path(path_type=Path),
    help="JSONL of prompts, chats or logged requests",
)
@click.option(
    "--target", help="directory or Hub repo id of the target  [default: the one the adapter was trained for]"
)
@click.option(
    "--allow-target-mismatch",
    is_flag=True,
    help="measure with another target than the one trained for, such as a quantised copy",
)
@click.option(
    "--drafter",
    help="directory or Hub repo id of the base drafter  [default: the one the adapter was trained on]",
)
@click.option(
    "--num-speculative-tokens", type=click.IntRange(1), help="K, tokens per draft  [default: the adapter's]"
)
@click.option(
    "--max-tokens",
    type=click.IntRange(2),
    default=64,
    show_default=True,
    help="output tokens per prompt at most; the first of them is never drafted",
)
@click.option("--limit", type=click.IntRange(1), default=64, show_default=True, help="prompts to use at most")
@click.option(
    "--temperature",
    "temperatures",
    multiple=True,
    type=click.FloatRange(0),
    default=(0.0, 1.0),
    show_default=True,
    help="to serve at; may be given several times",
)
@click.option(
    "--concurrency",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="requests that run at the same time",
)
@click.option(
    "--rounds",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="passes over the prompts, of every arm",
)
@click.option(
    "--side-by-side/--one-at-a-time", default=None,
    help="all engines up, taking turns, or one after the other  [default: side by side on a CPU, one at a time on "
    "GPUs, whose memory they would have to share]",
)  # fmt: skip
@click.option(
    "--tensor-parallel-size",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="GPUs of the target",
)
@click.option(
    "--max-model-len",
    type=click.IntRange(1),
    help="tokens of prompt and output at most  [default: what these prompts need]",
)
@dtype_option("of the target, as in vLLM")
@engine_argument_option()
@click.option(
    "--compile/--eager",
    "compiled",
    default=False,
    show_default=True,
    help="compile and capture graphs, for speeds like a server's; eager starts faster",
)
@click.option(
    "--output", type=click.Path(path_type=Path), help="directory for benchmark.json and benchmark.png"
)
@click.option("--json", "as_json", is_flag=True, help="print the result as one JSON object on stdout")
def bench(output: Path | None, as_json: bool, **arguments: Any) -> None:
    """Measure an adapter in vLLM on prompts of your own.

    Exits with 1 when greedy output differs from no speculation by more than ties: texts that part where the target's
    two best tokens are within rounding, which kernels decide by the shape of the batch.
    """
    from ppow_train.preflight import check_writable

    if output:
        check_writable(output)
    from rich.console import Console

    from ppow_train.report import as_json as to_json
    from ppow_train.report import check_plots, print_table, write_json, write_plot

    if output:
        check_plots()
    console = Console(stderr=as_json)
    directory, num_prompts, results = _measure(
        arguments, lambda text: console.print(f"  {text}", style="dim")
    )
    told = ("max_tokens", "concurrency", "dtype", "compiled", "tensor_parallel_size", "engine_arguments")
    facts = {"adapter": str(directory), "prompts": str(arguments["prompts"])}
    value = to_json(results, facts | {name: arguments[name] for name in told})
    file = arguments["prompts"].name
    print_table(results, f"{file}: {num_prompts} prompts × {arguments['max_tokens']} tokens", console)
    if as_json:
        click.echo(json.dumps(value))
    if output:  # after they are shown: what took long is not lost with a disk that is full by now
        write_json(output / "benchmark.json", value)
        write_plot(output / "benchmark.png", results, f"{file}, {num_prompts} prompts")
    if any(result.changes_output for result in results):
        raise click.ClickException(
            "greedy output differs from no speculation: do not serve this; please report it."
        )


def _measure(arguments: dict[str, Any], say: Callable[[str], None]) -> tuple[Path, int, list[ArmResult]]:
    """Directory of the adapter, prompts used, and what the arms did with them."""
    import torch

    from ppow_train.benchmark import Work, run_benchmark
    from ppow_train.generation import load_tokenizer
    from ppow_train.preflight import find_target
    from ppow_train.prompts import read_prompts, read_requests, text_ids
    from ppow_train.serving_eval import EngineOptions
    from vllm_ppow.artifact import read_adapter
    from vllm_ppow.resolve import resolve_base_drafter, resolve_directory

    read_requests(arguments["prompts"])  # a malformed line is reported first
    directory, from_hub = resolve_directory(arguments["adapter"])
    loaded = read_adapter(directory)
    base = resolve_base_drafter(loaded, from_hub, arguments["drafter"])
    allowed = arguments["allow_target_mismatch"]
    target, _ = find_target(loaded, arguments["target"], allow_mismatch=allowed)
    tokenizer = load_tokenizer(target)
    prompts = text_ids(read_prompts(arguments["prompts"], tokenizer)[: arguments["limit"]], tokenizer)
    length = arguments["num_speculative_tokens"] or loaded.config.num_speculative_tokens
    side_by_side = arguments["side_by_side"]
    results = run_benchmark(
        loaded,
        base,
        EngineOptions(
            str(target),
            _max_model_len(arguments, prompts, length, target),
            arguments["concurrency"],
            enforce_eager=not arguments["compiled"],
            dtype=arguments["dtype"],
            tensor_parallel_size=arguments["tensor_parallel_size"],
            more=arguments["engine_arguments"],
        ),
        Work(
            prompts,
            arguments["max_tokens"],
            arguments["temperatures"],
            arguments["rounds"],
        ),
        num_speculative_tokens=length,
        side_by_side=not torch.cuda.is_available() if side_by_side is None else side_by_side,
        allow_target_mismatch=allowed,
        say=say,
    )
    return directory, len(prompts), results


def _max_model_len(
    arguments: dict[str, Any], prompts: Sequence[Sequence[int]], num_speculative_tokens: int, target: Path
) -> int:
    """Of the engines: as asked, by default with room for these prompts.

    Raises:
        UserError: too little for them.
    """
    from ppow_train.errors import UserError
    from ppow_train.loading import read_config
    from ppow_train.serving_eval import model_length

    needed = max(map(len, prompts)) + arguments["max_tokens"]
    room = arguments["max_model_len"] or model_length(
        prompts, arguments["max_tokens"], num_speculative_tokens, read_config(target)
    )
    if room < needed:
        limit = "--max-model-len is" if arguments["max_model_len"] else "the target takes"
        raise UserError(
            f"The longest prompt and its output need {needed} tokens, {limit} {room}: lower --max-tokens"
            f"{', raise --max-model-len' if arguments['max_model_len'] else ''} or shorten the prompts."
        )
    return room
