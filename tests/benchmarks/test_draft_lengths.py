"""The table of acceptance by draft length, from counts made up by hand."""

from __future__ import annotations

import math

import draft_lengths
import pytest

from vllm_ppow.metrics import SpecDecodeCounts

# Of four drafts of three tokens two were whole, one accepted one token, one none; of drafts of one token two in three.
COUNTS = {1: SpecDecodeCounts(6, 6, 4, (4, 0, 0)), 3: SpecDecodeCounts(4, 12, 7, (3, 2, 2))}


def test_rows_and_table():
    short, long = draft_lengths.compare(COUNTS)
    assert (short["accepted_per_draft"], long["accepted_per_draft"]) == (4 / 6, 7 / 4)
    assert short["standard_error"] == pytest.approx(math.sqrt((4 / 6) * (2 / 6) / 6))
    assert long["standard_error"] == pytest.approx(math.sqrt((19 / 4 - (7 / 4) ** 2) / 4))
    told = short["told_from"]["3"]
    assert told["first_positions"] == pytest.approx(1.75 / (10 / 6))
    assert told["accepted_by_length"] == pytest.approx((2.75 / 1.5) / (10 / 6))
    assert long["told_from"] == {}
    lines = draft_lengths.table([short, long]).splitlines()
    assert lines[2] == "| 1 | 6 | 0.667 ± 0.192 | 1.050 → 1.100 |"
    assert len({line.count("|") for line in lines}) == 1
