"""Greedy output with speculation against the same target without it: identical, or different only where it may be.

With speculation the target sees batches of [requests · (K + 1)] tokens, without it of [requests · 1]. In bfloat16
kernels for other shapes round differently, a GPU's and some CPUs', and where the two best tokens are closer than that
rounding, either is right: no drafter and no plugin decides it. `compare` tells such ties from errors by the target's
own logits, whose differences are those of its log probabilities.

How close is close depends on the logits. vLLM's leave lm_head in the target's dtype, so that the gap between the two
best is a multiple of that dtype's step at their magnitude, in bfloat16 0.031 at a logit of 6, 0.125 at 20, 0.25 at 40.
Each of the two may round to its neighbour: `tie_nats` allows two steps. Left out: running engines (serving_eval.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

TIE_NATS = 0.05  # for float32, and at least: what sums in another order amount to in layers before lm_head
_FRACTION_BITS = {"bfloat16": 7, "float16": 10}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What two runs over the same prompts have in common.

    Attributes:
        prompts: number of prompts.
        identical: of these, the ones whose tokens are all the same.
        ties: of the others, those that part where the reference's two best tokens were within rounding.
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


def tie_nats(dtype: str, logit: float) -> float:
    """The gap up to which a choice is the target's own tie, in nats, never less than `TIE_NATS`.

    Args:
        dtype: that the target computes in, such as "bfloat16"; what is not half precision gets `TIE_NATS`.
        logit: of the best token, as lm_head gave it.
    """
    bits = _FRACTION_BITS.get(dtype)
    if bits is None or not math.isfinite(logit):
        return TIE_NATS
    exponent = math.frexp(logit)[1] - 1  # 2^exponent <= |logit| < 2^(exponent + 1)
    return max(TIE_NATS, 2 * math.ldexp(1.0, exponent - bits))


def choices(logits: Sequence[Iterable[float]], dtype: str) -> tuple[list[float], list[float]]:
    """How clear each choice of one text was, and how clear it had to be.

    Args:
        logits: per token those of the best two, or more, as vLLM tells them with `logprobs_mode="raw_logits"`.
        dtype: as in `tie_nats`.

    Returns:
        `gap` and `tie_nats` per token, in nats.
    """
    tokens = [list(one) for one in logits]
    return [gap(one) for one in tokens], [tie_nats(dtype, max(one)) for one in tokens]


def compare(
    reference: Sequence[Sequence[int]],
    gaps: Sequence[Sequence[float]],
    other: Sequence[Sequence[int]],
    ties_up_to: Sequence[Sequence[float]] | None = None,
) -> Comparison:
    """Compare token ids with a reference's.

    Args:
        reference: token ids per prompt.
        gaps: per prompt and position, log probability of the reference's best token minus that of its second.
        other: token ids per prompt.
        ties_up_to: per prompt and position, the gap up to which it is a tie (`tie_nats`); None: `TIE_NATS` everywhere.

    Raises:
        ValueError: the two do not hold the same prompts.
    """
    limits = [[TIE_NATS] * len(one) for one in gaps] if ties_up_to is None else ties_up_to
    if not len(reference) == len(gaps) == len(other) == len(limits):
        raise ValueError(
            f"{len(other)} outputs cannot be compared with {len(reference)}: run the same prompts."
        )
    identical = ties = 0
    errors = []
    for number, (wanted, gap, limit, found) in enumerate(zip(reference, gaps, limits, other, strict=True)):
        if list(wanted) == list(found):
            identical += 1
            continue
        parts = [i for i, (a, b) in enumerate(zip(wanted, found, strict=False)) if a != b]
        if parts and gap[parts[0]] <= limit[parts[0]]:
            ties += 1
        elif parts:
            at = parts[0]
            errors.append(
                f"prompt {number} parts at token {at}, decided by {gap[at]:.3f} nats, a tie up to {limit[at]:.3f}"
            )
        else:
            errors.append(f"prompt {number} has {len(found)} tokens, not {len(wanted)}")
    return Comparison(len(reference), identical, ties, tuple(errors))
