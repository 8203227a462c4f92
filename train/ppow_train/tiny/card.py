"""The card beside the tiny pair: how it was made, from what, and how far it was trained. Left out: making it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from pathlib import Path

from ppow_train.tiny import text
from ppow_train.tiny.recipe import TinyRecipe


def write_card(directory: Path, recipe: TinyRecipe, sources: Sequence[text.SourceFile]) -> None:
    """Write README.md next to the parts."""
    (directory / "README.md").write_text(_card(directory, recipe, sources), encoding="utf-8")


def _card(directory: Path, recipe: TinyRecipe, sources: Sequence[text.SourceFile]) -> str:
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "speculators")
    )
    files = {domain: [s for s in sources if s.domain == domain] for domain in (text.KNOWN, text.NEW)}
    sizes = "\n".join(
        f"- `{domain}`: {len(chosen)} files, {sum(len(s.text) for s in chosen):,} characters, "
        f"{sum(s.split == 'held_out' for s in chosen)} of the files held out"
        for domain, chosen in files.items()
    )
    curves = "\n".join(_curve(directory, name) for name in ("target", "eagle3", "causal_lm"))
    options = ", ".join(f"{name} = {value}" for name, value in dataclasses.asdict(recipe).items())
    return f"""# The tiny pair

A small real target with two drafters, made by `ppow tiny build` ({options}).

Text: the source of the standard library of Python {platform.python_version()} (PSF licence), a seeded sample:

{sizes}

The target (Qwen3 architecture, 8 layers, hidden size 192, byte-level BPE of {recipe.vocab_size} tokens) learned both.
The drafters (an EAGLE-3 head in speculators format, and a 2-layer Qwen3 with hidden size 128) learned the target's
distribution on `{text.KNOWN}` only: `{text.NEW}`, the files of test suites, is new to them. `prompts/` holds prompts of
96 tokens, split by file: what is held out is never trained on by an adapter.

| part | trained on | loss over the last tenths of the run (nats per token) |
|---|---|---|
{curves}

Made with {versions}. These models serve to test and to demonstrate; they are of no other use.
"""


def _curve(directory: Path, name: str) -> str:
    log = json.loads((directory / name / "training_log.json").read_text(encoding="utf-8"))
    losses = [loss for _, loss in log["loss"]]
    tenth = max(1, len(losses) // 10)
    tail = [sum(losses[i : i + tenth]) / tenth for i in range(len(losses) - 4 * tenth, len(losses), tenth)]
    trained_on = log.get("domain", f"{text.KNOWN} and {text.NEW}")
    return f"| {name} | {trained_on}, {log['num_tokens']:,} tokens | {', '.join(f'{loss:.3f}' for loss in tail)} |"
