"""Which of the target's tokens a drafter can draft, and where distributions over the two vocabularies meet.

An EAGLE-3 head may draft from D of the target's V tokens only: its distribution q lives on the D and is zero elsewhere,
the target's p is over all V. Two questions are asked of them, and they need two forms of p:

- *Acceptance* (overlap, survival, the exact expectation) compares p as it is with q. Since q is zero on all tokens
  that cannot be drafted, only the sum of p over them matters: they become ONE further column, `rest`, whose target
  logit is the log-sum-exp of theirs and whose draft logit is −inf. A softmax over the D + 1 columns is then p
  unnormalised on the draft vocabulary, and every function of verification.py works unchanged. Gradients stay finite
  because nothing multiplies the −inf: it only passes through softmax, or through exp after a clamp.
- *Likeness* (KL, its relatives, criticality) compares q with p RENORMALISED on the draft vocabulary, as speculators
  does, since KL(p ‖ q) is infinite where some of p cannot be drafted: the same columns without `rest`. The penalty of
  ppow, KL(q ‖ p), reads the log-probabilities that verification has used, p as it is: that adds a constant to it, so
  its expected gradient is that of KL(q ‖ p renormalised).

Per window position D + 1 numbers are kept instead of V. With the full vocabulary nothing is computed at all. Tokens are
target ids everywhere outside of these columns. Left out: models; how a mapping is stored (drafters/).
"""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True, eq=False)
class DraftVocabulary:
    """The tokens that a drafter can draft.

    Attributes:
        target_ids: int64 [D], the target's id of each draft column, distinct; None where the columns ARE the target's
            ids (the full vocabulary).
        column_of: int64 [V], the draft column of each target id, D for those that cannot be drafted; None likewise.
    """

    target_ids: torch.Tensor | None = None
    column_of: torch.Tensor | None = None

    @property
    def is_reduced(self) -> bool:
        """Whether some of the target's tokens cannot be drafted."""
        return self.target_ids is not None

    def to_target(self, columns: torch.Tensor) -> torch.Tensor:
        """Draft columns -> target ids, int64 [...]."""
        return columns if self.target_ids is None else self.target_ids[columns]

    def columns(self, tokens: torch.Tensor) -> torch.Tensor:
        """Target ids -> draft columns, int64 [...]; D (`rest`) for tokens that cannot be drafted."""
        return tokens if self.column_of is None else self.column_of[tokens]

    def with_rest(self, target_logits: torch.Tensor) -> torch.Tensor:
        """Target logits, divided by the temperature, over draft columns and `rest`: [..., V] -> [..., D + 1]."""
        if self.target_ids is None:
            return target_logits
        rest = target_logits.index_fill(-1, self.target_ids, float("-inf")).logsumexp(-1, keepdim=True)
        return torch.cat([target_logits[..., self.target_ids], rest], dim=-1)

    def with_empty_rest(self, draft_logits: torch.Tensor) -> torch.Tensor:
        """Draft logits with a `rest` that is never drafted: [..., D] -> [..., D + 1], differentiable."""
        if self.target_ids is None:
            return draft_logits
        return torch.nn.functional.pad(draft_logits, (0, 1), value=float("-inf"))

    def renormalised(self, target_logps: torch.Tensor) -> torch.Tensor:
        """Target log-probabilities renormalised on the draft vocabulary: [..., V] -> [..., D]."""
        if self.target_ids is None:
            return target_logps
        return target_logps[..., self.target_ids].log_softmax(-1)


FULL_VOCABULARY = DraftVocabulary()


def reduced_vocabulary(target_ids: torch.Tensor, vocab_size: int) -> DraftVocabulary:
    """The vocabulary of a drafter that drafts some of the target's tokens.

    Args:
        target_ids: int64 [D], distinct, in 0..V−1, D < V.
        vocab_size: V.
    """
    if not len(target_ids) < vocab_size:
        raise ValueError(f"{len(target_ids)} of {vocab_size} tokens are no reduced vocabulary")
    column_of = torch.full((vocab_size,), len(target_ids), device=target_ids.device)
    column_of[target_ids] = torch.arange(len(target_ids), device=target_ids.device)
    return DraftVocabulary(target_ids, column_of)
