"""An EAGLE-3 head of the `speculators` library as drafter.

The model class, its weights and key names are the library's own. Its `forward` cannot be used for windows: it returns
argmax tokens and a summed loss, no logits, and starts a chain at every position of a document, so sampled or off-path
windows cannot be fed. The chain of `ChainDrafter` is therefore run through the library's own modules (embed_tokens, fc,
layers, rotary_emb, norm, lm_head). Left out: the original EAGLE checkpoint format, reduced draft vocabularies.

Slot s reads the target's state at s and the token at s+1, and predicts the token at s+2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
from transformers import DynamicCache

from ppow_train.drafters.base import ChainDrafter
from ppow_train.errors import UserError
from ppow_train.types import Encoded, Trajectories
from vllm_ppow.artifact import model_weight_files


class Eagle3Drafter(ChainDrafter):
    """EAGLE-3 and EAGLE-3.1 heads in `speculators` format."""

    drafter_type: Literal["eagle3"] = "eagle3"

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
        if model.use_draft_vocab:
            raise UserError(
                f"The head drafts from a reduced vocabulary of {model.draft_vocab_size} tokens, which this version "
                "serves but does not train: use a head with the target's full vocabulary."
            )
        if model.sliding_window_indices:
            raise UserError(
                "The head uses sliding-window attention, which is not supported: use one without."
            )

    @classmethod
    def load(cls, directory: Path, device: str, dtype: torch.dtype) -> Eagle3Drafter:
        """Load a head saved by `speculators`, every tensor by its exact name.

        The library's `from_pretrained` is not used: it fetches the target that the head's config names (which its user
        may not have named), and fills tensors that are missing with the target's.

        Raises:
            UserError: tensors are missing, unknown or of another shape, or the taps are not recorded.
        """
        config = Eagle3SpeculatorConfig.from_pretrained(directory)
        config.transformer_layer_config._attn_implementation = (
            "sdpa"  # its default builds flex masks for its own forward
        )
        model = Eagle3DraftModel(config)
        _load_exactly(model, directory)
        if not config.eagle_aux_hidden_state_layer_ids:
            raise UserError(
                f"{directory}/config.json does not say which target layers the head reads: set "
                "eagle_aux_hidden_state_layer_ids, usually [2, n // 2, n - 3] for n target layers."
            )
        return cls(model.to(device=device, dtype=dtype))

    @property
    def tap_layers(self) -> tuple[int, ...]:
        """Residual streams of the target that the head reads."""
        return tuple(self.model.config.eagle_aux_hidden_state_layer_ids)

    @property
    def vocab_size(self) -> int:
        """V of the logits."""
        return int(self.model.draft_vocab_size)

    def encode(self, trajectories: Trajectories, target: Encoded) -> Encoded:
        """One causal pass over L−1 slots, reading the target's taps [B, L, T·H]."""
        if target.taps is None:
            raise ValueError("the target was encoded without tap_layers")
        fused = self._fuse(target.taps[:, :-1].to(self.model.fc.weight.dtype))
        batch, slots, _ = fused.shape
        positions = torch.arange(slots, device=fused.device).expand(batch, -1)
        allowed = torch.ones(slots, slots, dtype=torch.bool, device=fused.device).tril()
        mask = torch.zeros(allowed.shape, dtype=fused.dtype, device=fused.device)
        mask = mask.masked_fill(~allowed, torch.finfo(fused.dtype).min).expand(batch, 1, -1, -1)
        cache = DynamicCache()
        hidden = self._layers(trajectories.input_ids[:, 1:], fused, positions, mask, cache)
        return Encoded(hidden, cache, first_slot=2)

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
        mask: torch.Tensor,
        cache: DynamicCache,
    ) -> torch.Tensor:
        model = self.model
        states = torch.cat([model.embed_tokens(tokens).to(hidden.dtype), hidden], dim=-1)
        rotary = model.rotary_emb(states, positions)
        for layer in model.layers:
            states = layer(
                states,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                position_embeddings=rotary,
            )
        return model.norm(states) if model.config.norm_output else states


def _load_exactly(model: torch.nn.Module, directory: Path) -> None:
    """Copy a checkpoint into the model; what only training of the library reads (`verifier_*`) may be absent."""
    tensors = {
        name: tensor for file in model_weight_files(directory) for name, tensor in load_file(file).items()
    }
    expected = {name for name in model.state_dict() if not name.startswith("verifier_")}
    if missing := sorted(expected - set(tensors)):
        raise UserError(
            f"{directory} lacks the tensors {missing}: save the head again with save_pretrained()."
        )
    if unknown := sorted(set(tensors) - set(model.state_dict())):
        raise UserError(
            f"{directory} has the tensors {unknown}, which an EAGLE-3 head does not: check the key names."
        )
    try:
        model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise UserError(f"{directory} does not fit its own config.json: {error}") from error
