"""`ppow data`: prompts in, the target's trajectories on disk. Left out: everything but the command line."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ppow_train.commands.base_url import BaseUrl
from ppow_train.commands.engine_arguments import engine_argument_option
from ppow_train.commands.options import device_option, dtype_option
from ppow_train.options import PPOWOptions
from ppow_train.ranges import MOST_CONTINUATIONS

if TYPE_CHECKING:
    from ppow_train.endpoint import EndpointBackend
    from ppow_train.generation import Backend, Sampling
    from ppow_train.prompts import Prompt, TokenizedPrompts
    from ppow_train.trajectory_store import Manifest


@click.command()
@click.option("--target", required=True, help="directory or Hub repo id of the target")
@click.option(
    "--prompts", type=click.Path(path_type=Path),
    help="JSONL file of prompts, chats or logged requests of an OpenAI-compatible server",
)  # fmt: skip
@click.option("--dataset", help="Hugging Face dataset (repo id or directory) instead of --prompts")
@click.option("--subset", help="of the dataset, where it has several")
@click.option("--split", default="train", show_default=True, help="of the dataset")
@click.option(
    "--column", default="prompt", show_default=True, help="of the dataset: texts or lists of messages"
)
@click.option(
    "--output", required=True, type=click.Path(path_type=Path), help="directory of the trajectories"
)
@click.option(
    "--engine", type=click.Choice(["hf", "vllm"]), default="hf", show_default=True,
    help="what continues the prompts: Hugging Face generate or a vLLM engine",
)  # fmt: skip
@click.option(
    "--endpoint", type=BaseUrl(), help="base URL of an OpenAI-compatible server of the target instead"
)
@click.option("--model", help="name under which the endpoint serves the target")
@click.option("--api-key-env", metavar="VARIABLE", help="environment variable that holds the endpoint's key")
@click.option(
    "--temperature", type=click.FloatRange(min=0), default=1.0, show_default=True,
    help="the one to be served (0 = greedy)",
)  # fmt: skip
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True,
    help="tokens of each continuation at most",
)  # fmt: skip
@click.option(
    "--continuations", type=click.IntRange(1, MOST_CONTINUATIONS), default=PPOWOptions.continuations, show_default=True,
    help="of each prompt to train on, sampled anew; held-out prompts have one",
)  # fmt: skip
@click.option(
    "--greedy-sampling-temperature", type=click.FloatRange(min=0, min_open=True),
    default=PPOWOptions.greedy_sampling_temperature, show_default=True,
    help="with --temperature 0: of all continuations but the first",
)  # fmt: skip
@click.option("--seed", default=0, show_default=True, help="of sampling")
@click.option("--limit", type=click.IntRange(min=1), help="distinct prompts to use at most  [default: all]")
@click.option(
    "--max-prompt-tokens", type=click.IntRange(min=1), help="leave out longer prompts  [default: keep all]"
)
@click.option(
    "--held-out-share", type=click.FloatRange(0, 1), default=0.1, show_default=True,
    help="share of prompts set apart to measure on, chosen by a hash of the prompt",
)  # fmt: skip
@click.option(
    "--shard-size", type=click.IntRange(min=1), default=512, show_default=True,
    help="records per file; what a kill can cost",
)  # fmt: skip
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=64, show_default=True, help="of --engine hf"
)
@click.option(
    "--concurrency", type=click.IntRange(min=1), default=64, show_default=True,
    help="requests at the same time, of vllm and endpoints",
)  # fmt: skip
@click.option(
    "--compile/--eager", "compiled", default=False, show_default=True, help="vllm: compile and capture graphs"
)
@click.option(
    "--tensor-parallel-size", type=click.IntRange(1), default=1, show_default=True, help="vllm: GPUs of the target"
)  # fmt: skip
@dtype_option("of hf and vllm; auto is the target's own")
@engine_argument_option()
@device_option("hf: ")
@click.option("--json", "as_json", is_flag=True, help="print the result as one JSON object on stdout")
@click.pass_context
def data(ctx: click.Context, as_json: bool, **options: Any) -> None:
    """Let the target continue prompts and keep the token ids, for `ppow train --data`.

    Each prompt is continued once, or --continuations times to train on; duplicates are dropped. An interrupted run
    goes on where it stopped when the same command is given again.
    """
    from ppow_train.preflight import check_writable

    _check_usage(ctx, options)
    check_writable(options["output"])
    request = _Request(**options)
    prompts = request.read()  # a malformed line is reported before anything is loaded
    _report(request, _run(request, prompts), as_json)


# Engine arguments on which tokens depend by rounding at most, as on --concurrency: with others a run may go on.
_OF_MEMORY = ("gpu_memory_utilization", "kv_cache_memory_bytes", "cpu_offload_gb", "max_num_batched_tokens")
# Options that only some ways of continuing have.
_OWNERS = {
    "batch_size": ("hf",),
    "device": ("hf",),
    "dtype": ("hf", "vllm"),
    "compiled": ("vllm",),
    "tensor_parallel_size": ("vllm",),
    "engine_arguments": ("vllm",),
    "concurrency": ("vllm", "endpoint"),
    "api_key_env": ("endpoint",),
}


def _check_usage(ctx: click.Context, options: dict[str, Any]) -> None:
    def given(*names: str) -> list[str]:
        default = click.core.ParameterSource.DEFAULT
        flags = {parameter.name: parameter.opts[0] for parameter in ctx.command.params}
        return [flags[name] for name in names if ctx.get_parameter_source(name) is not default]

    if (options["prompts"] is None) == (options["dataset"] is None):
        raise click.UsageError("give exactly one of --prompts and --dataset.")
    if (options["endpoint"] is None) != (options["model"] is None):
        raise click.UsageError("--endpoint and --model go together: give both or neither.")
    if options["endpoint"] is not None and given("engine"):
        raise click.UsageError("give at most one of --engine and --endpoint.")
    if options["dataset"] is None and (stray := given("subset", "split", "column")):
        raise click.UsageError(f"{stray[0]} belongs to --dataset: give that too, or drop it.")
    if given("greedy_sampling_temperature") and (options["temperature"] or options["continuations"] == 1):
        raise click.UsageError("--greedy-sampling-temperature has no effect: drop it.")
    backend = _backend_name(options["endpoint"], options["engine"])
    if stray := given(*(name for name, owners in _OWNERS.items() if backend not in owners)):
        raise click.UsageError(f"{stray[0]} has no effect with {backend}: drop it.")


def _backend_name(endpoint: str | None, engine: str) -> str:
    return "endpoint" if endpoint is not None else engine


@dataclasses.dataclass(frozen=True)
class _Request:
    """What the command line asked for; fields are its options."""

    target: str
    prompts: Path | None
    dataset: str | None
    subset: str | None
    split: str
    column: str
    output: Path
    engine: str
    endpoint: str | None
    model: str | None
    api_key_env: str | None
    temperature: float
    max_new_tokens: int
    continuations: int
    greedy_sampling_temperature: float
    seed: int
    limit: int | None
    max_prompt_tokens: int | None
    held_out_share: float
    shard_size: int
    batch_size: int
    concurrency: int
    compiled: bool
    tensor_parallel_size: int
    engine_arguments: dict[str, Any]
    dtype: str
    device: str | None

    def read(self) -> Iterator[Prompt]:
        """The prompts, not yet tokenized."""
        from ppow_train.prompts import read_dataset, read_requests

        if self.prompts is not None:
            return iter(read_requests(self.prompts))
        assert self.dataset is not None
        return read_dataset(self.dataset, self.split, self.column, self.subset)

    @property
    def further_temperature(self) -> float:
        """Of continuations after the first: a greedy target has one of a prompt only."""
        return self.temperature or self.greedy_sampling_temperature

    def resolved_device(self) -> str:
        """Where --engine hf runs."""
        from ppow_train.machine import choose_device

        return choose_device(self.device)

    def api_key(self) -> str | None:
        """The endpoint's key, from the variable that was named."""
        from ppow_train.errors import UserError

        if self.api_key_env is None:
            return None
        if not os.environ.get(self.api_key_env):
            raise UserError(
                f"The variable {self.api_key_env} of --api-key-env is not set: export it with the key."
            )
        return os.environ[self.api_key_env]


def _run(request: _Request, prompts: Iterator[Prompt]) -> Manifest:
    from ppow_train.generation import Sampling, end_tokens, load_tokenizer
    from ppow_train.progress import make_progress
    from ppow_train.prompts import tokenize
    from ppow_train.trajectory_store import fill, is_whole, open_store
    from vllm_ppow.artifact import fingerprint_model
    from vllm_ppow.resolve import resolve_directory

    directory, _ = resolve_directory(request.target)
    fingerprint = fingerprint_model(directory)
    tokenizer = load_tokenizer(directory)
    tokenized = tokenize(prompts, tokenizer, limit=request.limit, max_prompt_tokens=request.max_prompt_tokens)
    sampling = Sampling(request.max_new_tokens, request.temperature, end_tokens(directory, tokenizer))
    longest = _check_fit(directory, tokenized, sampling)
    if request.endpoint is not None and not is_whole(request.output):
        # Before the set is begun with these prompts.
        _endpoint(request, directory, sampling).check_length(longest)
    again = _trained_on(tokenized, request.held_out_share)
    num_records = len(tokenized.ids) + len(again) * (request.continuations - 1)
    facts = _facts(request, fingerprint, tokenized, sampling)
    with open_store(request.output, facts, num_records) as store:
        _announce(request, tokenized, again, store.manifest)
        if store.manifest.complete:
            return store.manifest
        with make_progress() as progress, _backend(request, directory, sampling, longest) as backend:
            task = progress.add_task("target continues prompts", total=num_records, note="")
            others = backend.at_temperature(request.further_temperature)
            rounds = [(tokenized.ids, backend), *[(again, others)] * (request.continuations - 1)]
            return fill(store, rounds, lambda done: progress.update(task, completed=done))


def _check_fit(directory: Path, tokenized: TokenizedPrompts, sampling: Sampling) -> int:
    """Tokens of the longest trajectory, which must fit the target: asked for before hours of generation."""
    from ppow_train.generation import check_length
    from ppow_train.loading import read_config

    longest = max(map(len, tokenized.ids)) + sampling.max_new_tokens
    check_length(longest, read_config(directory))
    return longest


def _trained_on(tokenized: TokenizedPrompts, share: float) -> list[Sequence[int]]:
    """Prompts that are not set apart."""
    from ppow_train.errors import UserError
    from ppow_train.trajectory_store import is_held_out

    kept = [ids for ids in tokenized.ids if not is_held_out(ids, share)]
    if not kept:
        raise UserError(
            f"--held-out-share {share:g} sets all {len(tokenized.ids)} prompts apart: lower it, or give more prompts."
        )
    return kept


def _facts(
    request: _Request, fingerprint: str, tokenized: TokenizedPrompts, sampling: Sampling
) -> dict[str, Any]:
    """Everything the trajectories depend on. Not where a server is: it may come back on another port."""
    facts: dict[str, Any] = {
        "target_fingerprint": fingerprint,
        "prompts_sha256": tokenized.digest(),
        "backend": _backend_name(request.endpoint, request.engine),
        **{
            name: getattr(request, name)
            for name in ("temperature", "max_new_tokens", "seed", "shard_size", "held_out_share")
        },
        "end_token_ids": list(sampling.end_token_ids),
    }
    if request.continuations > 1:  # sets from before there was a choice go on
        facts["continuations"] = request.continuations
        facts["further_temperature"] = request.further_temperature
    if request.endpoint:
        return facts | {"model": request.model}
    if request.engine == "hf":
        return facts | {
            "dtype": request.dtype,
            "batch_size": request.batch_size,
            "device": request.resolved_device(),
        }
    arguments = {name: value for name, value in request.engine_arguments.items() if name not in _OF_MEMORY}
    return facts | {"dtype": request.dtype, **({"engine_arguments": arguments} if arguments else {})}


@contextlib.contextmanager
def _backend(request: _Request, directory: Path, sampling: Sampling, longest: int) -> Iterator[Backend]:
    from ppow_train.generation import open_hugging_face, open_vllm
    from ppow_train.serving_eval import EngineOptions

    if request.endpoint is not None:
        yield _endpoint(request, directory, sampling)
    elif request.engine == "vllm":
        options = EngineOptions(
            str(directory),
            longest,
            request.concurrency,
            enforce_eager=not request.compiled,
            dtype=request.dtype,
            tensor_parallel_size=request.tensor_parallel_size,
            more=request.engine_arguments,
        )
        with open_vllm(options, sampling) as engine:
            yield engine
    else:
        with open_hugging_face(
            directory,
            sampling,
            device=request.resolved_device(),
            dtype=request.dtype,
            batch_size=request.batch_size,
        ) as loaded:
            yield loaded


def _endpoint(request: _Request, directory: Path, sampling: Sampling) -> EndpointBackend:
    from ppow_train.endpoint import EndpointBackend
    from ppow_train.loading import read_config

    assert request.endpoint is not None
    assert request.model is not None
    return EndpointBackend(
        request.endpoint,
        request.model,
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        end_token_ids=sampling.end_token_ids,
        vocab_size=read_config(directory).get_text_config().vocab_size,
        api_key=request.api_key(),
        concurrency=request.concurrency,
    )


def _announce(
    request: _Request, tokenized: TokenizedPrompts, again: Sequence[Sequence[int]], manifest: Manifest
) -> None:
    """What is about to be done, and how large it may become; `again`: prompts with further continuations."""
    from rich.filesize import decimal

    from ppow_train.trajectory_store import estimated_bytes

    records = [*tokenized.ids, *list(again) * (request.continuations - 1)]
    size = decimal(estimated_bytes(records, request.max_new_tokens))
    if tokenized.answered:
        click.echo(
            f"{tokenized.answered} chats ended with the assistant's answer: it is left out, the target answers itself.",
            err=True,
        )
    times = f", the others continued {request.continuations} times" if request.continuations > 1 else ""
    click.echo(
        f"{len(tokenized.ids)} prompts ({tokenized.duplicates} duplicates and {tokenized.too_long} too long left out), "
        f"{len(tokenized.ids) - len(again)} of them held out{times}; at most {size} in {request.output}; "
        f"{manifest.done} are there already.",
        err=True,
    )


def _report(request: _Request, manifest: Manifest, as_json: bool) -> None:
    from rich.filesize import decimal

    def total(name: str) -> int:
        return sum(getattr(shard, name) for shard in manifest.shards)

    held_out = total("held_out")
    result: dict[str, Any] = {
        "data": str(request.output),
        "train": manifest.done - held_out,
        "held_out": held_out,
        "shards": len(manifest.shards),
        **{name: total(name) for name in ("prompt_tokens", "completion_tokens", "bytes")},
        "facts": manifest.facts,
    }
    if as_json:
        click.echo(json.dumps(result))
        return
    click.echo(
        f"{result['train']} trajectories to train on, {held_out} held out: {result['completion_tokens']} tokens "
        f"of the target in {result['shards']} shards, {decimal(result['bytes'])}."
    )
    click.echo(
        f"Train on them: ppow train --target {request.target} --drafter DRAFTER --data {request.output} "
        f"--serving-temperature {request.temperature:g} --output ADAPTER"
    )
