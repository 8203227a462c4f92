"""Rows of an update regrouped by trajectory, in parts of similar length: what is read together, and how far.

A row is (trajectory, start). Rows of one trajectory share its prefix, which is cut behind its last window; trajectories
of like length go into one part, so that little of it is padding. Left out: models; what is done with a part
(rollout.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ppow_train.types import Trajectories


@dataclasses.dataclass(frozen=True)
class PackedRows:
    """N rows regrouped by trajectory, padded to W windows each.

    Attributes:
        ids: int64 [B], which trajectories occur.
        trajectories: these B trajectories.
        starts: int64 [B, W]; padding repeats the trajectory's first row.
        rows: int64 [N], which rows these are of those that were to be packed.
        row, column: int64 [N], where each of them went.
    """

    ids: torch.Tensor
    trajectories: Trajectories
    starts: torch.Tensor
    rows: torch.Tensor
    row: torch.Tensor
    column: torch.Tensor

    def pack(self, values: torch.Tensor) -> torch.Tensor:
        """Of all rows that were to be packed, [M, ...] -> [B, W, ...]; padding repeats a row of the same trajectory."""
        own = values[self.rows]
        first = torch.empty(len(self.starts), dtype=torch.long, device=self.row.device)
        at = (self.column == 0).nonzero().squeeze(-1)
        first[self.row[at]] = at
        packed = own[first][:, None].expand(-1, self.starts.shape[1], *values.shape[1:]).clone()
        packed[self.row, self.column] = own
        return packed

    def distinct(self) -> tuple[PackedRows, torch.Tensor]:
        """Each start of a trajectory once, and the column of every window's start among them, int64 [B, W]."""
        row = torch.arange(len(self.starts), device=self.row.device)[:, None].expand_as(self.starts)
        pairs = torch.stack([row.flatten(), self.starts.flatten()])
        (row, start), which = pairs.unique(dim=1, return_inverse=True)
        starts, column = _columns(row, start, len(self.ids))
        every = torch.arange(len(row), device=row.device)
        distinct = dataclasses.replace(self, starts=starts, rows=every, row=row, column=column)
        return distinct, column[which].view_as(self.starts)


def pack_rows(trajectories: Trajectories, trajectory: torch.Tensor, start: torch.Tensor) -> PackedRows:
    """All rows together, trajectories whole and in ascending order: int64 [N], int64 [N] -> `PackedRows`."""
    ids, row = trajectory.unique(return_inverse=True)
    starts, column = _columns(row, start, len(ids))
    return PackedRows(
        ids, trajectories.select(ids), starts, torch.arange(len(row), device=row.device), row, column
    )


def pack_in_parts(
    trajectories: Trajectories, trajectory: torch.Tensor, start: torch.Tensor, length: int, positions: float
) -> list[PackedRows]:
    """Rows in parts by how far their trajectories are needed, each cut there.

    Args:
        trajectory, start: int64 [N].
        length: K; a window ends K positions after its start.
        positions: about as many of a part's prefixes together, or all of them in one part if inf.
    """
    ids, row = trajectory.unique(return_inverse=True)
    ends = torch.zeros_like(ids).scatter_reduce(0, row, start + length, "amax")
    count = min(len(ids), max(1, round(int(ends.sum()) / positions)))
    parts = []
    for chosen in ends.argsort(stable=True).tensor_split(count):
        place = torch.full_like(ids, -1)
        place[chosen] = torch.arange(len(chosen), device=ids.device)
        rows = (place[row] >= 0).nonzero().squeeze(-1)
        own = place[row[rows]]
        starts, column = _columns(own, start[rows], len(chosen))
        cut = trajectories.select(ids[chosen]).cut(ends[chosen])
        parts.append(PackedRows(ids[chosen], cut, starts, rows, own, column))
    return parts


def in_rows(parts: Sequence[PackedRows], values: Sequence[torch.Tensor]) -> torch.Tensor:
    """Of each part [B, W, ...] -> [N, ...], rows as they were before they were packed."""
    places, offset = [], 0
    for part in parts:
        places.append(offset + part.row * part.starts.shape[1] + part.column)
        offset += part.starts.numel()
    order = torch.cat([part.rows for part in parts]).argsort()
    place = torch.cat(places)[order]
    flat = [value.flatten(0, 1) for value in values]
    joined = flat[0] if len(flat) == 1 else torch.cat(flat)
    # Mostly they are in order and without padding: a copy of whole distributions is then saved.
    untouched = place.equal(torch.arange(len(joined), device=place.device))
    return joined if untouched else joined[place]


def _columns(row: torch.Tensor, start: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Starts [count, W] of rows in the order they come, and the column of each row."""
    order = torch.argsort(row, stable=True)
    counts = torch.bincount(row, minlength=count)
    begins = counts.cumsum(0) - counts
    column = torch.empty_like(row)
    column[order] = torch.arange(len(row), device=row.device) - begins.repeat_interleave(counts)
    starts = start[order[begins]][:, None].expand(-1, int(counts.max())).clone()
    starts[row, column] = start
    return starts, column
