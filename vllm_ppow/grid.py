"""Measured values on a grid of axes: made monotone where noise broke the order, and interpolated linearly.

Pure Python, for a handful of points per axis. Left out: what the axes mean (cost_profile.py).
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

Grid = tuple[Any, ...]  # nested tuples of floats, one level per axis


def monotone(grid: Grid, num_axes: int) -> Grid:
    """The grid with every value raised or lowered until it does not fall along any axis (ours).

    Along one axis, x_i becomes (max_{j<=i} x_j + min_{j>=i} x_j) / 2, which leaves what is in order as it is. Maximum
    and minimum keep the order along the other axes, so that one axis after the other suffices.
    """
    for axis in range(num_axes):
        grid = _monotone_along(grid, axis)
    return grid


def _monotone_along(grid: Grid, axis: int) -> Grid:
    if axis > 0:
        return tuple(_monotone_along(part, axis - 1) for part in grid)
    highest = list(itertools.accumulate(grid, lambda a, b: _merge(max, a, b)))
    lowest = list(itertools.accumulate(reversed(grid), lambda a, b: _merge(min, a, b)))[::-1]
    return tuple(_merge(lambda a, b: (a + b) / 2, *pair) for pair in zip(highest, lowest, strict=True))


def add(*grids: Grid) -> Grid:
    """Sum of grids of one shape, point by point."""
    total = grids[0]
    for grid in grids[1:]:
        total = _merge(lambda a, b: a + b, total, grid)
    return total


def _merge(combine: Any, a: Any, b: Any) -> Any:
    """`combine` of two numbers, or of two grids of one shape, point by point."""
    if isinstance(a, tuple):
        return tuple(_merge(combine, x, y) for x, y in zip(a, b, strict=True))
    return combine(a, b)


def interpolate(axes: Sequence[Sequence[int]], grid: Grid, point: Sequence[float]) -> float:
    """The grid's value at a point: linear between neighbours, axis by axis.

    Beyond the last value of an axis the last slope goes on, unless it falls: a fall is noise, and carried on it would
    end below zero. Before the first value the first stands.

    Args:
        axes: increasing coordinates of each axis, outermost first.
        grid: values, nested one level per axis.
        point: one coordinate per axis.
    """
    if not axes:
        return float(grid)  # type: ignore[arg-type]  # the innermost level holds plain floats
    places, at = axes[0], point[0]

    def value(index: int) -> float:
        return interpolate(axes[1:], grid[index], point[1:])

    if len(places) == 1 or at <= places[0]:
        return value(0)
    above = min(bisect_right(places, at), len(places) - 1)
    below = above - 1
    share = (at - places[below]) / (places[above] - places[below])
    low = value(below)
    rise = value(above) - low
    return low + share * (max(0.0, rise) if share > 1 else rise)


def slope(places: Sequence[float], values: Sequence[float]) -> float:
    """Slope of the least-squares line through at least two points."""
    mean_x, mean_y = sum(places) / len(places), sum(values) / len(values)
    spread = sum((x - mean_x) ** 2 for x in places)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(places, values, strict=True)) / spread
