"""What is minimised when windows lie on the target's own trajectories: window objectives and supervised baselines.

Published PPOW is not here: its clipped group-relative loss is TRL's own, fed by rollout.py and rewards.py. Every
objective here is a mean over windows and needs no sampling: y is the target's trajectory, p and q the target and
draft distributions along it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from ppow_train.errors import UserError
from ppow_train.verification import overlap, survival_on_path, survival_product, token_logps
from vllm_ppow.speedup import speedup_increments

CST_LOSSES = ("ce", "kl_div", "rkl", "jsd", "tv", "nla", "lk_hybrid")
CST_ALIASES = {"kl": "kl_div"}
OBJECTIVES = ("ppow", "exact", "overlap", "cst:LOSS")


@dataclasses.dataclass(frozen=True)
class PathWindows:
    """N windows on target trajectories, at the training temperature.

    Attributes:
        tokens: int64 [N, K], the trajectory's.
        target_logits, draft_logits: [N, K, V], divided by the temperature.
    """

    tokens: torch.Tensor
    target_logits: torch.Tensor
    draft_logits: torch.Tensor


Objective = Callable[[PathWindows], torch.Tensor]


def exact(windows: PathWindows, draft_cost_ratio: float) -> torch.Tensor:
    """−E[R_speedup], estimated on target paths (ours, beyond the paper): unbiased in value and gradient.

    E[R] = Σ_i P(first i accepted) · (f(i) − f(i−1)), f(k) = k / (kγ + 1); see `survival_on_path`.

    Returns:
        scalar.
    """
    survival = survival_on_path(
        token_logps(windows.target_logits, windows.tokens),
        token_logps(windows.draft_logits, windows.tokens),
        overlap(windows.target_logits, windows.draft_logits),
    )
    return -_worth(survival, draft_cost_ratio)


def overlap_window(windows: PathWindows, draft_cost_ratio: float) -> torch.Tensor:
    """−Σ_i Π_{l<=i} Σ_v min(p, q)_l · (f(i) − f(i−1)): the window's worth with survival as a product (ours).

    Returns:
        scalar.
    """
    survival = survival_product(overlap(windows.target_logits, windows.draft_logits))
    return -_worth(survival, draft_cost_ratio)


def _worth(survival: torch.Tensor, draft_cost_ratio: float) -> torch.Tensor:
    increments = survival.new_tensor(speedup_increments(survival.shape[-1], draft_cost_ratio))
    return (survival * increments).sum(-1).mean()


def continued_supervised(windows: PathWindows, loss_name: str, position_decay: float) -> torch.Tensor:
    """Continued supervised training with a loss of the `speculators` library, weighted decay^i over the window.

    Args:
        loss_name: one of `CST_LOSSES`.
        position_decay: weight of position i is decay^i, i = 0..K−1, normalised to sum to one; 1 weighs all alike.

    Returns:
        scalar.
    """
    from speculators.losses import resolve_loss_config

    (loss, _weight), *_ = resolve_loss_config(loss_name, "eager").values()
    batch, length, vocab = windows.draft_logits.shape
    per_token = loss(
        windows.draft_logits.reshape(1, batch * length, vocab),
        windows.target_logits.reshape(1, batch * length, vocab),
    ).view(batch, length)
    weights = position_decay ** torch.arange(length, device=per_token.device, dtype=per_token.dtype)
    return (per_token * (weights / weights.sum())).sum(-1).mean()


def parse_objective(name: str) -> str:
    """Normalise an objective's name: `ppow`, `exact`, `overlap` or `cst:LOSS`.

    Raises:
        UserError: unknown name, with the known ones.
    """
    if name in ("ppow", "exact", "overlap"):
        return name
    kind, _, loss = name.partition(":")
    loss = CST_ALIASES.get(loss, loss)
    if kind == "cst" and loss in CST_LOSSES:
        return f"cst:{loss}"
    known = ["ppow", "exact", "overlap", *(f"cst:{loss}" for loss in (*CST_LOSSES, *CST_ALIASES))]
    raise UserError(f"objective must be one of {', '.join(known)}, got {name!r}.")


def make_objective(name: str, draft_cost_ratio: float, position_decay: float) -> Objective:
    """The function to minimise for an objective that works on target paths (all but `ppow`)."""
    name = parse_objective(name)
    if name == "exact":
        return lambda windows: exact(windows, draft_cost_ratio)
    if name == "overlap":
        return lambda windows: overlap_window(windows, draft_cost_ratio)
    if name.startswith("cst:"):
        return lambda windows: continued_supervised(windows, name.removeprefix("cst:"), position_decay)
    raise ValueError(f"{name} is not an objective on target paths")
