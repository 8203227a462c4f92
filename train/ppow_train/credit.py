"""Which drafted token earned what: per-token advantages of ppow whose expected gradient is that of E[R_speedup] (ours).

As published every token of a window gets the window's advantage, as if the reward did not depend on the weights. But a
token drafted from q is kept with probability min(1, p/q), which does. With k the accepted length, f the speedup reward:

    E[R] = Σ_i (f(i) − f(i−1)) · Σ_ŷ Π_{t<=i} min(p, q)(ŷ_t)

and min(p, q) moves with q only where q < p. So, with what the window earned from token t on,

    ∇E[R] = E[ Σ_t X_t ∇log q(ŷ_t) ],   X_t = 1[q < p](ŷ_t) · max(f(k) − f(t−1), 0).

A baseline b_t must not stand under the indicator: b_t · E[1[q < p] ∇log q] = b_t · ∇Σ_{v: q < p} q(v) is not zero. The
whole score is, among windows that got as far as token t: E[∇log q(ŷ_t) | k >= t−1] = 0. Hence

    A_t = 1[k >= t−1] · (X_t − b_t),   b_t = mean of X_t over the OTHER windows of the group with k >= t−1, or 0.

Leaving the window itself out keeps b_t independent of its ŷ_t; a mean that includes it would shrink position t by
(n−1)/n, n the windows that got there: the later, the more. At temperature 0 a token is kept if it is the target's own,
whatever q: the same with 1 for the indicator, the score function with reward-to-go.

Left out: R_dist, which is no part of E[R_speedup]; the loss, which is TRL's with (N, K) advantages, a mean over tokens:
its gradient is that of −E[R]/K.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from ppow_train.options import PPOWOptions
from ppow_train.types import Rollout
from vllm_ppow.speedup import speedup_increments


def token_advantages(rollout: Rollout, options: PPOWOptions) -> torch.Tensor:
    """Advantages of a rollout's tokens, [N, K]; groups of `num_generations` rows stand together."""
    below = rollout.draft_logps < rollout.target_logps
    if options.serving_temperature == 0:
        below = torch.ones_like(below)
    increments = speedup_increments(
        options.num_speculative_tokens, options.draft_cost_ratio, options.num_charged_tokens
    )
    worth = list(itertools.accumulate(increments, initial=0.0))
    return acceptance_credit(rollout.num_accepted_tokens, below, worth, options.num_generations)


def acceptance_credit(
    num_accepted_tokens: torch.Tensor, counts: torch.Tensor, worth: Sequence[float], group_size: int
) -> torch.Tensor:
    """A_t of the module's docstring.

    Args:
        num_accepted_tokens: int64 [N], k.
        counts: bool [N, K], where keeping the token depends on its own q: 1[q < p], all True at temperature 0.
        worth: f(0), …, f(K), increasing.
        group_size: G >= 2, rows of one group in a row.

    Returns:
        [N, K], in units of f.
    """
    f = torch.tensor(worth, device=counts.device)
    reached = num_accepted_tokens[:, None] >= torch.arange(counts.shape[1], device=counts.device)
    earned = (f[num_accepted_tokens][:, None] - f[:-1]).clamp(min=0.0) * counts
    groups = (-1, group_size, counts.shape[1])
    total = earned.view(groups).sum(1, keepdim=True)  # 0 where the window did not get there
    others = reached.view(groups).sum(1, keepdim=True) - reached.view(groups).long()
    baseline = (total - earned.view(groups)) / others.clamp(min=1)
    return reached * (earned - baseline.view_as(earned))
