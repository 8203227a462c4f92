"""Build the tiny pair stage by stage: tokenizer, target, drafters, prompts, card. Finished stages are kept.

Every stage writes under a temporary name and renames, so an interrupted build goes on where it stopped.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ppow_train.tiny import text
from ppow_train.tiny.recipe import Say, TinyRecipe

PROMPT_TOKENS = 96


def build(directory: Path, recipe: TinyRecipe, say: Say = print) -> None:
    """Build every missing part of the tiny pair in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    sources = text.read_sources(recipe.max_bytes_per_domain)
    _stage(directory / "target", say, lambda out: _build_target(out, sources, recipe, say))
    from ppow_train.tiny import drafters

    known = [source for source in sources if source.domain == text.KNOWN]
    target = directory / "target"
    _stage(directory / "eagle3", say, lambda out: drafters.build_eagle3(out, target, known, recipe, say))
    _stage(
        directory / "causal_lm", say, lambda out: drafters.build_causal_lm(out, target, known, recipe, say)
    )
    _stage(directory / "prompts", say, lambda out: _build_prompts(out, directory / "target", sources, recipe))
    from ppow_train.tiny.card import write_card

    write_card(directory, recipe, sources)


def _stage(final: Path, say: Say, make: Callable[[Path], None]) -> None:
    if final.exists():
        say(f"{final.name}: already there, kept")
        return
    started = time.monotonic()
    temporary = final.with_name(f".{final.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    make(temporary)
    temporary.rename(final)
    say(f"{final.name}: built in {time.monotonic() - started:.0f} s")


def token_stream(sources: Sequence[text.SourceFile], tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """All texts as one stream of token ids, each closed by the end-of-text token: int64 [N]."""
    ids: list[int] = []
    for source in sources:
        ids.extend(tokenizer(source.text)["input_ids"])
        ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids)


def _build_target(out: Path, sources: Sequence[text.SourceFile], recipe: TinyRecipe, say: Say) -> None:
    from transformers import AutoTokenizer, Qwen3ForCausalLM

    from ppow_train.tiny.target import target_config, train_language_model

    text.train_tokenizer((source.text for source in sources), recipe.vocab_size, out)
    tokens = token_stream(sources, AutoTokenizer.from_pretrained(out))
    torch.manual_seed(recipe.seed)
    model = Qwen3ForCausalLM(target_config(recipe.vocab_size))
    log: list[tuple[int, float]] = []

    def report(step: int, loss: float) -> None:
        log.append((step, round(loss, 4)))
        say(f"target: step {step} of {recipe.target_steps}, cross-entropy {loss:.3f} nats per token")

    train_language_model(
        model,
        tokens,
        steps=recipe.target_steps,
        learning_rate=recipe.target_lr,
        seed=recipe.seed,
        report=report,
    )
    model.to(torch.bfloat16).save_pretrained(out)
    write_log(out, log, num_tokens=len(tokens))


def write_log(out: Path, log: list[tuple[int, float]], **facts: Any) -> None:
    """Keep the loss curve beside the weights: the plateau can be checked, not only claimed."""
    (out / "training_log.json").write_text(json.dumps({**facts, "loss": log}) + "\n", encoding="utf-8")


def _build_prompts(out: Path, target: Path, sources: Sequence[text.SourceFile], recipe: TinyRecipe) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target)

    def prompts(domain: str, split: str, count: int) -> Iterator[dict[str, str]]:
        return text.make_prompts(sources, domain, split, count, tokenizer, PROMPT_TOKENS, recipe.seed)

    for domain in (text.KNOWN, text.NEW):
        held_out = list(prompts(domain, "held_out", recipe.held_out_prompts))
        report = text.unlike(prompts(domain, "held_out", sys.maxsize), held_out)
        text.write_jsonl(out / f"{domain}_train.jsonl", prompts(domain, "train", recipe.train_prompts))
        text.write_jsonl(out / f"{domain}_held_out.jsonl", held_out)
        text.write_jsonl(out / f"{domain}_report.jsonl", itertools.islice(report, recipe.report_prompts))
