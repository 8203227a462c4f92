"""From trajectories to windows, to drafted windows, to verified ones: stations 2 to 4 of a window's life.

One object holds target, drafter and trajectories and answers in TRL's row order. A row is (trajectory, start); rows of
one trajectory are packed into one forward. Left out: rewards, losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

from ppow_train.drafters.base import Drafter
from ppow_train.last_layer import read_slots
from ppow_train.objectives.path_windows import PathWindows
from ppow_train.packed_rows import PackedRows, in_rows, pack_in_parts, pack_rows
from ppow_train.packing import window_tokens
from ppow_train.shapes import batches, tokens_at_once
from ppow_train.target import Target
from ppow_train.target_cache import TargetCache
from ppow_train.types import Encoded, Reading, Rollout, Trajectories
from ppow_train.verification import (
    acceptance_ratio,
    greedy_accepted_length,
    sampled_accepted_length,
    token_logps,
)
from ppow_train.windowing import lost_tokens, token_acceptance, token_criticality, window_criticality

# of p or q while criticality is computed: 256 MiB in float32, whatever V and the trajectories
LOGITS_AT_ONCE = 2**26
# Prefix positions of a part on the CPU, where what fits the caches is fastest and padding costs; a GPU rather reads
# all of an update's trajectories at once.
POSITIONS_AT_ONCE = 1536

_Result = TypeVar("_Result")


class Run(Protocol):
    """How the drafter's part of a computation is run: `at_once`, or `distributed.inside` a wrapped module."""

    def __call__(self, compute: Callable[[], _Result]) -> _Result:
        """Run it and return its result."""
        ...


def at_once(compute: Callable[[], _Result]) -> _Result:
    """Run it as it is."""
    return compute()


class WindowRunner:
    """Weighs, drafts, verifies and scores windows.

    Args:
        target, drafter: the pair; the drafter's model may have LoRA injected.
        trajectories: all training trajectories; what is picked of them is on the device of the models.
        num_speculative_tokens: K.
        temperature: of p and q in training.
        greedy: verify against the target's greedy continuation (serving at temperature 0) instead of by sampling.
        cache: keeps the target's states along these trajectories; without it they are computed at every update.
        plain: read all trajectories of a call whole and at once, and every hidden state: the oracle of what is saved.
        sampled_paths: with `greedy`, some trajectories are not the target's greedy ones, so that what it would have
            said is its argmax after each prefix, not their tokens.
        drafts: windows will be rolled out, not only read along the trajectories.

    Raises:
        UserError: `drafts`, and target or drafter cannot behind the longest trajectory.
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
        plain: bool = False,
        sampled_paths: bool = False,
        drafts: bool = False,
    ) -> None:
        self.target, self.drafter, self.trajectories, self.cache = target, drafter, trajectories, cache
        self.num_speculative_tokens, self.temperature, self.greedy = (
            num_speculative_tokens,
            temperature,
            greedy,
        )
        self.plain, self.sampled_paths = plain, sampled_paths
        if drafts:
            longest = int(trajectories.lengths.max())  # here, not at the update that happens to draw it
            target.check_length(longest)
            drafter.check_length(longest)

    # ------------------------------------------------------------ station 2: windows

    @torch.no_grad()
    def criticality(self, rows: torch.Tensor, kind: str = "divergence") -> torch.Tensor:
        """Criticality of the window at each offset from the first start, [B, S].

        q is the drafter's first-token prediction after every prefix of the trajectory: one pass, no chains. For a
        causal LM these are its windows; an EAGLE head, which feeds later tokens its own states, drafts them less well.

        Args:
            rows: int64 [B], trajectories; no more of them are read at once than `shapes.tokens_at_once` allows.
            kind: `divergence` or `lost_tokens` (windowing.py).
        """
        lengths = self.trajectories.lengths[rows].tolist()
        parts = [
            self._criticality(rows[part], kind) for part in batches(lengths, tokens_at_once(self.target))
        ]
        span = max(part.shape[1] for part in parts)
        return torch.cat([torch.nn.functional.pad(part, (0, span - part.shape[1])) for part in parts])

    def _criticality(self, rows: torch.Tensor, kind: str) -> torch.Tensor:
        """Of trajectories that are read at once."""
        chosen = self.trajectories.select(rows)
        if self.cache is None:
            target = self.target.encode(chosen)
        else:
            target = self.cache.encoded(rows, chosen.input_ids.shape[1])
        self.drafter.model.eval()  # no dropout, as in distributed.admit_computations
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
        parts = self._parts(trajectory, start)
        targets = self.target.encode_parts([self._reading(part) for part in parts])
        drafting, accepting = noise.to(start.device).unbind(1)
        # In one call, however many parts: processes that train together have unlike ones.
        drafts = run(lambda: [self._draft(*part, drafting) for part in zip(parts, targets, strict=True)])
        verified = [self._verify(*part, accepting) for part in zip(parts, targets, drafts, strict=True)]
        return Rollout(*(in_rows(parts, field) for field in zip(*verified, strict=True)))

    def _draft(
        self, packed: PackedRows, target: Encoded, uniforms: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and their log-probabilities under the drafter, [B, W, K] each."""
        tokens, logits = self.drafter.sample(
            self._encode(packed, target),
            packed.starts,
            self.num_speculative_tokens,
            self.temperature,
            packed.pack(uniforms),
        )
        return tokens, token_logps(self._tempered(logits), self.drafter.vocabulary.columns(tokens))

    def _verify(
        self,
        packed: PackedRows,
        target: Encoded,
        draft: tuple[torch.Tensor, torch.Tensor],
        uniforms: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """The fields of `Rollout` for a part's drafted windows, [B, W, ...]."""
        tokens, draft_logps = draft
        logits = self.target.score(target, packed.starts, tokens)
        # As far as drafts are accepted, their prefix is the greedy one; behind that nothing counts.
        greedy = logits.argmax(-1) if self.sampled_paths else None
        logits = self._tempered(logits)
        target_logps = token_logps(logits, tokens)
        if self.greedy:
            own = window_tokens(packed.trajectories.input_ids, packed.starts, self.num_speculative_tokens)
            accepted = greedy_accepted_length(tokens, own if greedy is None else greedy)
        else:
            ratio = acceptance_ratio(target_logps, draft_logps)
            accepted = sampled_accepted_length(ratio, packed.pack(uniforms))
        divergence = self._own_logps(packed, target) - target_logps.sum(-1)
        return tokens, draft_logps, target_logps, accepted, divergence

    def _own_logps(self, packed: PackedRows, target: Encoded) -> torch.Tensor:
        """The target's log-probability of its own window, [B, W]; windows of one start are looked at once."""
        distinct, column = packed.distinct()
        own = window_tokens(packed.trajectories.input_ids, distinct.starts, self.num_speculative_tokens)
        logits = self.target.path_logits(target, distinct.starts, self.num_speculative_tokens)
        return token_logps(self._tempered(logits), own).sum(-1).gather(1, column)

    # ------------------------------------------------------------ station 6: what the update differentiates

    def draft_logps(
        self, trajectory: torch.Tensor, start: torch.Tensor, tokens: torch.Tensor, run: Run = at_once
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability of drafted tokens and entropy of the drafter: int64 [N], [N], [N, K] -> [N, K] each."""
        parts = self._parts(trajectory, start)
        targets = self._states(parts) if self.drafter.tap_layers else [None] * len(parts)
        logits = run(
            lambda: [
                self.drafter.score(self._encode(part, target), part.starts, part.pack(tokens))
                for part, target in zip(parts, targets, strict=True)
            ]
        )
        logps, entropies = [], []
        for part, of_part in zip(parts, logits, strict=True):
            logp = self._tempered(of_part).log_softmax(-1)
            columns = self.drafter.vocabulary.columns(part.pack(tokens))
            logps.append(logp.gather(-1, columns[..., None]).squeeze(-1))
            entropies.append(-(logp.detach().exp() * logp.detach()).sum(-1))
        return in_rows(parts, logps), in_rows(parts, entropies)

    def path_windows(self, trajectory: torch.Tensor, start: torch.Tensor, run: Run = at_once) -> PathWindows:
        """Both distributions along the target's own windows: int64 [N], int64 [N] -> N windows."""
        parts = self._parts(trajectory, start)
        targets = self._states(parts)
        length, vocabulary = self.num_speculative_tokens, self.drafter.vocabulary
        # At once: the full ones may be four times as many.
        on_path = [self._target_on_path(part, target) for part, target in zip(parts, targets, strict=True)]
        draft_logits = run(
            lambda: [
                self.drafter.path_logits(
                    self._encode(part, target, length), part.trajectories, part.starts, length
                )
                for part, target in zip(parts, targets, strict=True)
            ]
        )
        tokens = [window_tokens(part.trajectories.input_ids, part.starts, length) for part in parts]
        return PathWindows(
            tokens=vocabulary.columns(in_rows(parts, tokens)),
            target_logits=in_rows(parts, [logits for logits, _ in on_path]),
            draft_logits=vocabulary.with_empty_rest(self._tempered(in_rows(parts, draft_logits))),
            has_rest=vocabulary.is_reduced,
            greedy_tokens=in_rows(parts, [own for _, own in on_path]) if self.sampled_paths else None,
        )

    def _target_on_path(self, packed: PackedRows, target: Encoded) -> tuple[torch.Tensor, torch.Tensor]:
        """Tempered logits along a part's own windows and what the target would say there, columns of the drafter."""
        logits = self.target.path_logits(target, packed.starts, self.num_speculative_tokens)
        vocabulary = self.drafter.vocabulary
        # Of all tokens: the one that stands for those that cannot be drafted has the chance of all of them.
        greedy = logits.argmax(-1) if self.sampled_paths else logits.new_empty(0, dtype=torch.long)
        return vocabulary.with_rest(self._tempered(logits)), vocabulary.columns(greedy)

    # ------------------------------------------------------------ what is read, and how far

    def _parts(self, trajectory: torch.Tensor, start: torch.Tensor) -> list[PackedRows]:
        """Rows as they are read together: in parts, or as criticality has had the target read them already."""
        whole = pack_rows(self.trajectories, trajectory, start)
        if self.plain or self.target.remembers([self._reading(whole)]):
            return [whole]
        positions = POSITIONS_AT_ONCE if start.device.type == "cpu" else math.inf
        return pack_in_parts(self.trajectories, trajectory, start, self.num_speculative_tokens, positions)

    def read_target(self, trajectory: torch.Tensor, start: torch.Tensor) -> None:
        """Let the target read what a rollout of these rows, int64 [N] each, would have it read: it is remembered."""
        self.target.encode_parts([self._reading(part) for part in self._parts(trajectory, start)])

    def _reading(self, packed: PackedRows) -> Reading:
        """What the target reads: of its hidden states those before the tokens of windows on its own path."""
        if self.plain:
            return Reading(packed.trajectories)
        slots = packed.trajectories.input_ids.shape[1]
        return Reading(packed.trajectories, read_slots(packed.starts - 1, self.num_speculative_tokens, slots))

    def _states(self, parts: list[PackedRows]) -> list[Encoded]:
        """The target's hidden states and taps: all that its path and the drafter read."""
        if self.cache is None:
            return self.target.encode_parts([self._reading(part) for part in parts])
        return [self.cache.encoded(part.ids, part.trajectories.input_ids.shape[1]) for part in parts]

    def _encode(self, packed: PackedRows, target: Encoded | None, path_length: int = 1) -> Encoded:
        """The drafter's pass over a part."""
        starts = None if self.plain else packed.starts
        return self.drafter.encode(packed.trajectories, target, starts, path_length)

    def _tempered(self, logits: torch.Tensor) -> torch.Tensor:
        return logits if self.temperature == 1 else logits / self.temperature
