"""The nearest non-decreasing sequence."""

from __future__ import annotations

from vllm_ppow.isotonic import isotonic


def test_violators_are_pooled_by_weight():
    assert isotonic([1.0, 3.0, 2.0, 4.0], [1, 1, 1, 1]) == [1.0, 2.5, 2.5, 4.0]
    assert isotonic([3.0, 0.0], [1, 2]) == [1.0, 1.0]
