"""The target continues the prompts: how trajectories come to be.

Behind one Protocol: Hugging Face generate, batched, or a vLLM engine in a process of its own; a server (endpoint.py)
fits it too. Left out: storage (data.py, trajectory_store.py), chat templates (chat.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from ppow_train.causal import try_out
from ppow_train.data import load_trajectories, save_trajectories, trajectory_key
from ppow_train.errors import UserError
from ppow_train.loading import load_causal_lm, read_config, read_tokenizer
from ppow_train.locks import locked
from ppow_train.prompts import Text, text_ids
from ppow_train.target_config import config_digest
from ppow_train.trajectory_store import derive_seed
from ppow_train.types import Trajectories

if TYPE_CHECKING:
    from transformers import (
        GenerationConfig,
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

    from ppow_train.serving_eval import Engine, EngineOptions


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What is asked of every backend: the bare distribution, no top-k, no top-p, no penalties.

    Attributes:
        max_new_tokens: tokens per continuation at most.
        temperature: 0 is greedy.
        end_token_ids: a continuation ends with the first of these, which is kept.
    """

    max_new_tokens: int
    temperature: float
    end_token_ids: tuple[int, ...]


class Backend(Protocol):
    """What continues prompts with the target."""

    def continue_prompts(
        self, prompt_ids: Sequence[Sequence[int]], *, seed: int, report: Callable[[int], None]
    ) -> list[list[int]]:
        """Continue each prompt once.

        Args:
            prompt_ids: token ids, one sequence per prompt.
            seed: the same prompts and seed are asked to give the same continuations.
            report: called with the number of finished prompts.

        Returns:
            Continuation ids, one list per prompt, in order.
        """
        ...

    def at_temperature(self, temperature: float) -> Backend:
        """The same target at another temperature."""
        ...


def load_tokenizer(target: Path) -> PreTrainedTokenizerBase:
    """The target's tokenizer, padding on the left as generation needs it."""
    tokenizer = read_tokenizer(target)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or _any_padding(target, tokenizer)
    return tokenizer


def _any_padding(target: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """A token to pad with where the tokenizer names none: the target's, or its first; padding is never attended to."""
    shipped = _shipped(target)
    named = (shipped.pad_token_id, *_named_ends(shipped.eos_token_id, tokenizer), 0)
    known = (token for token in named if type(token) is int and 0 <= token < len(tokenizer))
    return tokenizer.convert_ids_to_tokens(next(known))


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int = 64,
    report: Callable[[int], None] = lambda done: None,
) -> tuple[list[list[int]], list[list[int]]]:
    """Continue prompts with the target.

    Args:
        model: the target, on its device.
        max_new_tokens: tokens per continuation at most; it ends earlier at end-of-text.
        temperature: 0 is greedy; otherwise the full distribution is sampled, no top-k, no top-p.
        report: called with the number of finished prompts.

    Returns:
        Prompt ids and continuation ids, one list per prompt.
    """
    prompt_ids = text_ids(prompts, tokenizer)
    sampling = Sampling(max_new_tokens, temperature, tuple(_end_tokens(model, tokenizer)))
    backend = HuggingFaceBackend(model, tokenizer, sampling, batch_size)
    return prompt_ids, backend.continue_prompts(prompt_ids, seed=seed, report=report)


@dataclasses.dataclass(frozen=True)
class HuggingFaceBackend:
    """Hugging Face generate on a loaded target, `batch_size` prompts at a time in the order given."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    batch_size: int = 64

    @torch.no_grad()
    def continue_prompts(
        self, prompt_ids: Sequence[Sequence[int]], *, seed: int, report: Callable[[int], None]
    ) -> list[list[int]]:
        """See `Backend`. Reproducible on one machine: batches of other sizes round differently.

        Raises:
            UserError: a prompt and its continuation do not fit the target.
        """
        longest = max(map(len, prompt_ids), default=0)
        # Here, not hours later in its batch.
        check_length(longest + self.sampling.max_new_tokens, self.model.config)
        torch.manual_seed(seed)
        ends, pad = self.sampling.end_token_ids, self.tokenizer.pad_token_id
        completion_ids: list[list[int]] = []
        for begin in range(0, len(prompt_ids), self.batch_size):
            rows = [{"input_ids": list(ids)} for ids in prompt_ids[begin : begin + self.batch_size]]
            batch = self.tokenizer.pad(rows, return_tensors="pt").to(self.model.device)
            width = batch["input_ids"].shape[1]
            with _plain_sampling(self.model, self.sampling.temperature, list(ends), pad):
                output = self.model.generate(**batch, max_new_tokens=self.sampling.max_new_tokens)
            completion_ids += [_cut_at_end(row[width:].tolist(), ends) for row in output]
            report(len(completion_ids))
        return completion_ids

    def at_temperature(self, temperature: float) -> HuggingFaceBackend:
        """See `Backend`."""
        return dataclasses.replace(self, sampling=dataclasses.replace(self.sampling, temperature=temperature))


@dataclasses.dataclass(frozen=True)
class VllmBackend:
    """A started vLLM engine without speculation; every request has a seed of its own."""

    engine: Engine
    sampling: Sampling

    def continue_prompts(
        self, prompt_ids: Sequence[Sequence[int]], *, seed: int, report: Callable[[int], None]
    ) -> list[list[int]]:
        """See `Backend`. Whether equal seeds give equal tokens is up to the engine: batches may round differently.

        Raises:
            UserError: the engine stopped.
        """
        run = self.engine.run(
            prompt_ids,
            max_tokens=self.sampling.max_new_tokens,
            temperature=self.sampling.temperature,
            seeds=[derive_seed(seed, i) for i in range(len(prompt_ids))],
            stop_token_ids=self.sampling.end_token_ids,
        )
        report(len(prompt_ids))
        return [_cut_at_end(tokens, self.sampling.end_token_ids) for tokens in run.tokens]

    def at_temperature(self, temperature: float) -> VllmBackend:
        """See `Backend`."""
        return dataclasses.replace(self, sampling=dataclasses.replace(self.sampling, temperature=temperature))


@contextlib.contextmanager
def open_hugging_face(
    target: Path, sampling: Sampling, *, device: str, dtype: str, batch_size: int
) -> Iterator[HuggingFaceBackend]:
    """Load the target for `HuggingFaceBackend`; `dtype` as in transformers, "auto" is the checkpoint's own.

    Raises:
        UserError, ArtifactError: it is broken, or none that transformers loads.
    """
    model = load_causal_lm(target, dtype, device).eval()
    try_out(model)
    yield HuggingFaceBackend(model, load_tokenizer(target), sampling, batch_size)


@contextlib.contextmanager
def open_vllm(options: EngineOptions, sampling: Sampling) -> Iterator[VllmBackend]:
    """Start an engine for `VllmBackend`, and stop it at the end.

    Raises:
        UserError: it did not start.
    """
    from ppow_train.serving_eval import Engine

    with Engine("data", options, None) as engine:
        engine.wait_until_ready()
        yield VllmBackend(engine, sampling)


def end_tokens(target: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """End-of-text of a target that is not loaded (see `Sampling`), in ascending order."""
    return tuple(_named_ends(_shipped(target).eos_token_id, tokenizer))


def _shipped(target: Path) -> GenerationConfig:
    """What a target that is not loaded says of its generation."""
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(target)
    except OSError:  # the file is optional; a loaded model falls back to its config too
        return GenerationConfig.from_model_config(read_config(target))


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """End-of-text by the tokenizer and by the target: chat models name several."""
    return _named_ends(model.generation_config.eos_token_id, tokenizer)


def _named_ends(own: int | list[int] | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    named = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    if not all(token is None or type(token) is int for token in named):
        raise UserError(
            f"The target names {own!r} as its end tokens, which must be token ids: mend eos_token_id in its "
            "generation_config.json or config.json."
        )
    return sorted(token for token in named if token is not None)


@contextlib.contextmanager
def _plain_sampling(
    model: PreTrainedModel, temperature: float, ends: list[int], pad_token_id: int
) -> Iterator[None]:
    """The bare distribution: what a target ships (top-k, repetition penalty, …) fills every option not given."""
    from transformers import GenerationConfig

    sampling = (
        {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    )
    shipped = model.generation_config
    model.generation_config = GenerationConfig(
        eos_token_id=ends or None, pad_token_id=pad_token_id, **sampling
    )
    try:
        yield
    finally:
        model.generation_config = shipped


def _cut_at_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    first = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return ids[: first + 1]


def check_length(length: int, config: PreTrainedConfig) -> None:
    """Refuse prompts and continuations of more tokens than the target has positions for.

    Raises:
        UserError: `length` is beyond it.
    """
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise UserError(
            f"Prompt and continuation need {length} tokens, the target takes {limit}: shorten the prompts or lower "
            "--max-new-tokens."
        )


@dataclasses.dataclass(frozen=True)
class Round:
    """One continuation of every prompt: its seed and temperature."""

    seed: int
    temperature: float


def continuation_rounds(
    seed: int, temperature: float, continuations: int, resampling: float
) -> tuple[Round, ...]:
    """Rounds that together continue every prompt `continuations` times.

    The first is what a single one always was. A greedy target continues a prompt in one way only, so the others are
    sampled there too.

    Args:
        temperature: that is served; of all rounds where it is above 0.
        resampling: temperature of the rounds after a greedy one, above 0.
    """
    others = temperature or resampling
    return (
        Round(seed, temperature),
        *(Round(derive_seed(seed, index), others) for index in range(1, continuations)),
    )


def load_or_generate(
    cache: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    *,
    target_fingerprint: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    report: Callable[[int], None] = lambda done: None,
) -> Trajectories:
    """Trajectories of the prompts, from `cache` if the same ones were generated before.

    Of several processes that want the same ones, one generates and the others wait for it.

    Args:
        cache: directory of trajectory sets, one sub-directory per key.
        target_fingerprint: of the target's weights.
    """
    prompt_ids = text_ids(prompts, tokenizer)
    facts = {
        "target_fingerprint": target_fingerprint,
        "target_config": config_digest(model.config),
        "end_token_ids": _end_tokens(model, tokenizer),
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    directory = cache / trajectory_key(prompt_ids, facts)
    if not directory.is_dir():
        with locked(directory):
            if not directory.is_dir():
                _, completion_ids = generate(
                    model,
                    tokenizer,
                    prompt_ids,
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                    seed=seed,
                    report=report,
                )
                save_trajectories(
                    directory, prompt_ids, completion_ids, {**facts, "prompts": len(prompt_ids)}
                )
    return load_trajectories(directory)
