"""What `ppow train` runs once its arguments are read: models loaded, trajectories, training or an estimate, parity.

Left out: arguments, what is told of the result, upload (train.py).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.progress import Progress

    from ppow_train.config import PPOWConfig
    from ppow_train.estimate import RunEstimate
    from ppow_train.generation import Round
    from ppow_train.pair import Pair
    from ppow_train.parity import Parity
    from ppow_train.prompts import Text
    from ppow_train.training import TrainingResult
    from ppow_train.types import Trajectories


# Of a run over its tokens: 4 were the best in examples/benchmarks/objectives.md, 9 and 18 were worse.
MOST_PASSES = 5
MOST_ADVISED = 64  # continuations of a prompt; eight were enough in examples/benchmarks/objectives.md


@dataclasses.dataclass(frozen=True)
class Request:
    """What the command line asked for.

    `values` are the training options that were given, and the seed; `engine_arguments` are vLLM's, for parity.
    """

    target: str
    drafter: str
    prompts: Path | None
    data: Path | None
    held_out: Path | None
    output: Path
    values: dict[str, Any]
    max_new_tokens: int
    cache: Path
    checkpoints: Path
    resume: bool
    device: str | None
    parity: bool
    engine_arguments: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        result: the adapter and its figures.
        parity: with vLLM, where it was checked.
        parity_failure: why it could not be checked though it was to be.
    """

    result: TrainingResult
    parity: Parity | None = None
    parity_failure: str | None = None


def run(request: Request) -> Outcome | None:
    """Train and check; None in all but the main one of several processes."""
    import torch

    from ppow_train.checkpoints import check_unfinished
    from ppow_train.distributed import leave_group
    from ppow_train.errors import UserError
    from ppow_train.pair import load_pair
    from ppow_train.progress import make_progress
    from ppow_train.selection import require_held_out
    from ppow_train.training import check_trainable, train_adapter
    from vllm_ppow.artifact import check_output

    config = _config(request, request.checkpoints)
    require_held_out(config, request.data is not None or request.held_out is not None)
    is_main = config.process_index == 0
    with make_progress(is_shown=is_main) as progress:
        pair = load_pair(request.target, request.drafter, str(config.device), config.target_dtype)
        check_trainable(pair, config)  # before hours of generation, as the next two are
        check_output(request.output)
        check_unfinished(request.checkpoints, request.resume, keeps=config.save_strategy != "no")
        # One process generates, the others find what it put into the cache.
        with config.main_process_first(local=False):
            trajectories, held_out = _splits(request, pair, config, progress)
        if is_main:
            _tell_passes(config, trajectories)
            _tell_longer(pair, trajectories, held_out)
        source = request.data or request.prompts
        result = train_adapter(
            pair,
            trajectories,
            config,
            request.output,
            held_out=held_out,
            facts={"prompts": source.name if source else None},
            resume=request.resume,
            cache=request.cache,
            progress=progress,
        )
    leave_group()
    if not is_main:
        return None
    if result.report is None or not request.parity:
        return Outcome(result)
    try:
        return Outcome(result, check_parity(request, pair, result.report, result))
    except (UserError, torch.cuda.OutOfMemoryError) as error:  # the adapter is there, and worth its figures
        return Outcome(result, parity_failure=" ".join(str(error).split()).rstrip("."))


def estimate(request: Request) -> RunEstimate | None:
    """What the run would take; of several processes only the main one tells."""
    from ppow_train.estimate import estimate_run
    from ppow_train.pair import load_pair
    from ppow_train.progress import make_progress
    from ppow_train.training import check_trainable

    with tempfile.TemporaryDirectory() as scratch:
        config = _config(request, Path(scratch))
        is_main = config.process_index == 0
        with make_progress(is_shown=is_main) as progress:
            pair = load_pair(request.target, request.drafter, str(config.device), config.target_dtype)
            check_trainable(pair, config)
            with config.main_process_first(local=False):
                trajectories, held_out = _splits(request, pair, config, progress)
            if is_main:
                _tell_passes(config, trajectories)
                _tell_longer(pair, trajectories, held_out)
            estimated = estimate_run(
                pair, trajectories, config, Path(scratch), held_out, cache=request.cache, progress=progress
            )
    return estimated if is_main else None


def _tell_passes(config: PPOWConfig, trajectories: Trajectories) -> None:
    """How often the run reads each token, and what to change where that is too often or too seldom."""
    passes = config.passes(trajectories.num_continuation_tokens, config.max_steps)
    text = f"{len(trajectories)} trajectories; each token is trained on {passes:.2g} times"
    if passes > MOST_PASSES:
        enough = math.ceil(config.continuations * passes / MOST_PASSES)
        more = f"--continuations {enough}, " if enough <= MOST_ADVISED else ""
        text += (
            f". Warning: beyond about {MOST_PASSES} times texts are learned by heart: give more prompts, {more}or a "
            "lower --max-steps"
        )
    elif passes < 1:
        text += f"; --max-steps {math.ceil(config.max_steps / passes)} would read them all"
    click.echo(f"{text}.", err=True)


def _tell_longer(pair: Pair, trajectories: Trajectories, held_out: Trajectories | None) -> None:
    """What will not be drafted when it is served: the drafter was made for shorter texts."""
    from ppow_train.context_length import tell_longer
    from vllm_ppow.resolve import resolve_directory

    drafter, _ = resolve_directory(pair.drafter_ref.name_or_path, pair.drafter_ref.revision)
    if warning := tell_longer(drafter, [trajectories, *([] if held_out is None else [held_out])]):
        click.echo(warning, err=True)


def _config(request: Request, state: Path) -> PPOWConfig:
    from ppow_train.config import PPOWConfig
    from ppow_train.machine import choose_device

    use_cpu = choose_device(request.device) == "cpu"
    return PPOWConfig(output_dir=str(state), use_cpu=use_cpu, **request.values)


def check_parity(
    request: Request, pair: Pair, held_out: Trajectories, result: TrainingResult
) -> Parity | None:
    """The parity gate, where vLLM is installed; where it is not, say that nothing was checked."""
    if importlib.util.find_spec("vllm") is None:
        click.echo(
            "Not checked against vLLM, which is not installed here: run `ppow bench` where it is.", err=True
        )
        return None
    from ppow_train import parity
    from vllm_ppow.resolve import resolve_directory

    return parity.check_parity(
        pair,
        result.adapter,
        resolve_directory(pair.drafter_ref.name_or_path, pair.drafter_ref.revision)[0],
        held_out,
        engine_arguments=request.engine_arguments,
        say=lambda text: click.echo(text, err=True),
    )


def _splits(
    request: Request, pair: Pair, config: PPOWConfig, progress: Progress
) -> tuple[Trajectories, Trajectories | None]:
    """What is trained and what is measured on, from disk or generated now."""
    from ppow_train.generation import Round
    from ppow_train.training import get_trajectories
    from ppow_train.trajectory_store import load_splits, read_manifest

    if request.data is not None:
        config.continuations = read_manifest(request.data).facts.get("continuations", 1)  # for the record
        temperatures = config.serving_temperature, config.training_temperature
        return load_splits(request.data, pair.target_ref.fingerprint, *temperatures)

    def generated(
        file: Path, texts: list[Text], rounds: Sequence[Round], max_new_tokens: int
    ) -> Trajectories:
        return get_trajectories(
            pair,
            file,
            cache=request.cache,
            max_new_tokens=max_new_tokens,
            rounds=rounds,
            progress=progress,
            texts=texts,
        )

    assert request.prompts is not None
    # K tokens longer: the last draft of a simulated serving walk must fit.
    longer = request.max_new_tokens + config.num_speculative_tokens
    texts, held_out = _texts(request, pair, config, longer)
    trajectories = generated(request.prompts, texts, config.continuation_rounds(), request.max_new_tokens)
    if request.held_out is None:
        return trajectories, None
    once = (Round(config.seed + 1, config.serving_temperature),)
    return trajectories, generated(request.held_out, held_out, once, longer)


def _texts(
    request: Request, pair: Pair, config: PPOWConfig, held_out_tokens: int
) -> tuple[list[Text], list[Text]]:
    """Texts to train on and texts that are held out, none in both; all of them fit the target.

    Args:
        held_out_tokens: of the continuation of a held-out one at most.

    Raises:
        UserError: nothing is left to train on, or a text and its continuation do not fit.
    """
    from ppow_train.errors import UserError
    from ppow_train.generation import load_tokenizer
    from ppow_train.prompts import prompt_hash, read_prompts, text_ids
    from ppow_train.training import check_lengths, check_read

    assert request.prompts is not None
    if request.max_new_tokens <= config.num_speculative_tokens:
        raise UserError(
            f"Continuations of {request.max_new_tokens} tokens have no room for a window of "
            f"{config.num_speculative_tokens}: raise --max-new-tokens, or lower --num-speculative-tokens."
        )
    tokenizer = load_tokenizer(pair.target.directory)
    texts, held_out = (
        read_prompts(request.prompts, tokenizer),
        read_prompts(request.held_out, tokenizer) if request.held_out else [],
    )
    ids, held_out_ids = text_ids(texts, tokenizer), text_ids(held_out, tokenizer)
    apart = {prompt_hash(one) for one in held_out_ids}
    kept = [number for number, one in enumerate(ids) if prompt_hash(one) not in apart]
    if not kept:
        raise UserError(
            f"All {len(texts)} prompts of {request.prompts} are held out by {request.held_out}: give others to train "
            "on, or other --held-out."
        )
    if config.process_index == 0 and len(kept) < len(texts):
        click.echo(
            f"{len(texts) - len(kept)} of {len(texts)} prompts are held out too: they are not trained on.",
            err=True,
        )
    # Both files, before the first is continued; held-out texts are read whole, never drafted behind.
    check_lengths(pair, config, max(len(ids[number]) for number in kept) + request.max_new_tokens)
    if held_out_ids:
        check_read(pair, max(map(len, held_out_ids)) + held_out_tokens)
    return [texts[number] for number in kept], held_out
