"""Build the tiny pair stage by stage: tokenizer, target, drafters, prompts, card. Finished stages are kept.

Every stage writes under a temporary name and renames, so an interrupted build goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from ppow_train.tiny import text

PROMPT_TOKENS = 96


@dataclasses.dataclass(frozen=True)
class TinyRecipe:
    """Everything that decides what is built.

    Attributes:
        seed: of text sampling, initialisation and batches.
        vocab_size: byte-level BPE entries.
        max_bytes_per_domain: text kept of each domain.
        target_steps, eagle_steps, causal_lm_steps: updates of 8 × 256 tokens (drafters: in each cycle).
        drafter_cycles: cosine cycles of the drafters, each from the one before it as it is on disk.
        target_lr, drafter_lr: peak learning rates.
        train_prompts, held_out_prompts: prompts per domain.
    """

    seed: int = 0
    vocab_size: int = 2048
    max_bytes_per_domain: int = 1_500_000
    target_steps: int = 2600
    eagle_steps: int = 900
    causal_lm_steps: int = 1200
    drafter_cycles: int = 2
    target_lr: float = 5e-3
    drafter_lr: float = 3e-3
    train_prompts: int = 384
    held_out_prompts: int = 64


Say = Callable[[str], None]


def build(directory: Path, recipe: TinyRecipe, say: Say = print) -> None:
    """Build every missing part of the tiny pair in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    sources = text.read_sources(recipe.max_bytes_per_domain)
    _stage(directory / "target", say, lambda out: _build_target(out, sources, recipe, say))
    from ppow_train.tiny import drafters

    known = [source for source in sources if source.domain == text.KNOWN]
    for name, make in (("eagle3", drafters.build_eagle3), ("causal_lm", drafters.build_causal_lm)):
        _stage(
            directory / name, say, lambda out, make=make: make(out, directory / "target", known, recipe, say)
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


def token_stream(sources, tokenizer):
    """All texts as one stream of token ids, each closed by the end-of-text token: int64 [N]."""
    import torch

    ids: list[int] = []
    for source in sources:
        ids.extend(tokenizer(source.text)["input_ids"])
        ids.append(tokenizer.eos_token_id)
    return torch.tensor(ids)


def _build_target(out: Path, sources, recipe: TinyRecipe, say: Say) -> None:
    import torch
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


def write_log(out: Path, log: list[tuple[int, float]], **facts) -> None:
    """Keep the loss curve beside the weights: the plateau can be checked, not only claimed."""
    (out / "training_log.json").write_text(json.dumps({**facts, "loss": log}) + "\n", encoding="utf-8")


def _build_prompts(out: Path, target: Path, sources, recipe: TinyRecipe) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target)
    for domain in (text.KNOWN, text.NEW):
        for split, count in (("train", recipe.train_prompts), ("held_out", recipe.held_out_prompts)):
            rows = text.make_prompts(sources, domain, split, count, tokenizer, PROMPT_TOKENS, recipe.seed)
            text.write_jsonl(out / f"{domain}_{split}.jsonl", rows)
