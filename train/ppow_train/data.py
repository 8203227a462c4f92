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
from typing import Any

import torch

from ppow_train.errors import UserError
from ppow_train.prompts import prompt_hash
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
    directory: Path, prompt_ids: list[list[int]], completion_ids: list[list[int]], facts: dict[str, Any]
) -> None:
    """Write trajectories as a `datasets` dataset with a `facts.json` beside it; whole or not at all.

    A set that is there already stays: the name says what is in it (`trajectory_key`), and others may be reading it.
    """
    from datasets import Dataset

    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        Dataset.from_dict({"prompt_ids": prompt_ids, "completion_ids": completion_ids}).save_to_disk(
            temporary
        )
        (temporary / "facts.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        try:
            os.rename(temporary, directory)
        except OSError:
            if not directory.exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_trajectories(directory: Path) -> Trajectories:
    """Read what `save_trajectories` wrote."""
    from datasets import load_from_disk

    dataset = load_from_disk(str(directory))
    return collate(dataset["prompt_ids"], dataset["completion_ids"])


def trajectory_key(prompt_ids: Sequence[Sequence[int]], facts: dict[str, Any]) -> str:
    """Short name for a set of trajectories, the same whenever the same ones would be generated.

    Args:
        prompt_ids: token ids, one sequence per prompt: a tokenizer that changes, changes them.
        facts: JSON values that continuations depend on besides: the target, how it is sampled, where they end.
    """
    digest = hashlib.sha256(json.dumps([_GENERATION, facts], sort_keys=True).encode())
    for ids in prompt_ids:
        digest.update(prompt_hash(ids))
    return digest.hexdigest()[:16]
