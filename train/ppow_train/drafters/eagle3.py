"""An EAGLE-3 head of the `speculators` library as drafter.

The model class, its weights and key names are the library's own. Its `forward` cannot be used for windows: it returns
argmax tokens and a summed loss, no logits, and starts a chain at every position of a document, so sampled or off-path
windows cannot be fed. The chain of `ChainDrafter` is therefore run through the library's own modules (embed_tokens, fc,
layers, rotary_emb, norm, lm_head). Left out: how a head is read from disk (eagle3_checkpoint.py).

Slot s reads the target's state at s and the token at s+1, and predicts the token at s+2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from transformers import DynamicCache

from ppow_train.drafters.base import ChainDrafter
from ppow_train.drafters.eagle3_checkpoint import read_head
from ppow_train.errors import UserError
from ppow_train.last_layer import feed_forward_at, read_slots
from ppow_train.types import Encoded, Trajectories
from ppow_train.vocabulary import FULL_VOCABULARY, reduced_vocabulary

_FIRST_SLOT = 2  # of a window at n: slot n−2 predicts the token at n


class Eagle3Drafter(ChainDrafter):
    """EAGLE-3 and EAGLE-3.1 heads, with the target's full vocabulary or a part of it."""

    drafter_type: Literal["eagle3"] = "eagle3"
    has_own_output = True  # a checkpoint without it is refused

    def __init__(self, model: Any) -> None:
        self.model = model
        self.lora_targets = [
            "fc",
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        ]
        if model.sliding_window_indices:
            raise UserError(
                "The head uses sliding-window attention, which is not supported: use one without."
            )
        self.vocabulary = FULL_VOCABULARY
        if model.use_draft_vocab:
            target_ids = torch.arange(model.draft_vocab_size, device=model.d2t.device) + model.d2t
            self.vocabulary = reduced_vocabulary(target_ids, model.verifier_vocab_size)

    @classmethod
    def load(
        cls, directory: Path, device: str, dtype: torch.dtype, target: Path | None = None
    ) -> Eagle3Drafter:
        """Load a head in either format (see `read_head`)."""
        return cls(read_head(directory, target).to(device=device, dtype=dtype))

    @property
    def tap_layers(self) -> tuple[int, ...]:
        """Residual streams of the target that the head reads."""
        return tuple(self.model.config.eagle_aux_hidden_state_layer_ids)

    @property
    def vocab_size(self) -> int:
        """V, tokens of the target's vocabulary that it reads."""
        return int(self.model.verifier_vocab_size)

    def encode(
        self,
        trajectories: Trajectories,
        target: Encoded | None,
        starts: torch.Tensor | None = None,
        path_length: int = 1,
    ) -> Encoded:
        """One causal pass over L−1 slots, or up to the last window's, reading the target's taps [B, L, T·H].

        Windows are chains of their own, along the path too: of the pass only the slot before each of them is read.
        """
        if target is None or target.taps is None:
            raise ValueError("the target was encoded without tap_layers")
        last = trajectories.input_ids.shape[1] if starts is None else int(starts.max())
        fused = self._fuse(target.taps[:, : last - 1].to(self.model.fc.weight.dtype))
        batch, slots, _ = fused.shape
        positions = torch.arange(slots, device=fused.device).expand(batch, -1)
        cache = DynamicCache()
        read = None if starts is None else read_slots(starts - _FIRST_SLOT, 1, slots)
        with feed_forward_at(self.model.layers[-1], read):
            hidden = self._layers(trajectories.input_ids[:, 1:last], fused, positions, None, cache)
        return Encoded(hidden, cache, first_slot=_FIRST_SLOT)

    def extend(
        self,
        encoded: Encoded,
        tokens: torch.Tensor,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """Feed one token per window together with the head's own state that predicted it."""
        return self._layers(tokens, hidden, positions, mask, encoded.cache)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states -> logits; with `norm_output` (EAGLE-3.1) they are normalised already."""
        model = self.model
        return model.lm_head(hidden if model.config.norm_output else model.norm(hidden)).float()

    def _fuse(self, taps: torch.Tensor) -> torch.Tensor:
        model = self.model
        if model.input_norm is not None:
            taps = model.input_norm(taps)
        if model.fc_norm is not None:
            chunks = taps.chunk(len(model.fc_norm), dim=-1)
            taps = torch.cat([norm(chunk) for norm, chunk in zip(model.fc_norm, chunks, strict=True)], dim=-1)
        return model.fc(taps)

    def _layers(
        self,
        tokens: torch.Tensor,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | None,
        cache: DynamicCache,
    ) -> torch.Tensor:
        model = self.model
        states = torch.cat([model.embed_tokens(tokens).to(hidden.dtype), hidden], dim=-1)
        rotary = model.rotary_emb(states, positions)
        for layer in model.layers:
            states = layer(
                states,
                attention_mask=mask,  # without one attention is causal
                position_ids=positions,
                past_key_values=cache,
                position_embeddings=rotary,
            )
        return model.norm(states) if model.config.norm_output else states
