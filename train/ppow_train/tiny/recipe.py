"""Everything that decides what the tiny pair becomes. Left out: making it (build.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

Say = Callable[[str], None]


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
        report_prompts: further held-out prompts per domain, no two alike and none of the former.
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
    report_prompts: int = 224
