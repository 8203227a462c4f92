"""Continued supervised training (CST): per-token losses of the `speculators` library, weighted over the window.

Left out: which tokens are trained on, objectives of whole windows.
"""

from __future__ import annotations

import torch

from ppow_train.objectives.path_windows import PathWindows

_ACCEPTANCE_LOSSES = ("tv", "nla")
# D-PACE reads a confidence per token from a loss, exp(−loss): for each loss that it can weigh, the one that is read.
_CONFIDENCE_LOSS = {"ce": "ce", "tv": "nla"}


def continued_supervised(windows: PathWindows, loss_name: str, position_decay: float) -> torch.Tensor:
    """Continued supervised training with a loss of the `speculators` library, weighted decay^i over the window.

    Args:
        loss_name: one of `CST_LOSSES`.
        position_decay: weight of position i is decay^i, i = 0..K−1, normalised to sum to one; 1 weighs all alike.

    Returns:
        scalar.
    """
    per_token = token_losses(windows, loss_name)
    length = per_token.shape[-1]
    weights = position_decay ** torch.arange(length, device=per_token.device, dtype=per_token.dtype)
    return (per_token * (weights / weights.sum())).sum(-1).mean()


def dpace_supervised(windows: PathWindows, loss_name: str, alpha: float) -> torch.Tensor:
    """The same with D-PACE's weights: 1/K Σ_i w_i · loss_i, w_i = Σ_{j>=i} Π_{l<=j} ((1 − α) c_l + α), held constant.

    c_l is the drafter's confidence, so that w_i follows how much of the window hangs on position i. For `ce`,
    c = q(argmax p): D-PACE (arXiv 2605.18810) as `speculators` computes it, not normalised. For `tv`, c is the overlap
    (ours), the chance itself that the token is accepted.

    Args:
        loss_name: one of `DPACE_LOSSES`.
        alpha: α in (0, 1], smooths the confidence; 1 gives the fixed weights K − i.

    Returns:
        scalar.
    """
    from speculators.losses import dpace_loss_decay

    per_token = token_losses(windows, loss_name)
    read = token_losses(windows, _CONFIDENCE_LOSS[loss_name]).view(1, -1)
    weights = dpace_loss_decay(
        pos_idx=None,  # not read
        loss_mask=torch.ones_like(read),
        block_size=per_token.shape[-1],
        dpace_alpha=alpha,
        elementwise_loss=read,
    )
    return (per_token * weights.view_as(per_token)).mean()


def token_losses(windows: PathWindows, loss_name: str) -> torch.Tensor:
    """One of `CST_LOSSES` for each token, [N, K], with the form of p that the loss asks for (vocabulary.py)."""
    if loss_name == "lk_hybrid" and windows.has_rest:
        return _lk_hybrid_with_rest(windows)
    return _library_loss(loss_name, windows if loss_name in _ACCEPTANCE_LOSSES else windows.without_rest())


def _library_loss(name: str, windows: PathWindows) -> torch.Tensor:
    from speculators.losses import resolve_loss_config

    (loss, _weight), *_ = resolve_loss_config(name, "eager").values()
    batch, length, vocab = windows.draft_logits.shape
    return loss(
        windows.draft_logits.reshape(1, batch * length, vocab),
        windows.target_logits.reshape(1, batch * length, vocab),
    ).view(batch, length)


def _lk_hybrid_with_rest(windows: PathWindows) -> torch.Tensor:
    """λ·KL + (1 − λ)·TV, λ = exp(−3 · overlap), the library's blend of its own losses, each with its own form of p."""
    variation = _library_loss("tv", windows)
    weight = torch.exp(-3.0 * (1.0 - variation.detach()))
    return weight * _library_loss("kl_div", windows.without_rest()) + (1.0 - weight) * variation
