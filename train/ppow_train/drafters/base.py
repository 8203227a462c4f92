"""What a drafter must be able to do, and the chain that all kinds share.

A window at position n is drafted as a chain: the prefix's last slot predicts the first token, then each drafted
token is fed back. `ChainDrafter` runs that chain with or without gradient from three primitives that a kind supplies.
Tokens are
target ids; logits are over the draft vocabulary (vocabulary.py), D = V unless a head reduces it. Left out: the kinds
themselves, verification.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch

from ppow_train.packing import chain_mask, gather_slots, window_slots
from ppow_train.types import Encoded, Trajectories
from ppow_train.vocabulary import FULL_VOCABULARY, DraftVocabulary


class Drafter(Protocol):
    """One kind of drafter.

    Attributes:
        drafter_type: as recorded in the adapter.
        model: the PreTrainedModel that LoRA is injected into (in place).
        lora_targets: names of the linear layers to adapt by default.
        has_own_output: whether its output layer is no other module's, so that it can be adapted too.
        tap_layers: residual streams of the target that it reads, or ().
        vocab_size: V, tokens of the target's vocabulary that it reads.
        vocabulary: the D of them that it drafts, D of its logits.
    """

    model: Any
    lora_targets: list[str]
    has_own_output: bool
    vocabulary: DraftVocabulary

    @property
    def drafter_type(self) -> Literal["eagle3", "causal_lm"]: ...

    @property
    def tap_layers(self) -> tuple[int, ...]: ...

    @property
    def vocab_size(self) -> int: ...

    def check_length(self, length: int) -> None:
        """Raise UserError if it cannot draft behind trajectories of so many tokens."""
        ...

    def encode(
        self,
        trajectories: Trajectories,
        target: Encoded | None,
        starts: torch.Tensor | None = None,
        path_length: int = 1,
    ) -> Encoded:
        """One causal pass over the trajectories.

        Args:
            target: what the target said of them; only a drafter with taps reads it.
            starts: int64 [B, W], the only windows that will be asked for; None where any may be.
            path_length: K where `path_logits` of these windows will be asked for.
        """
        ...

    def slot_logits(self, encoded: Encoded, slots: torch.Tensor) -> torch.Tensor:
        """First-token logits at given slots, int64 [B, M] -> [B, M, D]."""
        ...

    def score(self, encoded: Encoded, starts: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Logits along given windows, int64 [B, W], [B, W, K] -> [B, W, K, D], differentiable."""
        ...

    def path_logits(
        self, encoded: Encoded, trajectories: Trajectories, starts: torch.Tensor, num_speculative_tokens: int
    ) -> torch.Tensor:
        """Logits along the trajectories' own windows, int64 [B, W] -> [B, W, K, D], differentiable."""
        ...

    def sample(
        self,
        encoded: Encoded,
        starts: torch.Tensor,
        num_speculative_tokens: int,
        temperature: float,
        uniforms: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draft windows: tokens int64 [B, W, K] and their logits [B, W, K, D], without gradient.

        Args:
            uniforms: [B, W, K] in [0, 1), the randomness of each token; not read at temperature 0.
        """
        ...


def sample_columns(logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Inverse transform sampling: the first column at which the cumulated softmax exceeds u.

    One number per token, so that what a window draws does not depend on the rows it is batched with.

    Args:
        logits: [..., D].
        uniforms: [...] in [0, 1).

    Returns:
        int64 [...].
    """
    cumulated = logits.double().softmax(-1).cumsum(-1)  # in float32, sums over a large vocabulary would drift
    wanted = uniforms.double()[..., None] * cumulated[..., -1:]
    return torch.searchsorted(cumulated, wanted, right=True).squeeze(-1).clamp(max=logits.shape[-1] - 1)


class ChainDrafter(abc.ABC):
    """Drafting as a chain over a shared prefix, from `extend` and `head`.

    Subclasses supply `encode`, `extend` (one more token of every window) and `head` (hidden -> logits).
    """

    vocabulary: DraftVocabulary = FULL_VOCABULARY

    def check_length(self, length: int) -> None:  # noqa: B027  (most read any)
        """Raise UserError if it cannot draft behind trajectories of so many tokens."""

    @abc.abstractmethod
    def extend(
        self,
        encoded: Encoded,
        tokens: torch.Tensor,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """Feed one token per window: int64 [B, W], the hidden states that predicted them [B, W, H] -> [B, W, H]."""

    @abc.abstractmethod
    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [..., H] -> logits float32 [..., D]."""

    def slot_logits(self, encoded: Encoded, slots: torch.Tensor) -> torch.Tensor:
        """First-token logits at given slots, int64 [B, M] -> [B, M, D]."""
        return self.head(gather_slots(encoded.hidden, slots))

    def score(self, encoded: Encoded, starts: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Logits along given windows, int64 [B, W], [B, W, K] -> [B, W, K, D]."""
        return self._chain(encoded, starts, tokens.shape[-1], lambda step, logits: tokens[..., step])[1]

    def path_logits(
        self, encoded: Encoded, trajectories: Trajectories, starts: torch.Tensor, num_speculative_tokens: int
    ) -> torch.Tensor:
        """Logits along the trajectories' own windows, int64 [B, W] -> [B, W, K, D]."""
        slots = window_slots(starts, num_speculative_tokens)
        rows = torch.arange(len(starts), device=starts.device)[:, None, None]
        return self.score(encoded, starts, trajectories.input_ids[rows, slots])

    @torch.no_grad()
    def sample(
        self,
        encoded: Encoded,
        starts: torch.Tensor,
        num_speculative_tokens: int,
        temperature: float,
        uniforms: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draft windows at a temperature (0: argmax): tokens int64 [B, W, K], logits [B, W, K, D]."""

        def draw(step: int, logits: torch.Tensor) -> torch.Tensor:
            if temperature == 0:
                return self.vocabulary.to_target(logits.argmax(-1))
            if uniforms is None:
                raise ValueError("a temperature above 0 needs uniforms")
            return self.vocabulary.to_target(sample_columns(logits / temperature, uniforms[..., step]))

        return self._chain(encoded, starts, num_speculative_tokens, draw)

    def _chain(
        self,
        encoded: Encoded,
        starts: torch.Tensor,
        length: int,
        choose: Callable[[int, torch.Tensor], torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the chain; `choose(step, logits [B, W, D])` gives the token that is fed next."""
        anchors = starts - encoded.first_slot
        hidden = gather_slots(encoded.hidden, anchors)
        all_logits, all_tokens = [self.head(hidden)], []
        for step in range(1, length + 1):
            all_tokens.append(choose(step - 1, all_logits[-1]))
            if step == length:
                break
            mask = chain_mask(anchors, encoded.num_slots, step, encoded.hidden.dtype)
            hidden = self.extend(encoded, all_tokens[-1], hidden, anchors + step, mask)
            all_logits.append(self.head(hidden))
        encoded.crop()
        return torch.stack(all_tokens, dim=2), torch.stack(all_logits, dim=2)
