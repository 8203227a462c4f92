"""Simulated acceptance on held-out trajectories: quick, exact in expectation, and no substitute for vLLM's counters.

Left out: serving (serving_eval.py), which has the last word.
"""

from __future__ import annotations

import dataclasses

import torch

from ppow_train.rollout import WindowRunner
from ppow_train.verification import (
    acceptance_ratio,
    greedy_accepted_length,
    overlap,
    sampled_accepted_length,
    survival_on_path,
    token_logps,
)
from vllm_ppow.metrics import SpecDecodeCounts


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


@torch.no_grad()
def simulate_walk(
    runner: WindowRunner, max_tokens: int, greedy_drafts: bool, seed: int = 0, chunk: int = 256
) -> SpecDecodeCounts:
    """Walk each trajectory as serving would: draft K, keep what is accepted, add one token, draft again.

    Exact in law given the output y (ours): where the output shows y_t, a sampled draft had been accepted with
    probability min(1, q/p)(y_t), whatever came before; a greedy draft exactly if argmax q = y_t. At temperature 0
    nothing is random.

    Args:
        runner: its trajectories need K tokens past `max_tokens`; where drafts are sampled, its temperature must be the
            serving one.
        max_tokens: output tokens per prompt at which serving stops.
        greedy_drafts: drafts are argmax (temperature 0, or draft_sample_method greedy).
        seed: of the acceptance draws.
        chunk: windows per forward.

    Returns:
        Counts under vLLM's names. A draft that would reach past the end of the text is left out.
    """
    generator = torch.Generator().manual_seed(seed)
    length = runner.num_speculative_tokens
    per_position = [0] * length
    num_drafts = 0
    for row in range(len(runner.trajectories)):
        accepted = _accepted_at_every_start(runner, row, greedy_drafts, generator, chunk)
        first = 1  # output tokens before the first draft: the target's own
        while first - 1 < len(accepted) and first < max_tokens:
            kept = accepted[first - 1]
            num_drafts += 1
            for position in range(kept):
                per_position[position] += 1
            first += kept + 1
    return SpecDecodeCounts(num_drafts, num_drafts * length, sum(per_position), tuple(per_position))


def _accepted_at_every_start(
    runner: WindowRunner, row: int, greedy_drafts: bool, generator: torch.Generator, chunk: int
) -> list[int]:
    """k of the window at every start of one trajectory."""
    room = int(runner.trajectories.num_starts(runner.num_speculative_tokens)[row])
    starts = runner.trajectories.first_starts()[row] + torch.arange(
        room, device=runner.trajectories.lengths.device
    )
    accepted: list[int] = []
    for part in starts.split(chunk):
        windows = runner.path_windows(torch.full_like(part, row), part)
        if greedy_drafts:
            kept = greedy_accepted_length(windows.draft_logits.argmax(-1), windows.tokens)
        else:
            draft_logps = token_logps(windows.draft_logits, windows.tokens)
            target_logps = token_logps(windows.target_logits, windows.tokens)
            uniforms = torch.rand(draft_logps.shape, generator=generator).to(draft_logps.device)
            # The other way round than in a rollout: given y, not given the draft.
            ratio = acceptance_ratio(draft_logps, target_logps)
            kept = sampled_accepted_length(ratio, uniforms)
        accepted += kept.tolist()
    return accepted
