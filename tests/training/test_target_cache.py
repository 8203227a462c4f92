"""What the target thinks along the trajectories is kept as it was, found again, and refused where it has no room."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file
from test_bad_input import refused
from training_lives import curve, train_into
from training_pair import VOCAB, Directories, K, load

from ppow_train import target_cache
from ppow_train.errors import UserError
from ppow_train.memory import estimate_memory
from ppow_train.options import PPOWOptions
from ppow_train.rollout import WindowRunner
from ppow_train.target import Target
from ppow_train.target_cache import (
    AUTO_BYTES,
    DiskCache,
    MemoryCache,
    TargetCache,
    cache_bytes,
    open_cache,
    resolve_kind,
)
from ppow_train.trainer import PPOWTrainer
from ppow_train.types import Trajectories

KINDS = ("divergence", "lost_tokens")
TOLERANCE = {"atol": 2e-5, "rtol": 1e-4}  # batches of other sizes round differently
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def trajectories() -> Trajectories:
    """More than the target reads at once, of unequal lengths."""
    generator = torch.Generator().manual_seed(6)
    lengths = torch.randint(14, 25, (20,), generator=generator)
    return Trajectories(torch.randint(1, VOCAB, (20, 24), generator=generator), torch.full((20,), 3), lengths)


@pytest.fixture(params=["eagle3", "causal_lm"])
def target(request, directories: Directories) -> Target:
    """With taps and without."""
    return load(directories, request.param).target


def assert_alike(cache: TargetCache, other: TargetCache, trajectories: Trajectories) -> None:
    rows = torch.tensor([19, 0, 7])
    length = int(trajectories.lengths[rows].max())
    one, two = cache.encoded(rows, length), other.encoded(rows, length)
    assert one.hidden.equal(two.hidden)
    assert one.taps is two.taps is None or one.taps.equal(two.taps)


def no_target(*args: object) -> None:
    pytest.fail("the target was asked again")


# ---------------------------------------------------------------- the same states


def test_kept_states_are_the_targets_own(target, trajectories, tmp_path):
    memory = MemoryCache(target, trajectories)
    assert_alike(memory, DiskCache(target, trajectories, tmp_path, "sha256:0"), trajectories)
    rows = torch.tensor([4, 17, 2])
    chosen = trajectories.select(rows)
    fresh, kept = target.encode(chosen), memory.encoded(rows, chosen.input_ids.shape[1])
    assert kept.hidden.shape == fresh.hidden.shape
    for row, length in enumerate(chosen.lengths.tolist()):
        torch.testing.assert_close(kept.hidden[row, :length], fresh.hidden[row, :length], **TOLERANCE)
        if fresh.taps is not None:
            torch.testing.assert_close(kept.taps[row, :length], fresh.taps[row, :length], **TOLERANCE)


def test_windows_read_them_without_asking_the_target(runner, trajectories, monkeypatch):
    fresh = WindowRunner(runner.target, runner.drafter, trajectories, K, 0.7)
    kept = WindowRunner(
        runner.target, runner.drafter, trajectories, K, 0.7, cache=MemoryCache(runner.target, trajectories)
    )
    rows = torch.tensor([19, 0, 7, 0]), torch.tensor([5, 8, 6, 4])
    criticality = [fresh.criticality(torch.arange(20), kind) for kind in KINDS]
    wanted = fresh.path_windows(*rows)
    monkeypatch.setattr(Target, "encode_parts", no_target)
    for of_kind, kind in zip(criticality, KINDS, strict=True):
        torch.testing.assert_close(kept.criticality(torch.arange(20), kind), of_kind, atol=1e-4, rtol=1e-3)
    seen = kept.path_windows(*rows)
    torch.testing.assert_close(seen.target_logits, wanted.target_logits, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(seen.draft_logits, wanted.draft_logits, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("kind", ["eagle3", "causal_lm"])
def test_training_with_a_cache_is_training_without(kind, directories, trajectories, tmp_path, monkeypatch):
    """And with it no update asks the target for its states."""
    adapters, losses, asked, updating = [], [], [], []
    encode_parts, step = Target.encode_parts, PPOWTrainer.training_step

    def watched(self: Target, parts):
        asked.extend(updating)
        return encode_parts(self, parts)

    def marked(self: PPOWTrainer, *args, **options):
        updating.append("update")
        try:
            return step(self, *args, **options)
        finally:
            updating.clear()

    monkeypatch.setattr(Target, "encode_parts", watched)
    monkeypatch.setattr(PPOWTrainer, "training_step", marked)
    for where in ("none", "memory", "disk"):
        (tmp_path / where).mkdir()
        train_into(
            tmp_path / where, directories, trajectories, kind=kind, target_cache=where,
            save_strategy="no", max_steps=4, cache=tmp_path / "cache",
        )  # fmt: skip
        assert bool(asked) == (where == "none"), where
        asked.clear()
        adapters.append(load_file(tmp_path / where / "adapter" / "adapter_model.safetensors"))
        losses.append(torch.tensor(curve(tmp_path / where)))
    assert [path.name[:7] for path in (tmp_path / "cache").iterdir()] == ["target-"]
    for adapter, loss in zip(adapters[1:], losses[1:], strict=True):
        torch.testing.assert_close(loss, losses[0], atol=1e-5, rtol=1e-3)
        for name, tensor in adapters[0].items():
            torch.testing.assert_close(adapter[name], tensor, atol=3e-4, rtol=0)


# ---------------------------------------------------------------- on disk


def test_what_is_on_disk_is_found_again(target, trajectories, tmp_path, monkeypatch):
    first = DiskCache(target, trajectories, tmp_path, "sha256:0")
    other = DiskCache(target, trajectories, tmp_path, "sha256:1")
    changed = Trajectories(trajectories.input_ids + 1, trajectories.prompt_lengths, trajectories.lengths)
    third = DiskCache(target, changed, tmp_path, "sha256:0")
    with monkeypatch.context() as edited:
        edited.setitem(target.model.config.rope_parameters, "rope_theta", 5e5)
        fourth = DiskCache(target, trajectories, tmp_path, "sha256:0")
    assert len({cache.directory for cache in (first, other, third, fourth)}) == 4
    monkeypatch.setattr(Target, "encode", no_target)
    assert_alike(first, DiskCache(target, trajectories, tmp_path, "sha256:0"), trajectories)


def test_of_two_that_want_it_one_asks_the_target(target, trajectories, tmp_path, monkeypatch):
    encode, asking = Target.encode, set()

    def slow(self: Target, chosen: Trajectories):
        asking.add(threading.get_ident())
        time.sleep(0.3)
        return encode(self, chosen)

    monkeypatch.setattr(Target, "encode", slow)
    opened = []
    threads = [
        threading.Thread(target=lambda: opened.append(DiskCache(target, trajectories, tmp_path, "sha256:0")))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(asking) == 1
    assert len(opened) == 2, "the other waited and found it"
    assert [path.name[:7] for path in tmp_path.iterdir()] == ["target-"]


def test_what_was_half_written_is_not_taken(target, trajectories, tmp_path, monkeypatch):
    monkeypatch.setattr(target_cache, "_SHARD", 8)
    encode = Target.encode
    with monkeypatch.context() as broken:
        broken.setattr(
            Target,
            "encode",
            lambda self, chosen: encode(self, chosen) if len(chosen) == target_cache._BATCH else 1 / 0,
        )
        with pytest.raises(ZeroDivisionError):
            DiskCache(target, trajectories, tmp_path, "sha256:0")
    assert list(tmp_path.iterdir()) == []
    young, old, foreign = (
        tmp_path / name
        for name in (".target-0123456789abcdef.kill9", ".target-0123456789abcdef.yesterday", ".cache.old")
    )
    for left in (young, old, foreign):  # what a kill leaves, and what is not ours
        left.mkdir()
    for left in (old, foreign):
        os.utime(left, (time.time() - 90_000,) * 2)
    cache = DiskCache(target, trajectories, tmp_path, "sha256:0")
    assert [path.name for path in sorted(cache.directory.iterdir())] == [
        f"states-{index:05}.safetensors" for index in range(3)
    ]
    assert_alike(MemoryCache(target, trajectories), cache, trajectories)
    assert (young.exists(), old.exists(), foreign.exists()) == (True, False, True)


def test_the_estimate_is_what_is_written(target, trajectories, tmp_path):
    cache = DiskCache(target, trajectories, tmp_path, "sha256:0")
    written = sum(file.stat().st_size for file in cache.directory.iterdir())
    assert written == pytest.approx(cache_bytes(target, trajectories), rel=0.05)


# ---------------------------------------------------------------- the choice


def test_what_auto_comes_to(target, trajectories, monkeypatch):
    assert resolve_kind(target, trajectories, PPOWOptions()) == "memory"
    assert resolve_kind(target, trajectories, PPOWOptions(objective="ppow")) == "none"
    assert resolve_kind(target, trajectories, PPOWOptions(target_cache="disk")) == "disk"
    monkeypatch.setattr(target_cache, "cache_bytes", lambda *_: AUTO_BYTES + 1)
    assert resolve_kind(target, trajectories, PPOWOptions()) == "none"


@pytest.mark.parametrize(
    ("where", "parts"),
    [("disk", ["0.00 GiB free", "another --cache", "--target-cache none"]),
     ("memory", ["0.00 GiB are free", "--target-cache disk, or none"])],
)  # fmt: skip
def test_no_room_is_told_before_anything_is_read(
    where, parts, target, trajectories, tmp_path, progress, monkeypatch
):
    monkeypatch.setattr(Target, "encode", no_target)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1, 1, 1000))
    monkeypatch.setattr(target_cache, "available_bytes", lambda device: 1000)
    with refused("target's states take", *parts):
        open_cache(target, trajectories, PPOWOptions(target_cache=where), tmp_path, "sha256:0", progress)


def test_disk_needs_a_directory(target, trajectories, progress):
    with pytest.raises(UserError, match="disk needs a directory"):
        open_cache(target, trajectories, PPOWOptions(target_cache="disk"), None, "sha256:0", progress)


def test_its_memory_is_counted(directories, trajectories, tmp_path):
    from test_memory import make_config

    pair = load(directories, "eagle3")
    runner = WindowRunner(pair.target, pair.drafter, trajectories, K, 1.0)
    fixed = [
        estimate_memory(runner, make_config(tmp_path, "cst:tv", 4, 8, target_cache=where)).fixed_bytes
        for where in ("none", "disk", "memory")
    ]
    assert fixed[0] == fixed[1] == fixed[2] - cache_bytes(pair.target, trajectories)


def test_its_size_is_told_before_the_target_reads(target, trajectories, progress, monkeypatch):
    told = []
    encode = Target.encode

    def watched(self: Target, chosen: Trajectories):
        told.extend(task.fields["note"] for task in progress.tasks[-1:])
        return encode(self, chosen)

    monkeypatch.setattr(Target, "encode", watched)
    monkeypatch.setattr(target_cache, "cache_bytes", lambda *_: 5 * 2**20)
    open_cache(target, trajectories, PPOWOptions(), None, "sha256:0", progress)
    assert told == ["5 MiB, memory"] * 2
    assert progress.tasks[-1].completed == len(trajectories)
