"""`ppow demo --engine-arg`: every engine that it starts gets what the user says; models and engines are stand-ins."""

from __future__ import annotations

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

    adapter = types.SimpleNamespace(directory=tmp_path)
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
