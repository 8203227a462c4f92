"""Windows that lie on the target's own trajectories, with p and q along them. Left out: what is made of them."""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class PathWindows:
    """N windows on target trajectories, at the training temperature.

    Attributes:
        tokens: int64 [N, K], the trajectory's, as columns of the logits.
        target_logits, draft_logits: [N, K, V], divided by the temperature; [N, K, D + 1] with a reduced vocabulary.
        has_rest: the last column stands for all tokens that cannot be drafted (see vocabulary.py).
        greedy_tokens: int64 [N, K], what the target says after each prefix of the path at temperature 0, as columns;
            None where that is the path itself, or does not matter.
    """

    tokens: torch.Tensor
    target_logits: torch.Tensor
    draft_logits: torch.Tensor
    has_rest: bool = False
    greedy_tokens: torch.Tensor | None = None

    def without_rest(self) -> PathWindows:
        """The same on the draft vocabulary alone, whose softmax is p renormalised; tokens may lie beyond it."""
        if not self.has_rest:
            return self
        return PathWindows(self.tokens, self.target_logits[..., :-1], self.draft_logits[..., :-1])
