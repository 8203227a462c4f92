"""A small causal language model with the target's tokenizer as drafter.

Left out: everything that `causal` already does for the target.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from ppow_train import causal
from ppow_train.drafters.base import ChainDrafter
from ppow_train.last_layer import read_slots
from ppow_train.loading import load_causal_lm
from ppow_train.lora_targets import default_targets
from ppow_train.types import Encoded, Trajectories

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CausalLMDrafter(ChainDrafter):
    """Any `…ForCausalLM` of transformers."""

    drafter_type: Literal["causal_lm"] = "causal_lm"
    has_own_output = False  # mostly tied to its embeddings
    tap_layers: tuple[int, ...] = ()

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.lora_targets = default_targets(model)

    @classmethod
    def load(cls, directory: Path, device: str, dtype: torch.dtype) -> CausalLMDrafter:
        """Load from a Hugging Face directory (safetensors only).

        Raises:
            UserError: how its logits come to be is not known.
        """
        model = load_causal_lm(directory, dtype, device)
        causal.check_head(model)
        return cls(model)

    @property
    def vocab_size(self) -> int:
        """V of the logits."""
        return self.model.get_output_embeddings().weight.shape[0]

    def check_length(self, length: int) -> None:
        """Raise UserError if windows cannot be drafted behind trajectories of so many tokens (`causal.check_span`)."""
        causal.check_span(self.model, length)

    def encode(
        self,
        trajectories: Trajectories,
        target: Encoded | None,
        starts: torch.Tensor | None = None,
        path_length: int = 1,
    ) -> Encoded:
        """One causal pass, no further than windows need it; what the target computed is not read."""
        if starts is None:
            return causal.encode(self.model, trajectories)
        first = starts - 1  # the slot that predicts the first token
        needed = trajectories.cut(first.amax(1) + path_length)
        read = read_slots(first, path_length, needed.input_ids.shape[1])
        return causal.encode(self.model, needed, read=read)

    def extend(
        self,
        encoded: Encoded,
        tokens: torch.Tensor,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """Feed one token per window; the hidden states that predicted them are not read."""
        return causal.extend(self.model, encoded, tokens, positions, mask)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states after the final norm -> logits."""
        return causal.head_logits(self.model, hidden)

    def score(self, encoded: Encoded, starts: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Logits along given windows in ONE forward: no step needs the one before it, unlike an EAGLE head's."""
        return causal.block_logits(self.model, encoded, starts, tokens)

    def path_logits(
        self, encoded: Encoded, trajectories: Trajectories, starts: torch.Tensor, num_speculative_tokens: int
    ) -> torch.Tensor:
        """Logits along the trajectories' own windows: the causal pass has computed them already."""
        return causal.path_logits(self.model, encoded, starts, num_speculative_tokens)
