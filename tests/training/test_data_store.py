"""The directory of trajectories: whole after any kill, the same however often it was interrupted, never mixed up."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import interrupted_writer
import pytest
from interrupted_writer import FACTS, PROMPTS, Continuer
from test_bad_input import refused

from ppow_train.trajectory_store import (
    MANIFEST,
    derive_seed,
    estimated_bytes,
    fill,
    is_held_out,
    load_splits,
    open_store,
    read_manifest,
    read_records,
)


def write(directory: Path, facts: dict[str, Any] = FACTS, prompts: Any = PROMPTS) -> Continuer:
    continuer = Continuer()
    with open_store(directory, facts, len(prompts)) as store:
        fill(store, [(prompts, continuer)])
    return continuer


def start(directory: Path, fatal: int = -1, pause_s: float = 0.0) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, interrupted_writer.__file__, str(directory), str(fatal), str(pause_s)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def whole(tmp_path):
    """A set that was never interrupted."""
    write(tmp_path / "whole")
    return tmp_path / "whole"


# ---------------------------------------------------------------- kills


def test_killed_at_random_moments(whole, tmp_path):
    dice, kills = random.Random(0), 0
    for _ in range(40):
        process = start(tmp_path / "killed", pause_s=0.02)
        time.sleep(dice.uniform(0.0, 0.06))
        process.kill()
        kills += process.wait() == -signal.SIGKILL
        if (tmp_path / "killed" / MANIFEST).exists() and read_manifest(tmp_path / "killed").complete:
            break
    assert kills >= 4, "the writer was too fast to be killed"
    write(tmp_path / "killed")
    assert files(tmp_path / "killed") == files(whole)


@pytest.mark.parametrize("fatal", [*range(8), 32, 33])
def test_killed_around_every_rename(fatal, whole, tmp_path):
    """8 shards and 9 manifests are renamed into place: the first four of them, and the last."""
    process = start(tmp_path / "killed", fatal)
    assert process.wait() == -signal.SIGKILL
    write(tmp_path / "killed")
    assert files(tmp_path / "killed") == files(whole)


def test_finished_shards_are_not_generated_again(whole, tmp_path):
    assert write(whole).calls == 0
    start(tmp_path / "killed", fatal=9).wait()  # after the manifest that names the second shard
    assert len(read_manifest(tmp_path / "killed").shards) == 2
    assert write(tmp_path / "killed").calls == 6


# ---------------------------------------------------------------- content


def test_every_record_once_in_order_and_in_one_split(whole):
    train, held_out = read_records(whole, held_out=False), read_records(whole, held_out=True)
    assert sorted(train[0] + held_out[0]) == sorted(PROMPTS)
    assert train[0] == [ids for ids in PROMPTS if not is_held_out(ids, 0.25)]
    assert held_out[0] == [ids for ids in PROMPTS if is_held_out(ids, 0.25)]
    first = Continuer().continue_prompts(PROMPTS[:8], seed=derive_seed(3, 0), report=lambda done: None)
    splits = {False: iter(train[1]), True: iter(held_out[1])}
    assert [next(splits[is_held_out(ids, 0.25)]) for ids in PROMPTS[:8]] == first
    manifest = read_manifest(whole)
    assert [shard.records for shard in manifest.shards] == [8] * 7 + [5]
    assert sum(shard.held_out for shard in manifest.shards) == len(held_out[0])
    assert sum(shard.prompt_tokens for shard in manifest.shards) == sum(map(len, PROMPTS))


def test_the_split_of_a_prompt_does_not_depend_on_others():
    many = [[n] for n in range(4000)]
    held_out = [ids for ids in many if is_held_out(ids, 0.1)]
    assert 320 < len(held_out) < 480
    assert all(is_held_out(ids, 0.2) for ids in held_out), "a larger share keeps what was held out"
    assert not any(is_held_out(ids, 0) for ids in many)
    assert all(is_held_out(ids, 1) for ids in many)


def test_only_token_ids_are_on_disk(whole):
    from safetensors.numpy import load_file

    tensors = load_file(whole / "shard-00000.safetensors")
    assert {name: str(t.dtype) for name, t in tensors.items()} == {
        "prompt_ids": "int32",
        "prompt_lengths": "int32",
        "completion_ids": "int32",
        "completion_lengths": "int32",
        "held_out": "uint8",
    }


def test_the_estimate_is_an_upper_bound(whole):
    sizes = sum(shard.bytes for shard in read_manifest(whole).shards)
    headers = len(read_manifest(whole).shards) * 450
    assert sizes <= estimated_bytes(PROMPTS, 5) + headers


def test_seeds_of_shards_differ():
    assert len({derive_seed(seed, index) for seed in range(20) for index in range(50)}) == 1000
    assert all(0 <= derive_seed(0, index) < 2**63 for index in range(100))
    assert derive_seed(0, 0) == 6213027144842677344


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"temperature": 0.5}, r"temperature 1\.0 \(now 0\.5\)"),
        ({"seed": 4}, r"seed 3 \(now 4\)"),
        ({"target_fingerprint": "sha256:" + "1" * 40}, "target_fingerprint sha256:0"),
        ({"shard_size": 9}, "shard_size"),
        ({"more": 1}, r"more None \(now 1\)"),
    ],
)
def test_other_facts(change, said, whole):
    before = files(whole)
    with refused(said, "same prompts and options", "another output"):
        write(whole, {**FACTS, **change})
    assert files(whole) == before


def test_other_facts_before_the_first_shard(tmp_path):
    with open_store(tmp_path / "set", FACTS, 5):
        pass
    with refused("seed"), open_store(tmp_path / "set", {**FACTS, "seed": 1}, 5):
        pass
    with refused(r"num_records 5 \(now 6\)"), open_store(tmp_path / "set", FACTS, 6):
        pass


def test_a_directory_that_holds_something_else(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with refused("not empty", "another output"):
        write(tmp_path)
    assert files(tmp_path) == {"thesis.txt": b"mine"}


def test_an_output_that_is_a_file(tmp_path):
    (tmp_path / "set").write_text("mine")
    with refused("is a file", "another output"):
        write(tmp_path / "set")


def test_two_writers(tmp_path):
    with open_store(tmp_path / "set", FACTS, len(PROMPTS)), refused("another process"):
        write(tmp_path / "set")
    write(tmp_path / "set")


def test_a_shard_that_was_damaged(whole):
    shard = whole / "shard-00001.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with refused("shard-00001", "damaged"):
        read_records(whole, held_out=False)
    shard.unlink()
    with refused("shard-00001", "missing"):
        read_records(whole, held_out=False)
    with refused("shard-00001", "missing"):
        write(whole)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (None, ["not the manifest", "ppow data"]),
        ("{", ["not the manifest"]),
        ("[]", ["not the manifest"]),
        ('{"format": 1}', ["not the manifest"]),
        ('{"format": 99}', ["format 99", "reads 1"]),
    ],
)
def test_manifests_that_are_none(content, parts, tmp_path):
    if content is not None:
        (tmp_path / MANIFEST).write_text(content)
    with refused(*parts):
        read_manifest(tmp_path)


# ---------------------------------------------------------------- training


def test_splits_for_training(whole, tmp_path):
    train, held_out = load_splits(whole, "sha256:0", 1.0)
    assert held_out is not None
    assert len(train) + len(held_out) == len(PROMPTS)
    assert train.prompt_lengths.tolist() == [len(ids) for ids in PROMPTS if not is_held_out(ids, 0.25)]
    write(tmp_path / "all", {**FACTS, "held_out_share": 0})
    assert load_splits(tmp_path / "all", "sha256:0", 1)[1] is None


def test_sets_that_do_not_fit_the_training(whole, tmp_path):
    with refused("another target", "sha256:0", "sha256:1"):
        load_splits(whole, "sha256:1", 1.0)
    with refused(r"temperature 1\.0", "for 0", "--serving-temperature 1"):
        load_splits(whole, "sha256:0", 0)
    write(tmp_path / "greedy", {**FACTS, "temperature": 0.0, "further_temperature": 1.5})
    with refused(
        r"further continuations at temperature 1\.5", r"for 0\.7", "--greedy-sampling-temperature 1.5"
    ):
        load_splits(tmp_path / "greedy", "sha256:0", 0.0, 0.7)
    for further in (None, 1.5):
        assert len(load_splits(tmp_path / "greedy", "sha256:0", 0.0, further)[0])
    assert len(load_splits(whole, "sha256:0", 1.0, 1.0)[0]), "one continuation each"
    write(tmp_path / "none", {**FACTS, "held_out_share": 1})
    with refused("nothing to train on", "--held-out-share"):
        load_splits(tmp_path / "none", "sha256:0", 1.0)
    with open_store(tmp_path / "half", FACTS, len(PROMPTS)) as store:
        store.add(PROMPTS[:8], [[1]] * 8)
    with refused("8 of 61", "goes on"):
        load_splits(tmp_path / "half", "sha256:0", 1.0)
    assert json.loads((tmp_path / "half" / MANIFEST).read_text())["num_records"] == 61
