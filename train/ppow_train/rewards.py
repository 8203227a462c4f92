"""What a verified window was worth: cost-aware speedup, and proximity where nothing was accepted.

Tensor functions with their formula, and the same as reward functions that TRL calls. Left out: advantages (TRL
standardises within the group), verification.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vllm_ppow.speedup import speedup_reward

RewardFunc = Callable[..., list[float]]


def proximity_reward(
    num_accepted_tokens: torch.Tensor, divergence: torch.Tensor, epsilon: float, weight: float
) -> torch.Tensor:
    """R_dist = η · 1[Δ < ε], only where k = 0 (PPOW, reward section).

    Args:
        num_accepted_tokens: int64 [N], k.
        divergence: [N], Δ = Σ_t log P(y_t | x, y_<t) − Σ_t log P(ŷ_t | x, ŷ_<t) in nats, y the target's window, ŷ the
            drafted one.
        epsilon: ε in nats.
        weight: η, in units of the speedup reward.

    Returns:
        [N].
    """
    near = (num_accepted_tokens == 0) & (divergence < epsilon)
    return weight * near.to(divergence.dtype)


class ProximityThreshold:
    """ε as a running quantile of Δ over the windows with k = 0 (ours: a fixed ε fires always or hardly ever).

    Args:
        quantile: share of the k = 0 windows that are to be rewarded, in (0, 1).
        fixed: ε in nats instead.
        momentum: share of the old value that survives an update, in [0, 1).
    """

    def __init__(self, quantile: float, fixed: float | None = None, momentum: float = 0.9) -> None:
        self.quantile, self.fixed, self.momentum = quantile, fixed, momentum
        self._running: float | None = None

    def state(self) -> dict[str, float | None]:
        """What a later `restore` needs to go on alike; JSON."""
        return {"running": self._running}

    def restore(self, state: dict[str, float | None]) -> None:
        """Go on from a `state`."""
        self._running = state["running"]

    def update(self, num_accepted_tokens: torch.Tensor, divergence: torch.Tensor) -> float:
        """Take in a step's windows ([N], [N]); return ε in nats for the same step (−inf before any k = 0 was seen)."""
        if self.fixed is not None:
            return self.fixed
        misses = divergence[num_accepted_tokens == 0].float()
        if len(misses):
            now = float(misses.quantile(self.quantile))
            keep = self.momentum if self._running is not None else 0.0
            self._running = keep * (self._running or 0.0) + (1.0 - keep) * now
        return self._running if self._running is not None else float("-inf")


def make_reward_funcs(
    draft_cost_ratio: float, proximity_weight: float, num_charged_tokens: int | None = None
) -> list[RewardFunc]:
    """PPOW's two rewards in TRL's form: they read the columns that the rollout adds to each row."""

    def speedup(num_accepted_tokens: list[int], **columns: Any) -> list[float]:
        return [speedup_reward(k, draft_cost_ratio, num_charged_tokens) for k in num_accepted_tokens]

    def proximity(
        num_accepted_tokens: list[int],
        divergence: list[float],
        proximity_epsilon: list[float],
        **columns: Any,
    ) -> list[float]:
        reward = proximity_reward(
            torch.tensor(num_accepted_tokens),
            torch.tensor(divergence),
            proximity_epsilon[0],
            proximity_weight,
        )
        return reward.tolist()

    return [speedup, proximity]
