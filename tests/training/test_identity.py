"""The judge of greedy identity: a tie of the target's is told from an error, and the judge can say no."""

from __future__ import annotations

import math

import pytest
import torch

from ppow_train.identity import TIE_NATS, choices, compare, tie_nats


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
    assert error.errors == ("prompt 0 parts at token 2, decided by 9.000 nats, a tie up to 0.050",)


def test_many_ties_and_missing_tokens_do_not_hold():
    reference, gaps = [[1, 2]] * 3, [[0.0, 0.0]] * 3
    assert not compare(reference, gaps, [[5, 2]] * 3).holds
    assert compare([[1, 2]], [[9.0] * 2], [[1]]).errors == ("prompt 0 has 1 tokens, not 2",)
    with pytest.raises(ValueError, match="run the same prompts"):
        compare([[1]], [[0.0]], [])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("logit", [-40.0, 3.9, 6.0, 12.0, 16.0, 20.0, 40.0, 300.0])
def test_a_tie_is_two_steps_of_the_targets_dtype(dtype, logit):
    """The step is measured: the distance to the next number of the dtype, away from 0."""
    kind = getattr(torch, dtype)
    one = torch.tensor(logit).to(kind)
    step = (torch.nextafter(one, torch.tensor(math.copysign(math.inf, logit)).to(kind)) - one).abs().item()
    assert tie_nats(dtype, one.item()) == max(TIE_NATS, 2 * step)
    assert tie_nats("float32", logit) == TIE_NATS


@pytest.mark.parametrize("logit", [0.0, math.inf, -math.inf, math.nan])
def test_a_logit_without_magnitude_has_the_least_tolerance(logit):
    assert tie_nats("bfloat16", logit) == TIE_NATS


def test_a_difference_at_large_logits_is_a_tie_in_half_precision_only():
    """One step of bfloat16 at 40 is 0.25 nats, five times the tolerance of float32; three are an error in either."""
    one, three = [[40.25, 40.0], [9.0, 1.0]], [[40.75, 40.0], [9.0, 1.0]]
    reference, other = [[1, 2]] * 4, [[5, 2], *[[1, 2]] * 3]
    for logits, dtype, holds in (
        (one, "bfloat16", True),
        (one, "float32", False),
        (three, "bfloat16", False),
    ):
        gaps, limits = choices(logits, dtype)
        found = compare(reference, [gaps] * 4, other, [limits] * 4)
        assert (found.ties, found.holds) == (int(holds), holds)
    assert found.errors == ("prompt 0 parts at token 0, decided by 0.750 nats, a tie up to 0.500",)
