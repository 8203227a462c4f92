"""Prompts in, trajectories on disk and back: station 1 of a window's life.

A trajectory is stored as token ids only; what the target thinks along it is recomputed when needed, so no hidden states
fill the disk. Left out: generation itself (generation.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from ppow_train.errors import UserError
from ppow_train.prompts import Text
from ppow_train.prompts import read_prompts as read_prompts
from ppow_train.types import FlatTrajectories, Trajectories

# Part of every set's name: counted up when generation changes what it writes, so that no old set passes for a new one.
_GENERATION = 2


def collate(prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]) -> FlatTrajectories:
    """Token lists -> trajectories without padding."""
    prompt_lengths, rows = [], []
    for prompt, completion in zip(prompt_ids, completion_ids, strict=True):
        prompt_lengths.append(len(prompt))
        rows.append(torch.tensor([*prompt, *completion], dtype=torch.int32))
    return FlatTrajectories(
        torch.cat(rows), torch.tensor(prompt_lengths), torch.tensor([len(row) for row in rows])
    )


def keep_long_enough(trajectories: Trajectories, num_speculative_tokens: int) -> Trajectories:
    """Drop trajectories without room for one window.

    Raises:
        UserError: nothing is left.
    """
    rows = (trajectories.num_starts(num_speculative_tokens) > 0).nonzero().squeeze(-1)
    if not len(rows):
        raise UserError(
            f"No trajectory is long enough for a window of {num_speculative_tokens} tokens: raise --max-new-tokens "
            "or lower --num-speculative-tokens."
        )
    return trajectories.subset(rows)


def save_trajectories(
    directory: Path, prompt_ids: list[list[int]], completion_ids: list[list[int]], facts: dict
) -> None:
    """Write trajectories as a `datasets` dataset with a `facts.json` beside it; whole or not at all."""
    from datasets import Dataset

    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        Dataset.from_dict({"prompt_ids": prompt_ids, "completion_ids": completion_ids}).save_to_disk(
            temporary
        )
        (temporary / "facts.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        if directory.exists():
            shutil.rmtree(directory)
        os.rename(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_trajectories(directory: Path) -> Trajectories:
    """Read what `save_trajectories` wrote."""
    from datasets import load_from_disk

    dataset = load_from_disk(str(directory))
    return collate(dataset["prompt_ids"], dataset["completion_ids"])


def trajectory_key(
    prompts: Sequence[Text],
    target_fingerprint: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    dtype: str = "float32",
    own_bos: bool = False,
) -> str:
    """Short name for a set of trajectories, the same whenever the same ones would be generated.

    Args:
        own_bos: whether some text brings its own BOS token: older sets gave it a second one.
    """
    asked = [_GENERATION, list(prompts), target_fingerprint, max_new_tokens, temperature, seed]
    asked += [dtype] * (dtype != "float32") + ["own BOS"] * own_bos  # older sets were all float32
    facts = json.dumps(asked)
    return hashlib.sha256(facts.encode()).hexdigest()[:16]
