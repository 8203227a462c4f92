"""Sequences that must not decrease, from values that were measured or counted and do: shared by who estimates them."""

from __future__ import annotations

from collections.abc import Sequence


def isotonic(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """The non-decreasing sequence nearest to `values` in weighted squares (pool adjacent violators)."""
    pools: list[tuple[float, float, int]] = []
    for new_value, new_weight in zip(values, weights, strict=True):
        value, weight, count = new_value, new_weight, 1
        while pools and pools[-1][0] > value:
            before, mass, number = pools.pop()
            value = (value * weight + before * mass) / (weight + mass)
            weight += mass
            count += number
        pools.append((value, weight, count))
    return [value for value, _, count in pools for _ in range(count)]
