"""Simulated acceptance of windows on held-out trajectories: quick, exact in expectation, no substitute for vLLM.

Left out: where serving would begin its drafts (walk.py); serving itself (serving_eval.py), which has the last word.
"""

from __future__ import annotations

import dataclasses

import torch

from ppow_train.rollout import WindowRunner
from ppow_train.verification import overlap, survival_on_path, token_logps


@dataclasses.dataclass(frozen=True)
class SimulatedAcceptance:
    """What a drafter is expected to earn.

    Attributes:
        per_position: P(first i accepted), i = 1..K, unconditional as vLLM counts it, drafts sampled from q.
        num_windows: windows averaged over.
    """

    per_position: list[float]
    num_windows: int

    @property
    def num_accepted_tokens(self) -> float:
        """Expected accepted tokens per draft, bonus excluded."""
        return sum(self.per_position)


@torch.no_grad()
def simulate_acceptance(runner: WindowRunner, stride: int = 4, batch_size: int = 16) -> SimulatedAcceptance:
    """Expected acceptance over windows at every `stride`-th position of the runner's trajectories."""
    total = torch.zeros(runner.num_speculative_tokens, dtype=torch.float64)
    count = 0
    for begin in range(0, len(runner.trajectories), batch_size):
        rows = torch.arange(begin, min(begin + batch_size, len(runner.trajectories)))
        trajectory, start = _strided_starts(runner, rows, stride)
        windows = runner.path_windows(trajectory, start)
        survival = survival_on_path(
            token_logps(windows.target_logits, windows.tokens),
            token_logps(windows.draft_logits, windows.tokens),
            overlap(windows.target_logits, windows.draft_logits),
        )
        total += survival.double().sum(0).cpu()
        count += len(survival)
    return SimulatedAcceptance((total / count).tolist(), count)


def _strided_starts(
    runner: WindowRunner, rows: torch.Tensor, stride: int
) -> tuple[torch.Tensor, torch.Tensor]:
    device = runner.trajectories.input_ids.device
    room = runner.trajectories.num_starts(runner.num_speculative_tokens)
    first = runner.trajectories.first_starts()
    trajectory, start = [], []
    for row in rows.tolist():
        offsets = torch.arange(0, int(room[row]), stride, device=device)
        trajectory.append(torch.full_like(offsets, row))
        start.append(first[row] + offsets)
    return torch.cat(trajectory), torch.cat(start)
