"""What is minimised when windows lie on the target's own trajectories: window objectives and supervised baselines.

Published PPOW is not here: its clipped group-relative loss is TRL's own, fed by rollout.py and rewards.py. Every
objective here is a mean over windows and needs no sampling: y is the target's trajectory, p and q the target and
draft distributions along it. Where a head drafts from a reduced vocabulary, what is about acceptance (exact, overlap,
tv, nla) takes p as it is, what is about likeness (ce, kl_div, rkl, jsd) p renormalised on the draft vocabulary, and
lk_hybrid each of its parts in its own form; vocabulary.py tells why.
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
_ACCEPTANCE_LOSSES = ("tv", "nla")
OBJECTIVES = ("ppow", "exact", "overlap", "cst:LOSS")


@dataclasses.dataclass(frozen=True)
class PathWindows:
    """N windows on target trajectories, at the training temperature.

    Attributes:
        tokens: int64 [N, K], the trajectory's, as columns of the logits.
        target_logits, draft_logits: [N, K, V], divided by the temperature; [N, K, D + 1] with a reduced vocabulary.
        has_rest: the last column stands for all tokens that cannot be drafted (see vocabulary.py).
    """

    tokens: torch.Tensor
    target_logits: torch.Tensor
    draft_logits: torch.Tensor
    has_rest: bool = False

    def without_rest(self) -> PathWindows:
        """The same on the draft vocabulary alone, whose softmax is p renormalised; tokens may lie beyond it."""
        if not self.has_rest:
            return self
        return PathWindows(self.tokens, self.target_logits[..., :-1], self.draft_logits[..., :-1])


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
    if loss_name == "lk_hybrid" and windows.has_rest:
        per_token = _lk_hybrid_with_rest(windows)
    else:
        per_token = _library_loss(
            loss_name, windows if loss_name in _ACCEPTANCE_LOSSES else windows.without_rest()
        )
    length = per_token.shape[-1]
    weights = position_decay ** torch.arange(length, device=per_token.device, dtype=per_token.dtype)
    return (per_token * (weights / weights.sum())).sum(-1).mean()


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
