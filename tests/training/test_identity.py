"""The judge of greedy identity: a tie of the target's is told from an error, and the judge can say no."""

from __future__ import annotations

import pytest

from ppow_train.identity import TIE_NATS, compare


def test_identical_outputs_hold():
    found = compare([[1, 2], [3, 4]], [[9.0, 9.0]] * 2, [[1, 2], [3, 4]])
    assert (found.identical, found.ties, found.errors, found.holds) == (2, 0, (), True)


def test_a_difference_holds_only_where_the_reference_was_a_tie():
    gaps = [[9.0, TIE_NATS / 2, 9.0]] + [[9.0] * 3] * 3
    reference = [[1, 2, 3]] * 4
    tie = compare(reference, gaps, [[1, 7, 8], *reference[1:]])
    assert (tie.identical, tie.ties, tie.holds) == (3, 1, True)
    error = compare(reference, gaps, [[1, 2, 8], *reference[1:]])
    assert not error.holds
    assert error.errors == ("prompt 0 parts at token 2, decided by 9.000 nats",)


def test_many_ties_and_missing_tokens_do_not_hold():
    reference, gaps = [[1, 2]] * 3, [[0.0, 0.0]] * 3
    assert not compare(reference, gaps, [[5, 2]] * 3).holds
    assert compare([[1, 2]], [[9.0] * 2], [[1]]).errors == ("prompt 0 has 1 tokens, not 2",)
    with pytest.raises(ValueError, match="run the same prompts"):
        compare([[1]], [[0.0]], [])
