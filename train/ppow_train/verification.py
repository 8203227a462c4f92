"""Acceptance maths: what the target keeps of a drafted window, counted, sampled or in expectation.

Pure tensor functions, checked against enumeration in tests. p and q are target and draft distribution at one
temperature. Left out: models, rewards.
"""

from __future__ import annotations

import torch


def overlap(target_logits: torch.Tensor, draft_logits: torch.Tensor) -> torch.Tensor:
    """Σ_v min(p, q): the chance that a sampled draft token is accepted = 1 − total variation.

    Args:
        target_logits, draft_logits: [..., V], already divided by the temperature.

    Returns:
        [...] in [0, 1].
    """
    return torch.minimum(target_logits.softmax(-1), draft_logits.softmax(-1)).sum(-1)


def token_logps(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probability of each token: [..., V], int64 [...] -> [...]."""
    return logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)


def acceptance_ratio(target_logps: torch.Tensor, draft_logps: torch.Tensor) -> torch.Tensor:
    """min(1, p/q) of the drafted tokens (rejection sampling): [...] -> [...]."""
    return (target_logps - draft_logps).clamp(max=0.0).exp()


def leading_count(accepted: torch.Tensor) -> torch.Tensor:
    """Length of the leading run of True: bool [..., K] -> int64 [...]; one early mismatch discards the rest."""
    return accepted.long().cumprod(-1).sum(-1)


def greedy_accepted_length(drafted: torch.Tensor, target_greedy: torch.Tensor) -> torch.Tensor:
    """k at temperature 0: longest common prefix with the target's greedy continuation, int64 [..., K] -> [...]."""
    return leading_count(drafted == target_greedy)


def sampled_accepted_length(ratio: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """k by rejection sampling: token t is kept while u_t < min(1, p/q).

    Args:
        ratio: [..., K], `acceptance_ratio`.
        uniforms: [..., K] in [0, 1).
    """
    return leading_count(uniforms < ratio)


def survival_on_path(
    target_logps: torch.Tensor, draft_logps: torch.Tensor, overlaps: torch.Tensor
) -> torch.Tensor:
    """One-trajectory estimate of P(first i draft tokens accepted), i = 1..K (ours; training-time identity).

    With y a trajectory of the target, r_t = min(1, q/p)(y_t):
    P(first i accepted) = E_y[ Π_{t<i} r_t · Σ_v min(p_i, q_i) ]. Why: the joint chance that the first t tokens are
    drafted as y and accepted is Π min(p, q)(y) = Π p(y) · r, so weighting the target's own paths by r gives it exactly.

    Args:
        target_logps, draft_logps: [..., K], of the trajectory's tokens.
        overlaps: [..., K], Σ_v min(p, q) along the trajectory.

    Returns:
        [..., K], differentiable in the draft.
    """
    return _reached((draft_logps - target_logps).clamp(max=0.0).exp()) * overlaps


def _reached(ratio: torch.Tensor) -> torch.Tensor:
    """Π_{t<i} ratio_t: [..., K] -> [..., K], 1 at the first position."""
    return torch.cat([torch.ones_like(ratio[..., :1]), ratio.cumprod(-1)[..., :-1]], dim=-1)


def agreement(target_logits: torch.Tensor, draft_logits: torch.Tensor) -> torch.Tensor:
    """Σ_v p q: the chance that one token drawn from each is the same token (ours; for greedy drafts, see below).

    Args:
        target_logits, draft_logits: [..., V], each divided by its temperature.

    Returns:
        [...] in [0, 1]; p(argmax q) where q is all on one token.
    """
    return (target_logits.softmax(-1) * draft_logits.softmax(-1)).sum(-1)


def agreement_on_path(draft_logps: torch.Tensor, agreements: torch.Tensor) -> torch.Tensor:
    """One-trajectory estimate of P(first i drafts are what the target draws), i = 1..K (ours).

    A greedy draft a is accepted with probability p(a) (rejection sampling from a q that is all on a): exactly when the
    target, drawing for itself, draws a. With y a trajectory of the target,
    P(first i accepted) = E_y[ Π_{t<i} q(y_t) · Σ_v p_i q_i ], for any q whose draws do not look at the target's.

    Args:
        draft_logps: [..., K], of the trajectory's tokens.
        agreements: [..., K], `agreement` along the trajectory.

    Returns:
        [..., K], differentiable in the draft.
    """
    return _reached(draft_logps.exp()) * agreements


def survival_product(overlaps: torch.Tensor) -> torch.Tensor:
    """Π_{l<=i} Σ_v min(p_l, q_l): survival as if the overlaps along the trajectory were independent (ours).

    Args:
        overlaps: [..., K].

    Returns:
        [..., K]; a lower-variance surrogate for `survival_on_path`, not equal to it.
    """
    return overlaps.cumprod(-1)
