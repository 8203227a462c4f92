"""Adaptive divergence-aware windowing: which windows of an update's trajectories are trained on, and how it decides.

Ordinary windows first, then windows drawn by criticality; the criticality of a trajectory is kept for a while and its
age is known. Draws follow from the generator that is given and from what is kept, which `state_dict` hands out. Left
out: formulas (windowing.py), models (rollout.py), logging (window_log.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from ppow_train.types import Trajectories
from ppow_train.windowing import draw_starts


@dataclasses.dataclass(frozen=True)
class Draw:
    """Windows of one update, W on each of B trajectories; the last three are None for ordinary windows.

    Attributes:
        starts: int64 [B, W], on the device of the trajectories.
        chosen: [B · W], criticality of the drawn windows.
        candidates: [C], criticality of every window that could have been drawn, once per trajectory.
        staleness: int64 [B], updates since the criticality of each trajectory was computed.
    """

    starts: torch.Tensor
    chosen: torch.Tensor | None = None
    candidates: torch.Tensor | None = None
    staleness: torch.Tensor | None = None

    @property
    def adaptive(self) -> bool:
        """Whether criticality had a say."""
        return self.chosen is not None


class WindowSampler:
    """Draws window starts.

    Args:
        criticality: int64 [B], rows of `trajectories` -> [B, S], criticality of the window at each offset from the
            first start.
        trajectories: all training trajectories, each with room for a window.
        num_speculative_tokens: K.
        adaptive_from: first update with adaptive windows (inf = never).
        uniform_share: u of `draw_starts`.
        refresh: updates after which a trajectory's criticality is computed anew when it comes up (>= 1; 1 = always
            fresh). Ours: the paper does not say how old criticality may be.
    """

    def __init__(
        self,
        criticality: Callable[[torch.Tensor], torch.Tensor],
        trajectories: Trajectories,
        num_speculative_tokens: int,
        *,
        adaptive_from: float,
        uniform_share: float,
        refresh: int = 1,
    ) -> None:
        self._compute, self.trajectories = criticality, trajectories
        self.num_speculative_tokens = num_speculative_tokens
        self.adaptive_from, self.uniform_share, self.refresh = adaptive_from, uniform_share, refresh
        self._num_starts = trajectories.num_starts(num_speculative_tokens).cpu()
        # Of each trajectory: the update it was computed before, and [num_starts] of its windows, on the CPU.
        self._kept: dict[int, tuple[int, torch.Tensor]] = {}

    def draw(self, trajectory: torch.Tensor, windows: int, step: int, generator: torch.Generator) -> Draw:
        """Draw `windows` starts on each trajectory, int64 [B], before update `step` (0 = the first)."""
        ids = trajectory.tolist()
        num_starts = self._num_starts[ids]
        first = self.trajectories.first_starts()[ids][:, None]
        if step < self.adaptive_from:
            offsets = draw_starts(num_starts, windows, generator)
            return Draw(first + offsets.to(first.device))
        self._refresh(ids, step)
        kept = [self._kept[i] for i in ids]
        criticality = torch.nn.utils.rnn.pad_sequence([values for _, values in kept], batch_first=True)
        offsets = draw_starts(num_starts, windows, generator, criticality, self.uniform_share)
        draw = Draw(
            first + offsets.to(first.device),
            chosen=criticality.gather(1, offsets).flatten(),
            candidates=torch.cat([self._kept[i][1] for i in dict.fromkeys(ids)]),
            staleness=torch.tensor([step - computed_before for computed_before, _ in kept]),
        )
        self._forget(step + 1)
        return draw

    def _refresh(self, ids: list[int], step: int) -> None:
        """Compute what is missing or too old, in one pass."""
        self._forget(step)
        # In the order of packed rows: the target remembers its last pass.
        wanted = sorted(set(ids) - self._kept.keys())
        if not wanted:
            return
        rows = torch.tensor(wanted, device=self.trajectories.lengths.device)
        computed = self._compute(rows).float().cpu()
        for i, values in zip(wanted, computed, strict=True):
            self._kept[i] = step, values[: self._num_starts[i]].clone()

    def _forget(self, step: int) -> None:
        """Drop what will be too old before update `step`: memory is bounded by what `refresh` updates compute."""
        self._kept = {i: kept for i, kept in self._kept.items() if step - kept[0] < self.refresh}

    # ------------------------------------------------------------ resuming

    def state_dict(self) -> dict[str, list[Any]]:
        """What a resumed run needs to draw as an unbroken one would, in JSON values; empty with a refresh of 1.

        Returns:
            `trajectory` and `computed_before`, whole numbers, M of each; `criticality`, a list for each of them.
        """
        return {
            "trajectory": list(self._kept),
            "computed_before": [step for step, _ in self._kept.values()],
            "criticality": [values.tolist() for _, values in self._kept.values()],
        }

    def load_state_dict(self, state: dict[str, list[Any]]) -> None:
        """Take over what `state_dict` gave, for the same trajectories and K."""
        entries = zip(state["trajectory"], state["computed_before"], state["criticality"], strict=True)
        self._kept = {i: (step, torch.tensor(values)) for i, step, values in entries}
