"""Draft distributions that are ones, whatever becomes of a drafter's sums.

Where a drafter's activations overflow (float16 does so beyond 65504), its logits are NaN or infinite, and so are the
probabilities that verification of sampled drafts divides by: it would then emit other tokens than the target's. Such a
row is taken as uniform, from which drafting and verification are right like from any other distribution; its tokens are
rejected, which costs speed. Drafts that are not sampled need no distribution. Left out: weights that are not finite,
which are refused (merge.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import nn

# Above it a division by a small temperature would overflow in float32.
_MOST = 1e30


def guard(model: nn.Module) -> None:
    """Make the logits of a loaded drafter usable."""
    own: Any = model.compute_logits

    def compute_logits(*args: Any, **kwargs: Any) -> torch.Tensor | None:
        logits = own(*args, **kwargs)
        return None if logits is None else usable(logits)  # None: a rank that gathers no logits

    model.compute_logits = compute_logits  # type: ignore[assignment]


def usable(logits: torch.Tensor) -> torch.Tensor:
    """[…, V], rows whose largest logit is NaN, infinite or beyond `_MOST` replaced by zeros; -inf elsewhere stays.

    -inf for all of a row means no distribution either. One for some of its tokens means that they cannot be drafted.
    float16 becomes float32, in which a division by vLLM's least temperature overflows for none of its numbers.
    """
    if logits.dtype == torch.float16:
        logits = logits.float()
    largest = logits.amax(dim=-1, keepdim=True)
    # Asking a GPU would stall it. A CPU is asked at every pass of the drafter, in as few operations as can be.
    if logits.device.type == "cpu" and all(-_MOST <= value <= _MOST for value in largest.flatten().tolist()):
        return logits
    return logits.masked_fill(~(largest.abs() <= _MOST), 0.0)
