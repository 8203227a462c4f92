"""The GPU benchmark's models with random weights, and the step that trains with some of them, as far as a CPU goes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ppow_train.pair import load_pair

FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"
sys.path += [str(FOLDER), str(FOLDER / "gpu")]

import packed_speed  # noqa: E402
import random_models  # noqa: E402
import random_pair  # noqa: E402
import steps as gpu_steps  # noqa: E402


def plan(path: Path) -> gpu_steps.Plan:
    return gpu_steps.Plan(path, "cuda", False, (1, 2), (1,))


# ---------------------------------------------------------------- the random pair


def test_the_shape_is_qwen3_8bs_and_its_head_an_eagle3s():
    shapes = random_pair.head_shapes(random_pair.QWEN3_8B)
    assert shapes["fc"] == (4096, 3 * 4096)
    assert shapes["midlayer.self_attn.k_proj"] == (1024, 8192)
    assert sum(rows * columns for rows, columns in shapes.values()) == 399_507_456


def test_the_pair_is_merged_by_the_loaders_own_merge_and_built_once(tmp_path):
    from safetensors.torch import load_file

    from vllm_ppow.artifact import read_adapter
    from vllm_ppow.merge import Merger

    pair = random_pair.build(tmp_path, random_pair.TINY, 3)
    adapter = read_adapter(pair.adapter)
    merger = Merger(adapter)
    merger.check_base(pair.head)
    base = load_file(pair.head / "model.safetensors")
    merged = dict(merger.wrap((name, tensor.clone()) for name, tensor in base.items()))
    report = merger.assert_complete()
    assert report.num_merged == len(random_pair.head_shapes(random_pair.TINY))
    assert not merged["fc.weight"].equal(base["fc.weight"])

    stamp = (pair.head / "model.safetensors").stat().st_mtime_ns
    assert random_pair.build(tmp_path, random_pair.TINY, 3) == pair
    assert (pair.head / "model.safetensors").stat().st_mtime_ns == stamp


# ---------------------------------------------------------------- packed windows at real sizes


def test_real_sizes_are_qwen3s():
    target, causal_lm = random_models.REAL
    assert (target.hidden_size, causal_lm.hidden_size) == (2048, 1024)
    assert (
        (target.num_hidden_layers, target.vocab_size) == (causal_lm.num_hidden_layers, 151936) == (28, 151936)
    )


def test_random_models_are_pairs_that_train_and_are_written_once(tmp_path):
    models = random_models.build(tmp_path, *random_models.TINY)
    for drafter in (models.head, models.causal_lm):
        pair = load_pair(str(models.target), str(drafter))
        assert pair.drafter.drafter_type == drafter.name
        assert pair.target.vocab_size == pair.drafter.vocab_size == 2048
    stamp = (models.head / "model.safetensors").stat().st_mtime_ns
    (tmp_path / "causal_lm.tmp").mkdir()  # of a run that was killed
    shutil.rmtree(models.causal_lm)
    assert random_models.build(tmp_path, *random_models.TINY) == models
    assert (models.head / "model.safetensors").stat().st_mtime_ns == stamp
    assert (models.causal_lm / "model.safetensors").is_file()
    assert not list(tmp_path.glob("*.tmp"))


def test_packed_speed_is_asked_for_both_drafters_in_words_that_it_knows(tmp_path, monkeypatch):
    asked = []

    def run(command, check):
        given = packed_speed.main.make_context("packed_speed", command[2:]).params
        asked.append(given)
        given["output"].write_text('{"results": []}')
        return subprocess.CompletedProcess(command, 0)

    models = random_models.RandomModels(*(tmp_path / name for name in ("target", "eagle3", "causal_lm")))
    monkeypatch.setattr(random_models, "build", lambda *_: models)
    monkeypatch.setattr(gpu_steps.subprocess, "run", run)
    found = gpu_steps.packed_speed(plan(tmp_path))["packed_speed"]
    assert found == {"eagle3": {"results": []}, "causal_lm": {"results": []}}
    assert [one["drafters"] for one in asked] == [(str(models.head),), (str(models.causal_lm),)]
    for given in asked:
        assert (given["target"], given["device"]) == (str(models.target), "cuda")
        group = given["trajectories_per_step"] * given["num_generations"]
        assert all(windows % group == 0 for windows in given["windows_per_step"])


def test_packed_speed_that_fails_is_no_result(tmp_path, monkeypatch):
    models = random_models.RandomModels(*(tmp_path / name for name in ("target", "eagle3", "causal_lm")))
    monkeypatch.setattr(random_models, "build", lambda *_: models)
    monkeypatch.setattr(gpu_steps.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1))
    with pytest.raises(SystemExit, match="failed with eagle3"):
        gpu_steps.packed_speed(plan(tmp_path))
