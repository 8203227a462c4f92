"""What a whole window is expected to earn, in every way of serving (ours, beyond the paper).

`exact` and `overlap` are −Σ_i S_i · (f(i) − f(i−1)) with S_i = P(first i draft tokens accepted) and f the speedup
reward, since E[R_speedup] = Σ_i P(first i accepted) · (f(i) − f(i−1)); they differ in S. f charges for the accepted
tokens, or for `num_charged_tokens` (speedup.py). `drafts` counts the drafts that a token costs instead. Left out:
supervised losses.

Where drafts are greedy, a = argmax q is accepted with chance p(a) (at temperature 0: if a is the target's own token), a
step function of the weights without a gradient. There q_τ = q^s / Σ q^s stands for the argmax, q at a temperature τ
below that of training, s = training temperature / τ: it becomes the argmax as τ -> 0.
"""

from __future__ import annotations

import torch

from ppow_train.objectives.path_windows import PathWindows
from ppow_train.verification import (
    agreement,
    agreement_on_path,
    overlap,
    survival_on_path,
    survival_product,
    token_logps,
)
from vllm_ppow.speedup import speedup_increments


def exact(
    windows: PathWindows, draft_cost_ratio: float, num_charged_tokens: int | None = None
) -> torch.Tensor:
    """−E[R_speedup] of sampled drafts, estimated on target paths: unbiased in value and gradient.

    S_i = Π_{t<i} min(1, q/p)(y_t) · Σ_v min(p_i, q_i); see `survival_on_path`.

    Returns:
        scalar.
    """
    survival = survival_on_path(
        token_logps(windows.target_logits, windows.tokens),
        token_logps(windows.draft_logits, windows.tokens),
        overlap(windows.target_logits, windows.draft_logits),
    )
    return -_worth(survival, draft_cost_ratio, num_charged_tokens)


def overlap_window(
    windows: PathWindows, draft_cost_ratio: float, num_charged_tokens: int | None = None
) -> torch.Tensor:
    """The window's worth for sampled drafts with survival as a product: S_i = Π_{l<=i} Σ_v min(p_l, q_l).

    Returns:
        scalar.
    """
    survival = survival_product(overlap(windows.target_logits, windows.draft_logits))
    return -_worth(survival, draft_cost_ratio, num_charged_tokens)


def exact_greedy_drafts(
    windows: PathWindows, sharpening: float, draft_cost_ratio: float, num_charged_tokens: int | None = None
) -> torch.Tensor:
    """`exact` for greedy drafts at temperature > 0: S_i = Π_{t<i} q_τ(y_t) · Σ_v p_i q_τ,i; see `agreement_on_path`.

    As τ -> 0, E_y[S_i] becomes E_y[Π_{t<i} 1[y_t = a_t] · p_i(a_i)], a = argmax q: what greedy drafts survive.

    Args:
        sharpening: training temperature / τ.

    Returns:
        scalar.
    """
    sharp = windows.draft_logits * sharpening
    survival = agreement_on_path(token_logps(sharp, windows.tokens), agreement(windows.target_logits, sharp))
    return -_worth(survival, draft_cost_ratio, num_charged_tokens)


def overlap_greedy_drafts(
    windows: PathWindows, sharpening: float, draft_cost_ratio: float, num_charged_tokens: int | None = None
) -> torch.Tensor:
    """`overlap` for greedy drafts at temperature > 0: S_i = Π_{l<=i} Σ_v p_l q_τ,l.

    Args:
        sharpening: training temperature / τ.

    Returns:
        scalar.
    """
    survival = survival_product(agreement(windows.target_logits, windows.draft_logits * sharpening))
    return -_worth(survival, draft_cost_ratio, num_charged_tokens)


def greedy_trajectory(
    windows: PathWindows, sharpening: float, draft_cost_ratio: float, num_charged_tokens: int | None = None
) -> torch.Tensor:
    """Both objectives at temperature 0, where the target is its stored greedy trajectory y: S_i = Π_{l<=i} q_τ(y_l).

    Given y nothing is random, so that path ratio and overlap are one number.

    Args:
        sharpening: training temperature / τ.

    Returns:
        scalar.
    """
    survival = token_logps(windows.draft_logits * sharpening, windows.tokens).cumsum(-1).exp()
    return -_worth(survival, draft_cost_ratio, num_charged_tokens)


def drafts_per_token(acceptance: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Drafts that a served token costs, 1 / (1 + E[k]), with smoothed acceptance (ours): the mean over windows of

    1 / (1 + Σ_i Π_{l<=i} ((1 − s) a_l + s)), a_l the chance that draft token l is accepted once it is reached.

    Serving makes 1 / (1 + k) drafts per token, and makes most of them where k is small: so do the windows count here,
    where `overlap` counts those most that go well already. Smoothing keeps a signal at every position of a window that
    stops early; with s = 0 nothing reaches the positions behind a certain rejection.

    Args:
        acceptance: [N, K] in [0, 1].
        smoothing: s in [0, 1).

    Returns:
        scalar.
    """
    survival = survival_product((1.0 - smoothing) * acceptance + smoothing)
    return (1.0 / (1.0 + survival.sum(-1))).mean()


def _worth(survival: torch.Tensor, draft_cost_ratio: float, num_charged_tokens: int | None) -> torch.Tensor:
    increments = speedup_increments(survival.shape[-1], draft_cost_ratio, num_charged_tokens)
    return (survival * survival.new_tensor(increments)).sum(-1).mean()
