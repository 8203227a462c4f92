"""The nouns of training: trajectories, what the target says of them, windows, rollouts.

Frozen dataclasses with a shape on every tensor. B trajectories of at most L tokens, W windows on each, K draft tokens
per window, hidden size H, vocabulary V. Left out: behaviour.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class Trajectories:
    """Prompts with the target's own continuations, right-padded: what models read at once.

    Attributes:
        input_ids: int64 [B, L], prompt and continuation.
        prompt_lengths: int64 [B], tokens of the prompt.
        lengths: int64 [B], tokens of prompt and continuation.
    """

    input_ids: torch.Tensor
    prompt_lengths: torch.Tensor
    lengths: torch.Tensor

    def __len__(self) -> int:
        return len(self.input_ids)

    def select(self, rows: torch.Tensor) -> Trajectories:
        """The trajectories of the given rows, cut to the longest of them."""
        longest = int(self.lengths[rows].max())
        return Trajectories(self.input_ids[rows, :longest], self.prompt_lengths[rows], self.lengths[rows])

    def subset(self, rows: torch.Tensor) -> Trajectories:
        """The trajectories of the given rows, kept as these are: nothing is padded that was not."""
        return self.select(rows)

    def unpadded(self) -> Iterator[torch.Tensor]:
        """The ids of one trajectory after the other, int64 [lengths[i]], on the CPU."""
        for ids, length in zip(self.input_ids.cpu(), self.lengths.tolist(), strict=True):
            yield ids[:length]

    def digest(self) -> str:
        """Which trajectories these are, however they are padded: SHA-256 of ids and lengths."""
        digest = hashlib.sha256()
        for tensor in (*self.unpadded(), self.prompt_lengths, self.lengths):
            digest.update(tensor.cpu().numpy().tobytes())
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> Trajectories:
        """The same trajectories on another device."""
        return Trajectories(*(getattr(self, field.name).to(device) for field in dataclasses.fields(self)))

    def cut(self, ends: torch.Tensor) -> Trajectories:
        """The same trajectories, each up to a position, int64 [B], after which it is padding."""
        return Trajectories(self.input_ids[:, : int(ends.max())], self.prompt_lengths, ends)

    @property
    def num_continuation_tokens(self) -> int:
        """Tokens of the target in all of them, prompts left out."""
        return int((self.lengths - self.prompt_lengths).sum())

    @classmethod
    def join(cls, parts: Sequence[Trajectories]) -> FlatTrajectories:
        """All trajectories of the parts, in order."""
        flat = [FlatTrajectories.of(part) for part in parts]
        return FlatTrajectories(
            torch.cat([part.ids for part in flat]),
            torch.cat([part.prompt_lengths for part in flat]),
            torch.cat([part.lengths for part in flat]),
        )

    def same_as(self, other: Trajectories) -> bool:
        """Whether these are the same trajectories."""
        names = (field.name for field in dataclasses.fields(self))
        return all(getattr(self, name).equal(getattr(other, name)) for name in names)

    def first_starts(self) -> torch.Tensor:
        """First window start of each trajectory, int64 [B]: the target's own first token is already verified."""
        return self.prompt_lengths + 1

    def num_starts(self, num_speculative_tokens: int) -> torch.Tensor:
        """How many window starts leave room for a whole window, int64 [B] (0 where there is none)."""
        return (self.lengths - num_speculative_tokens - self.first_starts() + 1).clamp(min=0)


class FlatTrajectories(Trajectories):
    """Trajectories as a run keeps them: without padding and in main memory; what `select` picks is padded and moved.

    One long trajectory among many would make padding most of them, on every GPU.

    Attributes:
        ids: int32 [Σ lengths], one trajectory behind the other, in main memory wherever the lengths are.
        prompt_lengths, lengths: int64 [B], on the device that what is picked goes to.
    """

    ids: torch.Tensor
    _bounds: torch.Tensor  # int64 [B + 1], on the CPU: where each begins, and where the last one ends

    def __init__(
        self,
        ids: torch.Tensor,
        prompt_lengths: torch.Tensor,
        lengths: torch.Tensor,
        bounds: torch.Tensor | None = None,
    ) -> None:
        if bounds is None:
            bounds = torch.nn.functional.pad(lengths.cpu().cumsum(0), (1, 0))
        own = {"ids": ids, "prompt_lengths": prompt_lengths, "lengths": lengths, "_bounds": bounds}
        for name, value in own.items():
            object.__setattr__(self, name, value)  # frozen, like what it stands for

    @classmethod
    def of(cls, trajectories: Trajectories) -> FlatTrajectories:
        """The same trajectories without their padding."""
        if isinstance(trajectories, FlatTrajectories):
            return trajectories
        ids = torch.cat([ids.int() for ids in trajectories.unpadded()])
        return cls(ids, trajectories.prompt_lengths, trajectories.lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def input_ids(self) -> torch.Tensor:
        """int64 [B, L] of all of them, padded anew each time: for few trajectories only."""
        return self.select(torch.arange(len(self))).input_ids

    def select(self, rows: torch.Tensor) -> Trajectories:
        """The trajectories of the given rows, padded with 0 to the longest of them, on the device of the lengths."""
        padded = torch.nn.utils.rnn.pad_sequence(self._picked(rows), batch_first=True)
        return Trajectories(
            padded.to(self.lengths.device).long(), self.prompt_lengths[rows], self.lengths[rows]
        )

    def subset(self, rows: torch.Tensor) -> FlatTrajectories:
        """See `Trajectories.subset`."""
        return FlatTrajectories(torch.cat(self._picked(rows)), self.prompt_lengths[rows], self.lengths[rows])

    def unpadded(self) -> Iterator[torch.Tensor]:
        """See `Trajectories.unpadded`."""
        for ids in self._picked(torch.arange(len(self))):
            yield ids.long()

    def to(self, device: torch.device | str) -> FlatTrajectories:
        """The same trajectories; what is picked of them goes to another device."""
        prompt_lengths, lengths = self.prompt_lengths.to(device), self.lengths.to(device)
        return FlatTrajectories(self.ids, prompt_lengths, lengths, self._bounds)

    def _picked(self, rows: torch.Tensor) -> list[torch.Tensor]:
        at = rows.cpu()
        bounds = zip(self._bounds[at].tolist(), self._bounds[at + 1].tolist(), strict=True)
        return [self.ids[begin:end] for begin, end in bounds]


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a model is asked to read.

    Attributes:
        trajectories: B of them, all positions of which it reads.
        read: bool [B, L], slots whose hidden state will be looked at, or None for all.
    """

    trajectories: Trajectories
    read: torch.Tensor | None = None

    def covered_by(self, other: Reading) -> bool:
        """Whether an answer to the other one is an answer to this one."""
        if not self.trajectories.same_as(other.trajectories):
            return False
        return other.read is None or (self.read is not None and bool((other.read | ~self.read).all()))


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One causal pass of a model over trajectories: what windows are started from.

    Attributes:
        hidden: [B, S, H], one row per slot, before the language-model head; only what was to be read is right.
        cache: keys and values of the S slots; windows append to it and are cropped off again.
        first_slot: position n of a window minus the slot whose hidden state predicts its first token.
        taps: [B, L, T·H] intermediate states that an EAGLE head reads, or None.
    """

    hidden: torch.Tensor
    cache: Any
    first_slot: int
    taps: torch.Tensor | None = None

    @property
    def num_slots(self) -> int:
        """S, slots of the prefix."""
        return self.hidden.shape[1]

    def crop(self) -> None:
        """Drop from the cache what windows have appended."""
        appended = self.cache.get_seq_length() - self.num_slots
        if appended > 0:
            self.cache.crop(-appended)


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Windows drafted and verified once, N rows in TRL's order.

    Attributes:
        tokens: int64 [N, K], drafted.
        draft_logps: [N, K], log-probability of each drafted token under the drafter, at the training temperature.
        target_logps: [N, K], the same under the target, conditioned on the drafted prefix.
        num_accepted_tokens: int64 [N], k, bonus excluded.
        divergence: [N], Δ of the proximity reward, in nats.
    """

    tokens: torch.Tensor
    draft_logps: torch.Tensor
    target_logps: torch.Tensor
    num_accepted_tokens: torch.Tensor
    divergence: torch.Tensor

    @classmethod
    def join(cls, parts: Sequence[Rollout]) -> Rollout:
        """Rollouts of consecutive rows as one."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})
