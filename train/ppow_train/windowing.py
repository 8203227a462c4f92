"""How critical a window is, and how starts are drawn by it: the formulas of adaptive divergence-aware windowing.

Two kinds of criticality: `divergence`, where the target is sure and the drafter disagrees (the paper's), and
`lost_tokens`, what a window is expected to lose of its K tokens (ours). Left out: how distributions along a trajectory
are computed (rollout.py); when criticality is computed anew (sampler.py).
"""

from __future__ import annotations

import math

import torch

from ppow_train.verification import overlap, survival_on_path, token_logps
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


def token_acceptance(
    target_logits: torch.Tensor,
    draft_logits: torch.Tensor,
    tokens: torch.Tensor,
    vocabulary: DraftVocabulary = FULL_VOCABULARY,
) -> torch.Tensor:
    """What `lost_tokens` needs to know of each token of a trajectory.

    Args:
        target_logits, draft_logits: [..., V] and [..., D], divided by the temperature.
        tokens: int64 [...], the trajectory's.
        vocabulary: the D tokens that can be drafted.

    Returns:
        [..., 3]: log p and log q of the token, and the overlap at its place.
    """
    target_logits, draft_logits = (
        vocabulary.with_rest(target_logits),
        vocabulary.with_empty_rest(draft_logits),
    )
    columns = vocabulary.columns(tokens)
    return torch.stack(
        [
            token_logps(target_logits, columns),
            token_logps(draft_logits, columns),
            overlap(target_logits, draft_logits),
        ],
        dim=-1,
    )


def lost_tokens(token_values: torch.Tensor, num_speculative_tokens: int) -> torch.Tensor:
    """K − Σ_i P(first i accepted) of each window, by `survival_on_path` (ours): [B, M, 3] -> [B, M − K + 1] in 0..K.

    The alternative to the published criticality: what a window costs, whether or not the target is sure. One
    trajectory's estimate, from the same first-token predictions (see `WindowRunner.criticality`).
    """
    windows = token_values.unfold(1, num_speculative_tokens, 1)
    return num_speculative_tokens - survival_on_path(*windows.unbind(2)).sum(-1)


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
    Draws are systematic (Madow 1949): one uniform number per trajectory, W points at equal distances of cumulated
    chance. A start is drawn W times its chance in expectation, once at most while that is below one, and the windows
    of a trajectory spread over it instead of falling together by chance (ours).

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
    offset = torch.rand(len(chance), 1, generator=generator, dtype=torch.float64)
    points = (offset + torch.arange(windows)) / windows
    drawn = torch.searchsorted(chance.cumsum(-1), points, right=True)
    return torch.minimum(drawn, num_starts[:, None] - 1)  # chances may add up to a little less than one
