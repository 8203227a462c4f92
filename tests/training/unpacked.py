"""Windows one at a time, as anyone would run them without packing: the oracle of masks, positions and caches.

Every window is an ordinary sequence of batch 1: the prefix, cut where the window starts, and the window's tokens.
No mask is built and no cache is shared. Left out: everything of packing.py, causal.py and the drafters' chains.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache

from ppow_train.types import Trajectories


def causal_window(model: Any, prefix: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [K, V] of a causal LM along one window, from one plain forward."""
    ids = torch.cat([prefix, tokens[:-1]])[None]
    return model(input_ids=ids, use_cache=False).logits[0, len(prefix) - 1 :]


def eagle_window(head: Any, target: Any, prefix: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [K, V] of an EAGLE-3 head along one window, token by token through the head's own modules."""
    with torch.no_grad():
        states = target.model(input_ids=prefix[None], output_hidden_states=True).hidden_states
    taps = torch.cat([states[i] for i in target.tap_layers], dim=-1)[:, :-1]
    if head.fc_norm is not None:
        parts = taps.chunk(len(head.fc_norm), dim=-1)
        taps = torch.cat([norm(part) for norm, part in zip(head.fc_norm, parts, strict=True)], dim=-1)
    cache = DynamicCache()
    hidden = _step(head, prefix[None, 1:], head.fc(taps), 0, cache)[:, -1:]
    logits = [_logits(head, hidden)]
    for count, token in enumerate(tokens[:-1]):
        hidden = _step(head, token.view(1, 1), hidden, len(prefix) - 1 + count, cache)
        logits.append(_logits(head, hidden))
    return torch.cat(logits)


def _step(
    head: Any, ids: torch.Tensor, hidden: torch.Tensor, first_position: int, cache: DynamicCache
) -> torch.Tensor:
    positions = first_position + torch.arange(ids.shape[1])[None]
    states = torch.cat([head.embed_tokens(ids), hidden], dim=-1)
    rotary = head.rotary_emb(states, positions)
    for layer in head.layers:
        states = layer(
            states,
            attention_mask=None,  # causal over the prefix; everything before it for a single token
            position_ids=positions,
            past_key_values=cache,
            position_embeddings=rotary,
        )
    return head.norm(states) if head.config.norm_output else states


def _logits(head: Any, hidden: torch.Tensor) -> torch.Tensor:
    return head.lm_head(hidden[:, 0] if head.config.norm_output else head.norm(hidden[:, 0]))


def over_target_vocabulary(drafter: Any, logits: torch.Tensor) -> torch.Tensor:
    """A drafter's logits [..., D] among all of the target's tokens, −inf for those it cannot draft: [..., V]."""
    d2t = getattr(drafter.model, "d2t", None)
    if d2t is None:
        return logits
    full = logits.new_full((*logits.shape[:-1], drafter.model.embed_tokens.num_embeddings), float("-inf"))
    for draft_id, difference in enumerate(d2t.tolist()):
        full[..., draft_id + difference] = logits[..., draft_id]
    return full


def draft_windows(
    target: Any, drafter: Any, trajectories: Trajectories, starts: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """The drafter's logits [B, W, K, D] along windows, each on its own."""

    def one(prefix: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
        if drafter.drafter_type == "eagle3":
            return eagle_window(drafter.model, target, prefix, window)
        return causal_window(drafter.model, prefix, window)

    return _each(one, trajectories, starts, tokens)


def target_windows(
    target: Any, trajectories: Trajectories, starts: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """The target's logits [B, W, K, V] along windows, each on its own."""
    with torch.no_grad():
        return _each(
            lambda prefix, window: causal_window(target.model, prefix, window), trajectories, starts, tokens
        )


def _each(
    one: Callable[..., torch.Tensor], trajectories: Trajectories, starts: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    return torch.stack(
        [
            torch.stack([one(ids[:start], window) for start, window in zip(row, windows, strict=True)])
            for ids, row, windows in zip(trajectories.input_ids, starts, tokens, strict=True)
        ]
    )
