"""Windows on a Hugging Face causal language model: one prefix pass, then chains or blocks that share its cache.

The target is scored with this and the causal LM drafter is built on it. Left out: sampling, losses, EAGLE heads.
"""

from __future__ import annotations

import torch
from transformers import DynamicCache, PreTrainedModel

from ppow_train.errors import UserError
from ppow_train.last_layer import feed_forward_at
from ppow_train.packing import block_mask, gather_slots
from ppow_train.types import Encoded, Trajectories


def encode(
    model: PreTrainedModel,
    trajectories: Trajectories,
    tap_layers: tuple[int, ...] = (),
    read: torch.Tensor | None = None,
) -> Encoded:
    """Run a model over trajectories and keep its cache.

    Args:
        model: a `…ForCausalLM`.
        tap_layers: residual streams to keep for an EAGLE head; i means after i layers, before the final norm.
        read: bool [B, L], slots whose hidden state will be read, or None for all; keys, values and taps are of all.

    Returns:
        `Encoded` with S = L slots; slot n−1 predicts position n.
    """
    _check_attention(model, trajectories.input_ids.shape[1])
    # Given the config it would drop what sliding attention has passed, which packed windows still read.
    cache = DynamicCache()
    with feed_forward_at(_last_layer(model), read):
        output = model.base_model(
            input_ids=trajectories.input_ids,
            past_key_values=cache,
            use_cache=True,
            output_hidden_states=bool(tap_layers),
        )
    taps = torch.cat([output.hidden_states[i] for i in tap_layers], dim=-1) if tap_layers else None
    return Encoded(output.last_hidden_state, output.past_key_values, first_slot=1, taps=taps)


def _last_layer(model: PreTrainedModel) -> torch.nn.Module:
    """The last one under the name that most models of transformers give their layers; else the model, as it is."""
    layers = getattr(model.base_model, "layers", None)
    return model.base_model if layers is None else layers[-1]


def _check_attention(model: PreTrainedModel, length: int) -> None:
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if other := sorted(kinds - {"full_attention", "sliding_attention"}):
        raise UserError(
            f"{model.config.name_or_path} has layers of kind {', '.join(other)}, whose state windows cannot share: "
            "use a model with attention in every layer."
        )
    span = getattr(config, "sliding_window", None) if kinds != {"full_attention"} else None
    if span is not None and length > span:
        raise UserError(
            f"{model.config.name_or_path} attends to {span} tokens at a time, the trajectories have {length}: shorten "
            "the prompts or lower --max-new-tokens."
        )


def extend(
    model: PreTrainedModel,
    encoded: Encoded,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    """Append Q tokens to the cache: int64 [B, Q] each, additive mask [B, 1, Q, keys] -> hidden [B, Q, H]."""
    output = model.base_model(
        input_ids=tokens,
        position_ids=positions,
        attention_mask=mask,
        past_key_values=encoded.cache,
        use_cache=True,
    )
    return output.last_hidden_state


def path_logits(
    model: PreTrainedModel, encoded: Encoded, starts: torch.Tensor, num_speculative_tokens: int
) -> torch.Tensor:
    """What the model says of the trajectory's own windows: int64 [B, W] -> logits [B, W, K, V]; only the head runs."""
    offsets = torch.arange(num_speculative_tokens, device=starts.device)
    slots = starts[..., None] - encoded.first_slot + offsets
    return model.get_output_embeddings()(gather_slots(encoded.hidden, slots)).float()


def block_logits(
    model: PreTrainedModel, encoded: Encoded, starts: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """What the model says along drafted windows, all of them in one forward.

    Args:
        starts: int64 [B, W].
        tokens: int64 [B, W, K], drafted; logits i condition on the prefix and tokens before i.

    Returns:
        logits [B, W, K, V]. The cache is as before.
    """
    batch, windows, length = tokens.shape
    anchors = starts - encoded.first_slot
    hidden = gather_slots(encoded.hidden, anchors)[:, :, None]
    if length > 1:
        fed = tokens[:, :, :-1].reshape(batch, -1)
        positions = (starts[..., None] + torch.arange(length - 1, device=starts.device)).reshape(batch, -1)
        mask = block_mask(anchors, encoded.num_slots, length - 1, encoded.hidden.dtype)
        rest = extend(model, encoded, fed, positions, mask).view(batch, windows, length - 1, -1)
        encoded.crop()
        hidden = torch.cat([hidden, rest], dim=2)
    return model.get_output_embeddings()(hidden).float()
