"""The target continues the prompts: how trajectories come to be.

With Hugging Face generate, batched. Left out: storage (data.py), chat templates.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ppow_train.data import load_trajectories, save_trajectories, trajectory_key
from ppow_train.errors import UserError
from ppow_train.types import Trajectories

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_tokenizer(target: Path) -> PreTrainedTokenizerBase:
    """The target's tokenizer, padding on the left as generation needs it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
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
    torch.manual_seed(seed)
    ends = _end_tokens(model, tokenizer)
    prompt_ids: list[list[int]] = []
    completion_ids: list[list[int]] = []
    for begin in range(0, len(prompts), batch_size):
        batch = tokenizer(list(prompts[begin : begin + batch_size]), return_tensors="pt", padding=True).to(
            model.device
        )
        _check_length(batch["input_ids"].shape[1] + max_new_tokens, model)
        with _plain_sampling(model, temperature, ends, tokenizer.pad_token_id):
            output = model.generate(**batch, max_new_tokens=max_new_tokens)
        width = batch["input_ids"].shape[1]
        for ids, mask, row in zip(batch["input_ids"], batch["attention_mask"], output, strict=True):
            prompt_ids.append(ids[mask.bool()].tolist())
            completion_ids.append(_cut_at_end(row[width:].tolist(), ends))
        report(len(prompt_ids))
    return prompt_ids, completion_ids


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """End-of-text by the tokenizer and by the target: chat models name several."""
    own = model.generation_config.eos_token_id
    named = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
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


def _check_length(length: int, model: PreTrainedModel) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise UserError(
            f"Prompt and continuation need {length} tokens, the target takes {limit}: shorten the prompts or lower "
            "--max-new-tokens."
        )


def load_or_generate(
    cache: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    target_fingerprint: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    report: Callable[[int], None] = lambda done: None,
) -> Trajectories:
    """Trajectories of the prompts, from `cache` if the same ones were generated before.

    Args:
        cache: directory of trajectory sets, one sub-directory per key.
    """
    directory = cache / trajectory_key(prompts, target_fingerprint, max_new_tokens, temperature, seed)
    if not directory.is_dir():
        prompt_ids, completion_ids = generate(
            model,
            tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            report=report,
        )
        facts = {
            "target_fingerprint": target_fingerprint,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "seed": seed,
            "prompts": len(prompts),
        }
        save_trajectories(directory, prompt_ids, completion_ids, facts)
    return load_trajectories(directory)
