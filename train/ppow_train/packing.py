"""Many windows in one forward: masks, positions and gathers over a shared prefix.

All W windows of a trajectory read the same prefix keys and values, computed once; a mask keeps them from reading each
other. This is what makes a window cheap. Left out: models.
"""

from __future__ import annotations

import torch


def _additive(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Boolean mask -> additive mask of the same shape: 0 where allowed, the dtype's minimum elsewhere."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(
        ~allowed, torch.finfo(dtype).min
    )


def _prefix(anchors: torch.Tensor, num_slots: int) -> torch.Tensor:
    """bool [B, W, S]: each window reads the slots up to and including its anchor."""
    return torch.arange(num_slots, device=anchors.device) <= anchors[..., None]


def chain_mask(anchors: torch.Tensor, num_slots: int, step: int, dtype: torch.dtype) -> torch.Tensor:
    """Mask of one chain step, when keys are [S prefix slots | W of step 1 | … | W of this step].

    Args:
        anchors: int64 [B, W], last prefix slot of each window.
        step: 1 for the first token after the prefix.

    Returns:
        additive [B, 1, W, S + step·W]: prefix up to the anchor, and the window's own chain.
    """
    windows = anchors.shape[1]
    own = torch.eye(windows, dtype=torch.bool, device=anchors.device).repeat(1, step)
    own = own.expand(len(anchors), -1, -1)
    return _additive(torch.cat([_prefix(anchors, num_slots), own], dim=-1)[:, None], dtype)


def block_mask(anchors: torch.Tensor, num_slots: int, length: int, dtype: torch.dtype) -> torch.Tensor:
    """Mask of all windows at once, when keys are [S prefix slots | window 1 | … | window W], `length` each.

    Args:
        anchors: int64 [B, W], last prefix slot of each window.
        length: tokens per window.

    Returns:
        additive [B, 1, W·length, S + W·length].
    """
    windows = anchors.shape[1]
    window = torch.arange(windows, device=anchors.device).repeat_interleave(length)
    step = torch.arange(length, device=anchors.device).repeat(windows)
    own = (window[:, None] == window) & (step <= step[:, None])
    prefix = _prefix(anchors, num_slots).repeat_interleave(length, dim=1)
    return _additive(torch.cat([prefix, own.expand(len(anchors), -1, -1)], dim=-1)[:, None], dtype)


def gather_slots(values: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Pick slots of a sequence.

    Args:
        values: [B, S, H].
        slots: int64 [B, ...] in 0..S−1.

    Returns:
        [B, ..., H].
    """
    rows = torch.arange(len(values), device=values.device).view(-1, *[1] * (slots.ndim - 1))
    return values[rows, slots]


def window_slots(starts: torch.Tensor, num_speculative_tokens: int) -> torch.Tensor:
    """Positions of each window's K tokens: int64 [B, W] -> [B, W, K]."""
    return starts[..., None] + torch.arange(num_speculative_tokens, device=starts.device)


def window_tokens(input_ids: torch.Tensor, starts: torch.Tensor, num_speculative_tokens: int) -> torch.Tensor:
    """The trajectory's own tokens in each window: [B, L], [B, W] -> int64 [B, W, K]."""
    slots = window_slots(starts, num_speculative_tokens)
    rows = torch.arange(len(input_ids), device=input_ids.device)[:, None, None]
    return input_ids[rows, slots]
