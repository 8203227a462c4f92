"""Octaves of batch sizes: a load that is a power of two at most stays in one."""

from __future__ import annotations

import pytest

from vllm_ppow.octave import octave


@pytest.mark.parametrize("power", range(10))
def test_a_power_of_two_is_in_the_middle_of_its_own(power):
    most = 2**power
    assert octave(most) == power
    assert {octave(batch) for batch in range(most - most // 4, most + most // 4 + 1)} == {power}


def test_they_ascend_and_leave_none_out():
    found = [octave(batch) for batch in range(1, 1000)]
    assert found == sorted(found)
    assert set(found) == set(range(11))
