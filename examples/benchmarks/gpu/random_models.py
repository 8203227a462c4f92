"""A target, an EAGLE-3 head and a causal LM of given shapes with random weights on disk, for training to be timed.

What an update costs depends on shapes only. Tokenizer and prompts are the tiny pair's. Left out: any use of what such
models say; a pair that vLLM alone loads, which needs no weights of the target (random_pair.py).
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import random_pair
import torch
from random_pair import Shape

TOKENIZER = Path(__file__).parents[2] / "tiny" / "target"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
# Shapes of Qwen3-1.7B, with an EAGLE-3 head for it, and of Qwen3-0.6B: (target, causal LM).
REAL = (
    Shape(2048, 6144, 28, 16, 8, 128, 151936, 32000, 40960),
    Shape(1024, 3072, 28, 16, 8, 128, 151936, 32000, 40960),
)
_TINY = dataclasses.replace(random_pair.TINY, vocab_size=2048)  # the tokenizer's
TINY = (_TINY, dataclasses.replace(_TINY, num_hidden_layers=2))


@dataclasses.dataclass(frozen=True)
class RandomModels:
    """Directories of the three."""

    target: Path
    head: Path
    causal_lm: Path


def build(root: Path, target: Shape, causal_lm: Shape) -> RandomModels:
    """Write the models below `root`, in bfloat16; what is there already is kept."""
    models = RandomModels(root / "target", root / "eagle3", root / "causal_lm")
    _keep_or_write(models.target, lambda place: _write_language_model(place, target))
    _keep_or_write(models.causal_lm, lambda place: _write_language_model(place, causal_lm))
    _keep_or_write(models.head, lambda place: random_pair.write_head(place, target))
    return models


def _keep_or_write(directory: Path, write: Callable[[Path], None]) -> None:
    """Write under a temporary name first: what exists is complete."""
    if not directory.exists():
        place = directory.with_name(f"{directory.name}.tmp")
        shutil.rmtree(place, ignore_errors=True)
        write(place)
        place.replace(directory)


def _write_language_model(directory: Path, shape: Shape) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    random_pair.write_config(directory, random_pair.target_config(shape))
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # billions of random numbers
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory), dtype=torch.bfloat16)
    model.save_pretrained(directory)
    for name in TOKENIZER_FILES:
        shutil.copy2(TOKENIZER / name, directory)
