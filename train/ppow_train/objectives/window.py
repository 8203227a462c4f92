"""What a whole window is expected to earn, however it is served (ours, beyond the paper).

`exact` and `overlap` are −Σ_i S_i · (f(i) − f(i−1)) with S_i = P(first i draft tokens accepted) and f the speedup
reward, since E[R_speedup] = Σ_i P(first i accepted) · (f(i) − f(i−1)); they differ in S. f charges for the accepted
tokens, or for `num_charged_tokens` (speedup.py). `drafts` counts the drafts that a token costs instead. Left out:
how a draft token is accepted (forms.py), supervised losses.
"""

from __future__ import annotations

import torch

from ppow_train.objectives.forms import AcceptanceForm, SampledDrafts
from ppow_train.objectives.path_windows import PathWindows
from ppow_train.verification import survival_product
from vllm_ppow.speedup import speedup_increments

_SAMPLED = SampledDrafts()


def exact(
    windows: PathWindows,
    draft_cost_ratio: float,
    num_charged_tokens: int | None = None,
    form: AcceptanceForm = _SAMPLED,
) -> torch.Tensor:
    """−E[R_speedup], estimated on target paths: of sampled drafts unbiased in value and gradient.

    Returns:
        scalar.
    """
    return -_worth(form.survival_on_path(windows), draft_cost_ratio, num_charged_tokens)


def overlap_window(
    windows: PathWindows,
    draft_cost_ratio: float,
    num_charged_tokens: int | None = None,
    form: AcceptanceForm = _SAMPLED,
) -> torch.Tensor:
    """The window's worth with survival as a product of acceptances, of sampled drafts S_i = Π_{l<=i} Σ_v min(p_l, q_l).

    Returns:
        scalar.
    """
    return -_worth(survival_product(form.acceptance(windows)), draft_cost_ratio, num_charged_tokens)


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
