"""The last layer's feed-forward part at the slots that are read, and nowhere else.

After the last layer nothing attends any more: of its hidden states only those count that are read, while its keys and
values, which windows attend to, are computed before its feed-forward part. In a head of one layer that part is more
than half of the prefix, in a drafter of two layers a third. Left out: which slots are read (causal.py, drafters/);
attention itself, which transformers computes for a whole sequence.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


def read_slots(first: torch.Tensor, count: int, num_slots: int) -> torch.Tensor:
    """Which slots are read: int64 [B, W] first ones of `count` in a row each -> bool [B, num_slots]."""
    slots = first[..., None] + torch.arange(count, device=first.device)
    read = torch.zeros(len(first), num_slots, dtype=torch.bool, device=first.device)
    return read.scatter_(1, slots.flatten(1), True)


@contextlib.contextmanager
def feed_forward_at(layer: torch.nn.Module, read: torch.Tensor | None) -> Iterator[None]:
    """Within this context the layer's `mlp` is computed where `read`, bool [B, S], is true; it is 0 elsewhere.

    A layer that does not name its feed-forward part `mlp`, as transformers' do, is left as it is; so is one whose part
    returns more than hidden states (some mixtures of experts).
    """
    module: Any = getattr(layer, "mlp", None)
    if read is None or module is None:
        yield
        return
    whole, instance = module.forward, module.__dict__.get("forward")
    at = read.nonzero(as_tuple=True)

    def forward(hidden: torch.Tensor) -> Any:
        values = whole(hidden[at][None])
        if not isinstance(values, torch.Tensor):
            return whole(hidden)
        # In the dtype of what it computed: autocast gives another than it was given.
        return torch.zeros_like(hidden, dtype=values.dtype).index_put(at, values[0])

    module.forward = forward
    try:
        yield
    finally:
        if instance is None:
            del module.forward
        else:
            module.forward = instance
