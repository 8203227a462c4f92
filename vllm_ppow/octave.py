"""Batch sizes that are taken to be alike: within a factor of the square root of two of a power of two.

The most requests that a server takes at the same time tend to be a power of two. Under load their number is that and,
as some end, a little less: in the middle of an octave, not at its edge. Left out: what is kept for each. Pure Python.
"""

from __future__ import annotations

import functools
import math


@functools.lru_cache(maxsize=4096)  # asked for some dozens of times in every step
def octave(batch: int) -> int:
    """Number of the octave that a batch size (>= 1) is in: 1 is in 0, 2 in 1, 3 to 5 in 2, 23 to 45 in 5."""
    return round(math.log2(batch))
