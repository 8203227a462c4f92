"""The target's exact distribution over short continuations, by Hugging Face, and chi-square against counted ones.

A continuation is a tuple of token ids. Those whose expected count reaches MIN_EXPECTED are cells of their own; all
others are one more. Left out: where samples come from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

MIN_EXPECTED = 5.0


def continuations(
    target: Path, prompt: Sequence[int], length: int, floor: float
) -> dict[tuple[int, ...], float]:
    """Probability of every continuation of `length` tokens whose probability is at least `floor`, in float64.

    A continuation is never likelier than its beginning, so that beginnings below `floor` are left at once.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32, use_safetensors=True).eval()
    known: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        begun = list(known)
        rows = torch.tensor([[*prompt, *tokens] for tokens in begun])
        with torch.no_grad():
            parts = [model(part).logits[:, -1].double().softmax(-1) for part in rows.split(128)]
        joint = torch.cat(parts) * torch.tensor(list(known.values()), dtype=torch.float64)[:, None]
        known = {
            (*begun[row], token): float(joint[row, token])
            for row, token in (joint >= floor).nonzero().tolist()
        }
    return known


def chi_square_p(samples: Iterable[tuple[int, ...]], exact: dict[tuple[int, ...], float]) -> float:
    """P-value of Pearson's statistic: how often samples of `exact` would differ from it at least as much."""
    counts = Counter(samples)
    total = sum(counts.values())
    cells = {cell: p for cell, p in exact.items() if p * total >= MIN_EXPECTED}
    rest = 1.0 - sum(cells.values())
    observed = [counts[cell] for cell in cells] + [total - sum(counts[cell] for cell in cells)]
    expected = [p * total for p in cells.values()] + [rest * total]
    if expected[-1] < MIN_EXPECTED:  # too rare to be a cell: with the least likely one
        few, rare = expected.pop(), observed.pop()
        expected[-1] += few
        observed[-1] += rare
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    half = torch.tensor([(len(expected) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))
