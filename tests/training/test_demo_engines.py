"""`ppow demo` beside its models and engines, which are stand-ins: what engines get, what is refused, what is kept."""

from __future__ import annotations

import json
import types
from pathlib import Path

import pytest

from ppow_train import cli
from ppow_train.commands import demo
from ppow_train.errors import UserError

TINY = Path(__file__).parents[2] / "examples" / "tiny"


@pytest.fixture
def started(monkeypatch, tmp_path):
    """Options of the engines of both tables; the second ends the demo, which has nothing to show."""
    seen = []

    def run(adapter, base, options, work, arms, console):
        seen.append(options)
        if len(seen) == 2:
            raise UserError("enough")
        return []

    config = types.SimpleNamespace(training={"objective": "o"}, versions={})
    adapter = types.SimpleNamespace(directory=tmp_path, config=config)
    monkeypatch.setattr(demo, "_train", lambda *_: adapter)
    monkeypatch.setattr(demo, "_run", run)
    monkeypatch.setattr("ppow_train.tiny.costlier.make_costlier", lambda *_: None)
    monkeypatch.setattr("ppow_train.tiny.costlier.carry_over", lambda *_: tmp_path)
    monkeypatch.setattr("vllm_ppow.artifact.read_adapter", lambda _: adapter)
    return seen


def test_both_tables_engines_get_them(started, tmp_path, capsys):
    given = ["--engine-arg", "gpu_memory_utilization=0.3", "--engine-arg", "kv_cache_dtype=fp8"]
    assert cli.run(["demo", "--tiny", str(TINY), "--output", str(tmp_path / "out"), *given]) == 1
    assert "enough" in capsys.readouterr().err
    assert [options.more for options in started] == [
        {"gpu_memory_utilization": 0.3, "kv_cache_dtype": "fp8"}
    ] * 2
    assert [(options.max_num_seqs, options.dtype) for options in started] == [(8, "auto"), (1, "float32")]
    assert [Path(options.target).name for options in started] == ["target", "target"]
    assert started[0].target != started[1].target


def test_what_the_demo_sets_itself_is_wrong_usage(capsys):
    assert cli.run(["demo", "--engine-arg", "dtype=float16"]) == 2
    assert "dtype is set by this command and cannot be chosen here" in capsys.readouterr().err


def test_the_first_table_is_kept_where_the_second_fails(started, tmp_path):
    output = tmp_path / "out"
    assert cli.run(["demo", "--tiny", str(TINY), "--output", str(output)]) == 1
    assert len(started) == 2
    kept = json.loads((output / "demo.json").read_text())
    assert (kept["training"], kept["arms"]) == ({"objective": "o"}, [])


# ---------------------------------------------------------------- refused before the training


@pytest.fixture
def untrained(monkeypatch):
    monkeypatch.setattr(demo, "_train", lambda *_: pytest.fail("trained"))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--rounds", "0"),
        ("--prompts", "0"),
        ("--max-tokens", "1"),
        ("--costlier-layers", "-1"),
        ("--steps", "0"),
        ("--seed", "-1"),
        ("--objective", "cst:foo"),
    ],
)
def test_numbers_that_nothing_can_be_measured_with_are_wrong_usage(untrained, option, value, capsys):
    assert cli.run(["demo", "--tiny", str(TINY), option, value]) == 2
    shown = capsys.readouterr()
    assert option in shown.err
    assert shown.out == "", "the banner"


def test_a_costlier_target_of_fewer_layers_is_refused(untrained, capsys):
    assert cli.run(["demo", "--tiny", str(TINY), "--costlier-layers", "4"]) == 1
    told = capsys.readouterr().err
    assert "--costlier-layers must be 0 or at least the tiny target's 8, got 4" in told


@pytest.mark.parametrize("kept", ["eagle3", "target"])
def test_half_a_pair_is_refused(untrained, kept, tmp_path, capsys):
    (tmp_path / kept).mkdir()
    assert cli.run(["demo", "--tiny", str(tmp_path)]) == 1
    assert "does not hold the tiny pair" in capsys.readouterr().err


# ---------------------------------------------------------------- what it says


@pytest.mark.parametrize(
    ("base", "ours", "told"),
    [
        (1.0, 1.5, "1.00 -> 1.50 (+50.0 %)"),
        (0.0, 1.5, "0.00 -> 1.50 (–)"),
        (0.5, 0.0, "0.50 -> 0.00 (-100.0 %)"),
        (None, None, "– -> – (–)"),
    ],
)
def test_a_gain_over_nothing_is_none(base, ours, told):
    arms = [
        {"arm": arm, "temperature": t, "speed_over_base": {"median": 1.0}}
        | ({} if accepted is None else {"accepted_per_draft": accepted})
        for t in (1.0, 0.0)
        for arm, accepted in (("base drafter", base), ("adapter", ours))
    ]
    assert f"(o): {told} at temperature 1, {told} at temperature 0." in demo._meaning({"arms": arms}, "o")
