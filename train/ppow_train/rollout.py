"""From trajectories to windows, to drafted windows, to verified ones: stations 2 to 4 of a window's life.

One object holds target, drafter and trajectories and answers in TRL's row order. A row is (trajectory, start); rows of
one trajectory are packed into one forward. Left out: rewards, losses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

from ppow_train.drafters.base import Drafter
from ppow_train.objectives import PathWindows
from ppow_train.packing import window_tokens
from ppow_train.target import Target
from ppow_train.target_cache import TargetCache
from ppow_train.types import Encoded, Rollout, Trajectories
from ppow_train.verification import (
    acceptance_ratio,
    greedy_accepted_length,
    sampled_accepted_length,
    token_logps,
)
from ppow_train.windowing import lost_tokens, token_acceptance, token_criticality, window_criticality

# of p or q while criticality is computed: 256 MiB in float32, whatever V and the trajectories
LOGITS_AT_ONCE = 2**26

_Result = TypeVar("_Result")


class Run(Protocol):
    """How the drafter's part of a computation is run: `at_once`, or `distributed.inside` a wrapped module."""

    def __call__(self, compute: Callable[[], _Result]) -> _Result:
        """Run it and return its result."""
        ...


def at_once(compute: Callable[[], _Result]) -> _Result:
    """Run it as it is."""
    return compute()


@dataclasses.dataclass(frozen=True)
class PackedRows:
    """N rows regrouped by trajectory, padded to W windows each.

    Attributes:
        ids: int64 [B], which trajectories occur, in ascending order.
        trajectories: these B trajectories.
        starts: int64 [B, W]; padding repeats the trajectory's first row.
        row, column: int64 [N], where each row went.
    """

    ids: torch.Tensor
    trajectories: Trajectories
    starts: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor

    def pack(self, values: torch.Tensor) -> torch.Tensor:
        """[N, ...] -> [B, W, ...]; padding repeats a row of the same trajectory."""
        packed = (
            values[self._first_rows()][:, None].expand(-1, self.starts.shape[1], *values.shape[1:]).clone()
        )
        packed[self.row, self.column] = values
        return packed

    def unpack(self, values: torch.Tensor) -> torch.Tensor:
        """[B, W, ...] -> [N, ...]."""
        return values[self.row, self.column]

    def _first_rows(self) -> torch.Tensor:
        first = torch.empty(len(self.starts), dtype=torch.long, device=self.row.device)
        at = (self.column == 0).nonzero().squeeze(-1)
        first[self.row[at]] = at
        return first


def pack_rows(trajectories: Trajectories, trajectory: torch.Tensor, start: torch.Tensor) -> PackedRows:
    """Group rows by trajectory: int64 [N], int64 [N] -> `PackedRows`."""
    ids, row = trajectory.unique(return_inverse=True)
    order = torch.argsort(row, stable=True)
    counts = torch.bincount(row, minlength=len(ids))
    begins = counts.cumsum(0) - counts
    column = torch.empty_like(row)
    column[order] = torch.arange(len(row), device=row.device) - begins.repeat_interleave(counts)
    starts = start[order[begins]][:, None].expand(-1, int(counts.max())).clone()
    starts[row, column] = start
    return PackedRows(ids, trajectories.select(ids), starts, row, column)


class WindowRunner:
    """Weighs, drafts, verifies and scores windows.

    Args:
        target, drafter: the pair; the drafter's model may have LoRA injected.
        trajectories: all training trajectories, on the device of the models.
        num_speculative_tokens: K.
        temperature: of p and q in training.
        greedy: verify against the target's greedy continuation (serving at temperature 0) instead of by sampling.
        cache: keeps the target's states along these trajectories; without it they are computed at every update.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        trajectories: Trajectories,
        num_speculative_tokens: int,
        temperature: float,
        greedy: bool = False,
        cache: TargetCache | None = None,
    ) -> None:
        self.target, self.drafter, self.trajectories, self.cache = target, drafter, trajectories, cache
        self.num_speculative_tokens, self.temperature, self.greedy = (
            num_speculative_tokens,
            temperature,
            greedy,
        )

    # ------------------------------------------------------------ station 2: windows

    @torch.no_grad()
    def criticality(self, chosen: Trajectories, kind: str = "divergence") -> torch.Tensor:
        """Criticality of the window at each offset from the first start, [B, S].

        q is the drafter's first-token prediction after every prefix of the trajectory: one pass, no chains. For a
        causal LM these are its windows; an EAGLE head, which feeds later tokens its own states, drafts them less well.

        Args:
            chosen: B trajectories.
            kind: `divergence` or `lost_tokens` (windowing.py).
        """
        target = self.target.encode(chosen)
        draft = self.drafter.encode(chosen, target)
        span = int((chosen.lengths - chosen.first_starts()).max())
        last = chosen.lengths[:, None] - 1
        position = torch.minimum(
            chosen.first_starts()[:, None] + torch.arange(span, device=last.device), last
        )
        at_once = max(1, LOGITS_AT_ONCE // (len(chosen) * self.target.vocab_size))
        values = []
        for part in position.split(at_once, dim=1):
            p = self.target.path_logits(target, part, 1)[:, :, 0] / self.temperature
            q = self.drafter.slot_logits(draft, part - draft.first_slot) / self.temperature
            if kind == "divergence":
                values.append(token_criticality(p, q, self.drafter.vocabulary))
            else:
                values.append(
                    token_acceptance(p, q, chosen.input_ids.gather(1, part), self.drafter.vocabulary)
                )
        of_windows = window_criticality if kind == "divergence" else lost_tokens
        return of_windows(torch.cat(values, dim=1), self.num_speculative_tokens)

    # ------------------------------------------------------------ stations 3 and 4: drafting, verification

    def draw_noise(self, rows: int, generator: torch.Generator) -> torch.Tensor:
        """All that is random about `rows` rollouts, float64 [rows, 2, K] in [0, 1): for drafting, for acceptance."""
        shape = (rows, 2, self.num_speculative_tokens)
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    @torch.no_grad()
    def roll_out(
        self, trajectory: torch.Tensor, start: torch.Tensor, noise: torch.Tensor, run: Run = at_once
    ) -> Rollout:
        """Draft and verify one window per row: int64 [N], int64 [N], `draw_noise` [N, 2, K] -> `Rollout`."""
        packed = pack_rows(self.trajectories, trajectory, start)
        target = self.target.encode(packed.trajectories)
        drafting, accepting = noise.to(start.device).unbind(1)
        tokens, draft_logits = run(
            lambda: self.drafter.sample(
                self.drafter.encode(packed.trajectories, target),
                packed.starts,
                self.num_speculative_tokens,
                self.temperature,
                packed.pack(drafting),
            )
        )
        draft_logps = token_logps(draft_logits / self.temperature, self.drafter.vocabulary.columns(tokens))
        target_logits = self.target.score(target, packed.starts, tokens) / self.temperature
        target_logps = token_logps(target_logits, tokens)
        own = window_tokens(packed.trajectories.input_ids, packed.starts, self.num_speculative_tokens)
        own_logits = (
            self.target.path_logits(target, packed.starts, self.num_speculative_tokens) / self.temperature
        )
        if self.greedy:
            accepted = greedy_accepted_length(tokens, own)
        else:
            ratio = acceptance_ratio(target_logps, draft_logps)
            accepted = sampled_accepted_length(ratio, packed.pack(accepting))
        divergence = token_logps(own_logits, own).sum(-1) - target_logps.sum(-1)
        fields = (tokens, draft_logps, target_logps, accepted, divergence)
        return Rollout(*(packed.unpack(field) for field in fields))

    # ------------------------------------------------------------ station 6: what the update differentiates

    def draft_logps(
        self, trajectory: torch.Tensor, start: torch.Tensor, tokens: torch.Tensor, run: Run = at_once
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability of drafted tokens and entropy of the drafter: int64 [N], [N], [N, K] -> [N, K] each."""
        packed = pack_rows(self.trajectories, trajectory, start)
        target = self._states(packed)
        logits = run(
            lambda: self.drafter.score(
                self.drafter.encode(packed.trajectories, target), packed.starts, packed.pack(tokens)
            )
        )
        logp = packed.unpack(logits / self.temperature).log_softmax(-1)
        entropy = -(logp.detach().exp() * logp.detach()).sum(-1)
        columns = self.drafter.vocabulary.columns(tokens)
        return logp.gather(-1, columns[..., None]).squeeze(-1), entropy

    def path_windows(self, trajectory: torch.Tensor, start: torch.Tensor, run: Run = at_once) -> PathWindows:
        """Both distributions along the target's own windows: int64 [N], int64 [N] -> N windows."""
        packed = pack_rows(self.trajectories, trajectory, start)
        target = self._states(packed)
        length, vocabulary = self.num_speculative_tokens, self.drafter.vocabulary
        tokens = window_tokens(packed.trajectories.input_ids, packed.starts, length)
        target_logits = self.target.path_logits(target, packed.starts, length) / self.temperature
        # At once: the full ones may be four times as many.
        target_logits = vocabulary.with_rest(target_logits)
        draft_logits = run(
            lambda: self.drafter.path_logits(
                self.drafter.encode(packed.trajectories, target), packed.trajectories, packed.starts, length
            )
        )
        return PathWindows(
            tokens=packed.unpack(vocabulary.columns(tokens)),
            target_logits=packed.unpack(target_logits),
            draft_logits=packed.unpack(vocabulary.with_empty_rest(draft_logits / self.temperature)),
            has_rest=vocabulary.is_reduced,
        )

    def _states(self, packed: PackedRows) -> Encoded:
        """The target's hidden states and taps: all that its path and the drafter read."""
        if self.cache is None:
            return self.target.encode(packed.trajectories)
        return self.cache.encoded(packed.ids, packed.trajectories.input_ids.shape[1])
