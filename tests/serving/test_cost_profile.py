"""The cost profile: what is read off it, and its file. Left out: measuring one (tests/e2e/test_profile.py)."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from serving_profile import BATCHES, CONTEXTS, LENGTHS, PROFILE, draft, overhead, plain_adapter, target

from vllm_ppow import grid
from vllm_ppow.acceptance import AcceptanceEstimate
from vllm_ppow.artifact import read_adapter
from vllm_ppow.cost_profile import (
    COST_PROFILE_FILE,
    CostProfileError,
    read_cost_profile,
    read_profile_file,
    write_cost_profile,
)
from vllm_ppow.speedup import expected_speedup
from vllm_ppow.step_cost import StepCost
from vllm_ppow.window import DraftWindow

# ---------------------------------------------------------------- what is read off it


def step(context, batch, length):
    return target(context, batch, length) + draft(context, batch, length) + overhead(context, batch, length)


def test_measured_points_come_back():
    for context, batch, length in itertools.product(CONTEXTS, BATCHES, LENGTHS):
        assert PROFILE.step_seconds(batch, length, context) == pytest.approx(step(context, batch, length))


def test_between_and_beyond_the_points():
    between = (step(64, 4, 2) + step(64, 4, 4)) / 2
    assert PROFILE.step_seconds(4, 3, 64) == pytest.approx(between)
    last_slope = (step(64, 8, 2) - step(64, 4, 2)) / 4
    assert PROFILE.step_seconds(16, 2, 64) == pytest.approx(step(64, 8, 2) + 8 * last_slope)
    assert PROFILE.step_seconds(1, 1, 16) == PROFILE.step_seconds(1, 1, 64)
    mean = (PROFILE.step_seconds(4, 2, 64) + PROFILE.step_seconds(4, 2, 256)) / 2
    assert PROFILE.step_seconds(4, 2) == pytest.approx(mean)


def test_one_point_per_axis_is_enough():
    small = replace(
        PROFILE,
        context_lengths=(64,),
        batch_sizes=(4,),
        num_speculative_tokens=1,
        draft_lengths=(0, 1),
        target_step_seconds=(((0.01, 0.012),),),
        draft_seconds=(((0.0, 0.002),),),
        overhead_seconds=(((0.0, 0.0),),),
        acceptance_per_position=(),
    )
    assert small.step_seconds(32, 1) == pytest.approx(0.014)
    assert small.step_seconds(1, 2) == pytest.approx(0.018)
    assert small.draft_cost_ratio() == pytest.approx(0.2)


def test_steps_never_get_cheaper_however_noisy_the_figures():
    noise = random.Random(0)

    def shaken(values):
        return tuple(shaken(v) if isinstance(v, tuple) else v * noise.uniform(0.5, 1.5) for v in values)

    for _ in range(20):
        profile = replace(PROFILE, target_step_seconds=shaken(PROFILE.target_step_seconds))
        for name, size in (("batch", 12), ("num_draft_tokens", 6), ("context", 300)):
            point = {"batch": 3, "num_draft_tokens": 2, "context": 100}
            found = [profile.step_seconds(**point | {name: at}) for at in range(1, size)]
            assert all(a <= b + 1e-15 for a, b in itertools.pairwise(found)), name


RECORDED = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.mark.parametrize("run", ["turns-2026-11-27", "within-2026-11-27", "within-2026-11-27-quiet"])
def test_far_beyond_what_was_measured_steps_take_time_and_longer_drafts_more(run):
    """Profiles as measured, noise and all, at loads and contexts many times theirs: 32 requests, 256 tokens."""
    profile = read_profile_file(RECORDED / run / COST_PROFILE_FILE)
    for batch, context in itertools.product((1, 16, 48, 256), (257, 512, 2048, 131072)):
        by_length = [profile.step_seconds(batch, length, context) for length in range(11)]
        assert by_length[0] > 0
        assert by_length == sorted(by_length)
        assert by_length[0] >= profile.step_seconds(batch, 0, 256)


def test_beyond_the_longest_context_drafts_cost_what_they_do_there():
    rise = (step(256, 4, 0) - step(64, 4, 0)) / 192
    assert PROFILE.step_seconds(4, 0, 448) == pytest.approx(step(256, 4, 0) + 192 * rise, rel=0.05)
    for length in LENGTHS:
        more = PROFILE.step_seconds(4, length, 448) - PROFILE.step_seconds(4, 0, 448)
        assert more == pytest.approx(step(256, 4, length) - step(256, 4, 0))


def test_a_window_chooses_far_beyond_its_profile():
    profile = read_profile_file(RECORDED / "turns-2026-11-27" / COST_PROFILE_FILE)
    window = DraftWindow(list(range(11)), AcceptanceEstimate(10), StepCost(profile))
    assert 0 <= window.choose(48, 48 * 2048) <= 10


def test_monotone_keeps_order_and_mends_disorder():
    assert grid.monotone((1.0, 2.0, 4.0), 1) == (1.0, 2.0, 4.0)
    assert grid.monotone((1.0, 3.0, 2.0, 5.0), 1) == (1.0, 2.5, 2.5, 5.0)
    assert grid.monotone(((2.0, 1.0), (1.0, 2.0)), 2) == ((1.25, 1.25), (1.5, 2.0))


def test_draft_cost_ratio_is_the_slope_over_a_bare_target_step():
    assert PROFILE.draft_cost_ratio(context=64) == pytest.approx(0.1)
    assert PROFILE.draft_cost_ratio(8, 64) == pytest.approx(0.001 * 1.35 / target(64, 8, 0))
    falling = tuple(tuple(tuple(reversed(row)) for row in rows) for rows in PROFILE.draft_seconds)
    assert replace(PROFILE, draft_seconds=falling).draft_cost_ratio() == 0.0


def test_what_one_more_token_and_one_more_pass_take():
    slope = (target(64, 8, LENGTHS[-1]) - target(64, 8, 0)) / LENGTHS[-1]
    assert PROFILE.token_seconds(8, 64) == pytest.approx(slope / 8)
    assert PROFILE.pass_seconds(8, 64) == pytest.approx(0.001 * 1.35)
    falling = tuple(tuple(tuple(reversed(row)) for row in rows) for rows in PROFILE.target_step_seconds)
    assert replace(PROFILE, target_step_seconds=falling).token_seconds(8, 64) == 0.0


def test_most_tokens_per_second_are_those_of_the_best_length():
    by_length = [
        8 * (1 + sum(PROFILE.acceptance_per_position[:length])) / step(64, 8, length) for length in LENGTHS
    ]
    assert PROFILE.most_tokens_per_second(8, 64) == pytest.approx(max(by_length))
    without = replace(PROFILE, acceptance_per_position=())
    assert without.most_tokens_per_second(8, 64) == pytest.approx(8 / step(64, 8, 0))


def test_token_cost_ratio_makes_the_speedup_formula_say_what_was_measured():
    ratio = PROFILE.token_cost_ratio(4, 2, 64)
    by_hand = (1 + 0.8 + 0.6) * step(64, 4, 0) / step(64, 4, 2)
    assert expected_speedup(0.8 + 0.6, 2, ratio) == pytest.approx(by_hand)


def test_a_stale_profile_is_noticed():
    same = {"vllm_version": "0.32.0", "tensor_parallel_size": 1, "device": "a CPU", "dtype": None}
    assert PROFILE.differences(**same) == []
    assert PROFILE.differences(**same | {"vllm_version": "0.33.0", "tensor_parallel_size": 2}) == [
        "vllm_version 0.33.0, measured with 0.32.0",
        "tensor_parallel_size 2, measured with 1",
    ]
    (text,) = PROFILE.differences(adapter_fingerprint="sha256:" + "3" * 64)
    assert text == "adapter_fingerprint sha256:333333333333…, measured with sha256:222222222222…"


# ---------------------------------------------------------------- the file


def test_what_is_written_is_read(tmp_path):
    assert read_cost_profile(tmp_path) is None
    assert write_cost_profile(tmp_path, PROFILE) == tmp_path / COST_PROFILE_FILE
    assert read_cost_profile(tmp_path) == PROFILE
    assert [path.name for path in tmp_path.iterdir()] == [COST_PROFILE_FILE]


def test_it_is_no_part_of_the_adapter(tmp_path):
    adapter = plain_adapter(tmp_path / "a")
    write_cost_profile(adapter.directory, PROFILE)
    assert read_adapter(adapter.directory) == adapter
    assert read_cost_profile(adapter.directory) == PROFILE
    # What was measured with the old adapter does not stay beside a new one.
    plain_adapter(tmp_path / "a", 1.0)
    assert read_cost_profile(adapter.directory) is None


def test_a_failed_write_leaves_the_old_profile(tmp_path, monkeypatch):
    write_cost_profile(tmp_path, PROFILE)

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_cost_profile(tmp_path, replace(PROFILE, num_drafts=7))
    assert read_cost_profile(tmp_path) == PROFILE
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("text", ["", "{", "\xff", '{"format": 1'])
def test_a_broken_file_is_refused(tmp_path, text):
    (tmp_path / COST_PROFILE_FILE).write_text(text, encoding="latin-1")
    with pytest.raises(CostProfileError, match=r"is not readable JSON .*measure again with `ppow profile`"):
        read_cost_profile(tmp_path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(CostProfileError, match="does not exist: measure one"):
        read_profile_file(tmp_path / "p.json")


@pytest.mark.parametrize("value", [[], 3, {}, {"format": 2}, {"format": "1"}])
def test_another_format_is_refused(tmp_path, value):
    (tmp_path / "p.json").write_text(json.dumps(value))
    with pytest.raises(CostProfileError, match=r"has format .*, this version reads 1"):
        read_profile_file(tmp_path / "p.json")


NAN_GRID = [[[float("nan")] * 4] * 3] * 2
BAD = [
    ("batch_sizes", [4, 1, 8], "increasing whole numbers >= 1"),
    ("batch_sizes", [], "increasing whole numbers >= 1"),
    ("batch_sizes", [0, 1, 2], "increasing whole numbers >= 1"),
    ("context_lengths", [64, 64], "increasing whole numbers >= 1"),
    ("context_lengths", [64, True], "increasing whole numbers >= 1"),
    ("draft_lengths", [1, 2, 3, 4], "from 0 to num_speculative_tokens"),
    ("draft_lengths", [0, 1, 2, 5], "from 0 to num_speculative_tokens"),
    ("num_speculative_tokens", 0, "a whole number >= 1"),
    ("tensor_parallel_size", 1.0, "a whole number >= 1"),
    ("target_step_seconds", [[[0.1] * 4] * 3], "numbers of seconds >= 0"),
    ("target_step_seconds", NAN_GRID, "numbers of seconds >= 0"),
    ("target_step_seconds", [[[0] * 4] * 3] * 2, "above 0 everywhere"),
    ("draft_seconds", [[[-0.1] * 4] * 3] * 2, "numbers of seconds >= 0"),
    ("overhead_seconds", [[["0.1"] * 4] * 3] * 2, "numbers of seconds >= 0"),
    ("overhead_seconds", 0.1, "numbers of seconds >= 0"),
    ("acceptance_per_position", [0.5, 1.5], "numbers from 0 to 1"),
    ("acceptance_per_position", [0.5, 0.6], "unconditional, so never rising"),
    ("num_drafts", -1, "a whole number >= 0"),
    ("device", 1, "text"),
    ("enforce_eager", 0, "true or false"),
    ("full_graphs", "yes", "true or false"),
    ("kv_cache_dtype", None, "text"),
    ("quantization", None, "text"),
]


@pytest.mark.parametrize(("key", "value", "wanted"), BAD)
def test_a_value_out_of_range_is_refused(tmp_path, key, value, wanted):
    path = tmp_path / COST_PROFILE_FILE
    path.write_text(json.dumps(asdict(PROFILE) | {key: value}))
    with pytest.raises(CostProfileError, match=wanted) as caught:
        read_cost_profile(tmp_path)
    assert str(path) in str(caught.value)
    assert key in str(caught.value)


def test_missing_and_unknown_keys_are_refused(tmp_path):
    value = asdict(PROFILE) | {"speed": 3}
    del value["device"]
    (tmp_path / "p.json").write_text(json.dumps(value))
    with pytest.raises(CostProfileError, match=r"\(device, speed\)"):
        read_profile_file(tmp_path / "p.json")
