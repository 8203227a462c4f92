"""Which windows to train on: ordinary ones, or those where the target is sure and the drafter disagrees.

Criticality and the draw. Left out: how distributions along a trajectory are computed (rollout.py).
"""

from __future__ import annotations

import math

import torch

from ppow_train.vocabulary import FULL_VOCABULARY, DraftVocabulary


def token_criticality(
    target_logits: torch.Tensor, draft_logits: torch.Tensor, vocabulary: DraftVocabulary = FULL_VOCABULARY
) -> torch.Tensor:
    """v_t = C(P_t) · KL(P_t ‖ Q_t), C(P_t) = 1 − H(P_t)/log|V| (PPOW, adaptive windowing section).

    The entropy is that of P; where the drafter cannot draft every token, KL is to P renormalised on those it can.

    Args:
        target_logits, draft_logits: [..., V] and [..., D], divided by the temperature.
        vocabulary: the D tokens that can be drafted.

    Returns:
        [...], nats, >= 0.
    """
    target_logp = target_logits.log_softmax(-1)
    draft_logp = draft_logits.log_softmax(-1)
    p = target_logp.exp()
    entropy = -(p * target_logp).sum(-1)
    confidence = 1.0 - entropy / math.log(target_logits.shape[-1])
    target_logp = vocabulary.renormalised(target_logp)
    divergence = (target_logp.exp() * (target_logp - draft_logp)).sum(-1)
    return confidence * divergence.clamp(min=0.0)


def window_criticality(token_values: torch.Tensor, num_speculative_tokens: int) -> torch.Tensor:
    """Mean of v_t over each window of K tokens: [B, M] -> [B, M − K + 1] (PPOW, adaptive windowing section)."""
    return token_values.unfold(-1, num_speculative_tokens, 1).mean(-1)


def draw_starts(
    num_starts: torch.Tensor,
    windows: int,
    generator: torch.Generator,
    criticality: torch.Tensor | None = None,
    uniform_share: float = 1.0,
) -> torch.Tensor:
    """Draw window starts per trajectory, as offsets from its first start.

    With criticality, the chance of a start is (1 − u) · criticality / Σ criticality + u · uniform, u the uniform share
    (ours: the paper says "with priority"; a share of ordinary windows keeps the easy places from being forgotten).
    Starts of one trajectory are distinct while there are enough of them.

    Args:
        num_starts: int64 [B], >= 1, starts that leave room for a window.
        windows: how many to draw for each trajectory.
        generator: CPU generator.
        criticality: [B, S] of the windows at each offset, or None for ordinary windows; what lies beyond num_starts
            is not read.
        uniform_share: u in [0, 1].

    Returns:
        int64 [B, windows], on the CPU.
    """
    num_starts = num_starts.cpu()
    offsets = torch.arange(int(num_starts.max()))
    valid = (offsets < num_starts[:, None]).double()
    chance = valid / valid.sum(-1, keepdim=True)
    if criticality is not None:
        weight = criticality[:, : len(offsets)].detach().cpu().double() * valid
        total = weight.sum(-1, keepdim=True)
        adaptive = torch.where(total > 0, weight / total.clamp(min=1e-30), chance)
        chance = (1.0 - uniform_share) * adaptive + uniform_share * chance
    enough = (chance > 0).sum(-1) >= windows
    drawn = torch.empty(len(num_starts), windows, dtype=torch.long)
    for row in range(len(num_starts)):
        drawn[row] = torch.multinomial(
            chance[row], windows, replacement=not bool(enough[row]), generator=generator
        )
    return drawn
