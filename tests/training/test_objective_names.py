"""Names of objectives and their weighted sums: normalised, or refused in one sentence."""

from __future__ import annotations

import re

import pytest
from test_bad_input import refused

from ppow_train.objectives.names import parse_objective, parts_of


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("cst:kl", "cst:kl_div"),
        ("  overlap+4*cst:tv ", "overlap + 4 * cst:tv"),
        ("cst:ce+cst:tv", "cst:ce + cst:tv"),
        ("4.0 * cst:tv + 1 * exact", "4 * cst:tv + exact"),
        ("1e+2 * exact + .25*cst:kl + cst:kl_div", "100 * exact + 1.25 * cst:kl_div"),
        ("1 * ppow", "ppow"),
    ],
)
def test_names_are_normalised(text, normalised):
    assert parse_objective(text) == normalised
    assert parse_objective(normalised) == normalised


def test_the_weights_of_a_sum():
    assert parts_of("overlap + 4 * cst:tv") == {"overlap": 1.0, "cst:tv": 4.0}
    assert parts_of("exact") == {"exact": 1.0}


@pytest.mark.parametrize("name", ["cst", "cst:", "cst:mse", "overlap:tv", "PPOW", ""])
def test_unknown_objectives(name):
    with refused("objective must be one of ppow, exact, overlap, drafts, cst:ce", f"got '{name}'"):
        parse_objective(name)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("overlap + exakt", ["objective must be one of", "got 'exakt' in 'overlap"]),
        ("overlap +", ["objective must be one of", "got ''"]),
        ("overlap - cst:tv", ["must be a sum like"]),
        ("cst:tv * 4", ["weight must be a number above 0", "'cst:tv'"]),
        ("-1 * overlap", ["weight must be a number above 0", "got '-1'"]),
        ("0 * overlap + cst:tv", ["weight must be a number above 0", "got '0'"]),
        ("inf * overlap", ["weight must be a number above 0", "got 'inf'"]),
        ("ppow + cst:tv", ["ppow drafts windows of its own", "ppow alone"]),
        ("2 * ppow", ["ppow drafts windows of its own"]),
    ],
)
def test_sums_that_are_none(text, parts):
    with refused(*(re.escape(part) for part in parts)):
        parse_objective(text)


def test_aliases_of_objectives():
    assert parse_objective("cst:kl") == "cst:kl_div"
    assert [parse_objective(name) for name in ("ppow", "exact", "cst:tv")] == ["ppow", "exact", "cst:tv"]
