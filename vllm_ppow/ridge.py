"""Weighted ridge regression with a least value for each coefficient: few features, few rows, no library to load.

Left out: what is regressed (step_cost.py). Pure Python, about ten microseconds for each row.
"""

from __future__ import annotations

from collections.abc import Sequence

# Of the weights of all rows together, for each coefficient.
_RIDGE = 1e-3


def ridge_from(
    least: Sequence[float], rows: Sequence[tuple[list[float], float, float]], prior: Sequence[float]
) -> list[float]:
    """Coefficients c >= least that minimise Σ weight · (features · c / seconds - 1)² + ridge · |c - prior|².

    Lower ones are set to the least. Features are scaled to their largest value over the rows, so that the ridge has no
    unit, and what one row cannot tell apart is shared out evenly.

    Args:
        least: of each coefficient, >= 0.
        rows: (features, seconds, weight) of each cell.
        prior: coefficients that the ridge draws to.
    """
    width = len(prior)
    scale = [max(row[0][i] / row[1] for row in rows) or 1.0 for i in range(width)]
    total = sum(row[2] for row in rows)
    start = [max(pair) for pair in zip(prior, least, strict=True)]
    active = list(range(width))
    while True:
        matrix = [[_RIDGE * total * (i == j) for j in active] for i in active]
        vector = [0.0] * len(active)
        for features, seconds, weight in rows:
            scaled = [features[i] / seconds / scale[i] for i in active]
            missing = 1.0 - sum(start[i] * features[i] for i in range(width)) / seconds
            for i, left in enumerate(scaled):
                vector[i] += weight * left * missing
                for j, right in enumerate(scaled):
                    matrix[i][j] += weight * left * right
        changes = _solve(matrix, vector)
        above = [(start[i] - least[i]) * scale[i] + change for i, change in zip(active, changes, strict=True)]
        worst = min(range(len(active)), key=above.__getitem__)
        if above[worst] >= 0 or len(active) == 1:
            break
        start[active[worst]] = least[active[worst]]
        del active[worst]
    coefficients = list(least)
    for i, value in zip(active, above, strict=True):
        coefficients[i] += max(0.0, value) / scale[i]
    return coefficients


def _solve(matrix: list[list[float]], vector: list[float]) -> list[float]:
    """Gaussian elimination of a positive definite system; the ridge keeps its pivots positive."""
    size = len(vector)
    rows = [[*row, value] for row, value in zip(matrix, vector, strict=True)]
    for i in range(size):
        for j in range(i + 1, size):
            factor = rows[j][i] / rows[i][i]
            for k in range(i, size + 1):
                rows[j][k] -= factor * rows[i][k]
    solved = [0.0] * size
    for i in reversed(range(size)):
        solved[i] = (rows[i][size] - sum(rows[i][k] * solved[k] for k in range(i + 1, size))) / rows[i][i]
    return solved
