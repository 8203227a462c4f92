"""`ppow profile`: what draft and target steps cost on this machine, and what is accepted, stored beside the adapter.

Left out: measuring (profiling.py), the table (profile_table.py).
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ppow_train.commands.engine_arguments import engine_argument_option
from ppow_train.commands.options import dtype_option

if TYPE_CHECKING:
    from ppow_train.profile_engine import Measured
    from ppow_train.profiling import ProfileOptions
    from vllm_ppow.artifact import Adapter

_CONTEXTS = (128, 1024)  # the second where the target takes it


class _Numbers(click.ParamType):
    """Whole numbers >= 1, with commas between them; sorted, each once."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            numbers = sorted({int(part) for part in value.split(",")})
        except ValueError:
            numbers = [0]
        if numbers[0] < 1:
            self.fail(f"{value!r} is not a list of whole numbers >= 1, such as 1,2,4.", param, ctx)
        return tuple(numbers)


@click.command()
@click.option("--adapter", required=True, help="adapter directory or Hub repo id")
@click.option(
    "--prompts",
    required=True,
    type=click.Path(path_type=Path),
    help="JSONL of prompts, chats or logged requests",
)
@click.option("--target", help="directory or Hub repo id of the target  [default: the adapter's own]")
@click.option(
    "--allow-target-mismatch",
    is_flag=True,
    help="measure with another target than the one trained for, such as a quantised copy",
)
@click.option("--drafter", help="directory or Hub repo id of the base drafter  [default: the adapter's own]")
@click.option(
    "--batch-sizes", type=_Numbers(), default="1,2,4,8,16,32", show_default=True, help="requests per step"
)
@click.option("--context-lengths", type=_Numbers(), help="tokens of context per request  [default: 128,1024]")
@click.option("--num-speculative-tokens", type=click.IntRange(1), help="K at most  [default: the adapter's]")
@click.option("--steps", type=click.IntRange(1), default=5, show_default=True, help="steps timed in a row")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="passes over the grid")
@click.option(
    "--max-tokens", type=click.IntRange(2), default=64, show_default=True,
    help="output per prompt; its first token is never drafted",
)  # fmt: skip
@click.option("--limit", type=click.IntRange(1), default=64, show_default=True, help="prompts at most")
@click.option("--temperature", type=click.FloatRange(0), help="of acceptance  [default: the adapter's]")
@dtype_option("of the target, as in vLLM")
@click.option("--tensor-parallel-size", type=click.IntRange(1), default=1, show_default=True)
@engine_argument_option()
@click.option(
    "--compile/--eager",
    "compiled",
    default=True,
    show_default=True,
    help="compile and capture graphs, as a server does; eager starts faster",
)
@click.option("--output", type=click.Path(path_type=Path), help="file to write, not the adapter's own")
@click.option("--json", "as_json", is_flag=True, help="print the result as one JSON object on stdout")
def profile(output: Path | None, as_json: bool, **arguments: Any) -> None:
    """Measure what drafting costs on this machine, in vLLM, and how much of it the target accepts.

    The figures are stored beside the adapter, for the server's draft window and for `ppow train --cost-profile`.
    """
    from rich.console import Console

    from ppow_train.errors import UserError
    from ppow_train.preflight import check_writable
    from ppow_train.profile_table import as_json as to_json
    from ppow_train.profile_table import print_table
    from vllm_ppow.artifact import read_adapter
    from vllm_ppow.cost_profile import COST_PROFILE_FILE, write_profile_file
    from vllm_ppow.resolve import resolve_directory

    directory, from_hub = resolve_directory(arguments["adapter"])
    loaded = read_adapter(directory)
    if from_hub and output is None:
        raise UserError(
            "An adapter from the Hub keeps no profile of this machine: name a file with --output."
        )
    file = output or directory / COST_PROFILE_FILE
    if not file.parent.is_dir() or file.is_dir():
        raise UserError(f"--output {file} must be a file in a directory that exists.")
    check_writable(file.parent)
    console = Console(stderr=as_json)
    measured = _measure(
        loaded, from_hub, arguments, lambda text: console.print(f"  {text}", style="dim", highlight=False)
    )
    print_table(measured, console)
    if as_json:
        click.echo(json.dumps(to_json(measured) | {"file": str(file)}))
    write_profile_file(file, measured.profile)  # after it is shown: a disk may be full by now
    console.print(f"Written: {file}", soft_wrap=True, highlight=False)


def _measure(adapter: Adapter, from_hub: bool, arguments: dict[str, Any], say: Any) -> Measured:
    from ppow_train.generation import load_tokenizer
    from ppow_train.preflight import find_target
    from ppow_train.profile_engine import ProfileEngine, measured_spec
    from ppow_train.prompts import read_prompts, read_requests, text_ids
    from ppow_train.serving_eval import EngineOptions
    from vllm_ppow.resolve import resolve_base_drafter

    read_requests(arguments["prompts"])  # a malformed line is reported first
    base = resolve_base_drafter(adapter, from_hub, arguments["drafter"])
    allowed = arguments["allow_target_mismatch"]
    target, fingerprint = find_target(adapter, arguments["target"], allow_mismatch=allowed)
    tokenizer = load_tokenizer(target)
    prompts = text_ids(read_prompts(arguments["prompts"], tokenizer)[: arguments["limit"]], tokenizer)
    options, longest = _plan(adapter, target, arguments, max(map(len, prompts)))
    engine_options = EngineOptions(
        str(target),
        longest,
        # The ladder of draft lengths is read up to it.
        max(options.batch_sizes[-1], len(options.draft_lengths)),
        enforce_eager=not arguments["compiled"],
        dtype=arguments["dtype"],
        tensor_parallel_size=arguments["tensor_parallel_size"],
        more=arguments["engine_arguments"],
    )
    say("starting vLLM")
    spec = measured_spec(adapter, base, options, allow_target_mismatch=allowed)
    with ProfileEngine("profile", engine_options, spec) as engine:
        engine.wait_until_ready()
        measured = engine.profile(adapter, options, prompts, say)
    if fingerprint is None or fingerprint == measured.profile.target_fingerprint:
        return measured
    # The engine's process knows the adapter's target only; a server compares with the one that it serves.
    return dataclasses.replace(
        measured, profile=dataclasses.replace(measured.profile, target_fingerprint=fingerprint)
    )


def _plan(
    adapter: Adapter, target: Path, arguments: dict[str, Any], longest_prompt: int
) -> tuple[ProfileOptions, int]:
    """What is measured, and the tokens per request that the engine must hold for it.

    Raises:
        UserError: the target does not take that many.
    """
    from ppow_train.context_length import context_length
    from ppow_train.errors import UserError
    from ppow_train.profiling import ProfileOptions, draft_lengths

    limit = context_length(target)
    k = arguments["num_speculative_tokens"] or adapter.config.num_speculative_tokens
    temperature = arguments["temperature"]

    def plan(contexts: tuple[int, ...]) -> tuple[ProfileOptions, int]:
        options = ProfileOptions(
            arguments["batch_sizes"],
            contexts,
            draft_lengths(k),
            arguments["steps"],
            arguments["rounds"],
            arguments["max_tokens"],
            adapter.config.temperature if temperature is None else temperature,
        )
        return options, max(options.max_model_len, longest_prompt + options.max_tokens + options.room)

    chosen = plan(arguments["context_lengths"] or _CONTEXTS)
    if not arguments["context_lengths"] and limit and chosen[1] > limit:
        chosen = plan(_CONTEXTS[:1])
    if limit and chosen[1] > limit:
        raise UserError(
            f"Measuring needs {chosen[1]} tokens per request, the target takes {limit}: give smaller "
            "--context-lengths, --batch-sizes, --steps or --max-tokens, or shorter prompts."
        )
    return chosen
