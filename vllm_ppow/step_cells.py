"""Step times that were seen, in cells of one draft length and similar batch sizes, and what each says beyond a base.

A cell keeps its last few times; the lower quartile of them counts, since pauses only add. What it says beyond the base
is a shift (log scale) that step_cost.py sets; between cells of one batch size shifts are interpolated over the draft
length. Left out: the base, and what a cell is weighed against (step_cost.py). Pure Python, microseconds.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections import deque
from collections.abc import Iterator, Sequence

# Step times of a cell that are remembered.
CELL_MEMORY = 41
# An observation is worth half after that many further ones: cells long unseen yield to the base.
HALF_LIFE = 4000
# A cell that is worth less than this many observations is forgotten.
FORGOTTEN = 0.01


class Cell:
    """Step times of one draft length at similar batch sizes.

    Attributes:
        seconds: the last of them.
        batch, context: means of their steps.
        median, typical: of the times; the latter is their lower quartile.
        shift: log of what it says over what the base does.
        features: of the base, at its batch, length and context.
        seen_at: number of the last observation that was its own.
    """

    def __init__(self) -> None:
        self.seconds: deque[float] = deque(maxlen=CELL_MEMORY)
        self.batch = self.context = self.median = self.typical = self.shift = 0.0
        self.features: list[float] = []
        self.seen_at = 0

    def add(self, seconds: float, batch: int, context: float, now: int) -> None:
        """Remember one step's time."""
        self.seconds.append(seconds)
        rate = 1.0 / len(self.seconds)
        self.batch += rate * (batch - self.batch)
        self.context += rate * (context - self.context)
        ascending = sorted(self.seconds)
        self.median = ascending[len(ascending) // 2]
        self.typical = ascending[(len(ascending) - 1) // 4]
        self.seen_at = now

    def weight(self, now: int) -> float:
        """Observations that it is worth now."""
        return len(self.seconds) * 0.5 ** ((now - self.seen_at) / HALF_LIFE)


class Cells:
    """All cells of an engine, by bucket of batch sizes and draft length."""

    def __init__(self) -> None:
        self._rows: dict[int, dict[int, Cell]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._rows.values()))

    def __iter__(self) -> Iterator[tuple[int, Cell]]:
        """(draft length, cell) of each."""
        for row in self._rows.values():
            yield from row.items()

    def at(self, bucket: int, length: int) -> Cell:
        """The cell of a bucket and draft length; a new one where there was none."""
        row = self._rows.setdefault(bucket, {})
        if length not in row:
            row[length] = Cell()
        return row[length]

    def forget(self, now: int) -> None:
        """Drop those that are worth nothing any more."""
        kept = {
            bucket: {length: cell for length, cell in row.items() if cell.weight(now) >= FORGOTTEN}
            for bucket, row in self._rows.items()
        }
        self._rows = {bucket: row for bucket, row in kept.items() if row}

    def shifts(self, bucket: int, lengths: Sequence[int]) -> list[float]:
        """Shift at each draft length: its cell's, or interpolated between those seen at this bucket, or 0."""
        row = self._rows.get(bucket)
        if not row:
            return [0.0] * len(lengths)
        seen = sorted(row)
        return [row[length].shift if length in row else _between(row, seen, length) for length in lengths]


def _between(row: dict[int, Cell], seen: Sequence[int], length: int) -> float:
    """The shift at a draft length that was not seen, from the nearest that were (ascending)."""
    at = bisect(seen, length)
    if at in (0, len(seen)):
        return row[seen[max(0, at - 1)]].shift
    below, above = seen[at - 1], seen[at]
    share = (length - below) / (above - below)
    return row[below].shift + share * (row[above].shift - row[below].shift)


def bucket(batch: int) -> int:
    """Number of the bucket of a batch size (>= 1): each its own up to 8, then four to the octave."""
    return batch if batch <= 8 else 8 + round(4 * math.log2(batch / 8))
