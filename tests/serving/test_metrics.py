"""Acceptance counts: read from vLLM's metric objects, subtracted, divided once."""

from __future__ import annotations

import math

import pytest

from vllm_ppow.metrics import SpecDecodeCounts

P = "vllm:spec_decode_num_"


def snapshot(drafts, drafted, accepted, per_pos, engine="0"):
    from vllm.v1.metrics.reader import Counter, Gauge, Vector

    labels = {"engine": engine}
    return [
        Gauge("vllm:kv_cache_usage_perc", labels, 0.5),
        Counter(P + "drafts", labels, drafts),
        Counter(P + "draft_tokens", labels, drafted),
        Counter(P + "accepted_tokens", labels, accepted),
        Vector(P + "accepted_tokens_per_pos", labels, per_pos),
    ]


def test_counts_and_their_quotients():
    counts = SpecDecodeCounts.from_metrics(snapshot(10, 30, 12, [7, 4, 1]))
    assert counts == SpecDecodeCounts(10, 30, 12, (7, 4, 1))
    assert counts.mean_accepted == pytest.approx(1.2)
    assert counts.acceptance_length == pytest.approx(2.2)
    assert counts.acceptance_rate == pytest.approx(0.4)
    assert counts.acceptance_per_position == pytest.approx((0.7, 0.4, 0.1))
    assert sum(counts.acceptance_per_position) == pytest.approx(counts.mean_accepted)


def test_difference_of_two_moments():
    before = SpecDecodeCounts.from_metrics(snapshot(10, 30, 12, [7, 4, 1]))
    after = SpecDecodeCounts.from_metrics(snapshot(16, 48, 20, [12, 6, 2]))
    assert after - before == SpecDecodeCounts(6, 18, 8, (5, 2, 1))
    assert SpecDecodeCounts(1, 3, 0, (0, 0, 0)) - SpecDecodeCounts(0, 0, 0, ()) == SpecDecodeCounts(
        1, 3, 0, (0, 0, 0)
    )


def test_engines_are_summed():
    both = snapshot(1, 3, 2, [1, 1, 0]) + snapshot(2, 6, 1, [1, 0, 0], engine="1")
    assert SpecDecodeCounts.from_metrics(both) == SpecDecodeCounts(3, 9, 3, (2, 1, 0))


def test_nothing_drafted_is_nan_not_zero():
    nothing = SpecDecodeCounts(0, 0, 0, (0, 0))
    assert math.isnan(nothing.acceptance_length)
    assert math.isnan(nothing.acceptance_rate)
    assert all(math.isnan(share) for share in nothing.acceptance_per_position)


def test_no_counters_says_how_to_get_them():
    with pytest.raises(ValueError, match="disable_log_stats=False"):
        SpecDecodeCounts.from_metrics(snapshot(1, 3, 2, [1, 1, 0])[:1])
