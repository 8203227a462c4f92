"""Greedy output with speculation against the same target without it: identical, or different only where it may be.

With speculation the target sees batches of [requests · (K + 1)] tokens, without it of [requests · 1]. In bfloat16
kernels for other shapes round differently, a GPU's and some CPUs', and where the two best tokens are closer than that
rounding, either is right: no drafter and no plugin decides it. `compare` tells such ties from errors by the target's
own log probabilities. Left out: running engines (serving_eval.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

TIE_NATS = 0.05  # about twice the step of bfloat16 at logits of 4 to 8


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What two runs over the same prompts have in common.

    Attributes:
        prompts: number of prompts.
        identical: of these, the ones whose tokens are all the same.
        ties: of the others, those that part where the reference's two best tokens were within `TIE_NATS`.
        errors: one sentence for each that parts elsewhere.
    """

    prompts: int
    identical: int
    ties: int
    errors: tuple[str, ...]

    @property
    def is_exact(self) -> bool:
        """Whether every token is the same."""
        return self.identical == self.prompts

    @property
    def holds(self) -> bool:
        """Whether nothing but ties differs, and ties are the exception."""
        return not self.errors and self.ties * 4 <= self.prompts


def gap(logprobs: Iterable[float]) -> float:
    """How clear a choice was, in nats: the best token's log probability minus that of the second, of two or more."""
    best, second = sorted(logprobs, reverse=True)[:2]
    return best - second


def compare(
    reference: Sequence[Sequence[int]], gaps: Sequence[Sequence[float]], other: Sequence[Sequence[int]]
) -> Comparison:
    """Compare token ids with a reference's.

    Args:
        reference: token ids per prompt.
        gaps: per prompt and position, log probability of the reference's best token minus that of its second.
        other: token ids per prompt.

    Raises:
        ValueError: the two do not hold the same prompts.
    """
    if not len(reference) == len(gaps) == len(other):
        raise ValueError(
            f"{len(other)} outputs cannot be compared with {len(reference)}: run the same prompts."
        )
    identical = ties = 0
    errors = []
    for number, (wanted, gap, found) in enumerate(zip(reference, gaps, other, strict=True)):
        if list(wanted) == list(found):
            identical += 1
            continue
        parts = [i for i, (a, b) in enumerate(zip(wanted, found, strict=False)) if a != b]
        if parts and gap[parts[0]] <= TIE_NATS:
            ties += 1
        elif parts:
            errors.append(f"prompt {number} parts at token {parts[0]}, decided by {gap[parts[0]]:.3f} nats")
        else:
            errors.append(f"prompt {number} has {len(found)} tokens, not {len(wanted)}")
    return Comparison(len(reference), identical, ties, tuple(errors))
