"""Trajectories on disk, shard by shard: what is there after a kill -9 is whole, and the next run goes on after it.

    DIR/manifest.json            facts of the set, and one entry per finished shard; replaced atomically after each
    DIR/shard-00000.safetensors  token ids of up to shard_size records, in the order of the prompts

A shard counts from the moment the manifest names it; a file that it does not name is written again. Every shard has a
seed of its own, so its records do not depend on where a run was interrupted. Left out: reading prompts (prompts.py),
continuing them (generation.py); hidden states, which training computes anew.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load, save

from ppow_train.errors import UserError
from ppow_train.prompts import prompt_hash

if TYPE_CHECKING:
    from ppow_train.generation import Backend
    from ppow_train.types import Trajectories

MANIFEST = "manifest.json"
LOCK = ".lock"
FORMAT = 1  # of the directory; counted up when shards or manifest change
BYTES_PER_TOKEN = 4
_BYTES_PER_RECORD = 9  # two lengths and the split


@dataclasses.dataclass(frozen=True)
class Shard:
    """A finished shard as the manifest names it; counts of records and tokens, size in bytes."""

    file: str
    records: int
    held_out: int
    prompt_tokens: int
    completion_tokens: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a directory holds.

    Attributes:
        facts: everything the trajectories depend on; a run with other facts is refused.
        num_records: records of the whole set, finished or not.
        shards: finished, in order.
    """

    facts: dict[str, Any]
    num_records: int
    shards: tuple[Shard, ...] = ()

    @property
    def done(self) -> int:
        """Records on disk."""
        return sum(shard.records for shard in self.shards)

    @property
    def complete(self) -> bool:
        """Whether every record is on disk."""
        return self.done == self.num_records


def is_held_out(prompt_ids: Sequence[int], share: float) -> bool:
    """Which split a prompt belongs to: by a hash of its ids alone, so that no other prompt or seed can move it."""
    return int.from_bytes(prompt_hash(prompt_ids)[:8], "big") < share * 2**64


def derive_seed(seed: int, index: int) -> int:
    """An independent seed for part `index`, 0 to 2^63 - 1, the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{index}".encode()).digest()[:8], "big") >> 1


def estimated_bytes(prompts: Sequence[Sequence[int]], max_new_tokens: int) -> int:
    """Upper bound of the set's size on disk, in bytes, without the headers of its files."""
    tokens = sum(map(len, prompts)) + len(prompts) * max_new_tokens
    return tokens * BYTES_PER_TOKEN + len(prompts) * _BYTES_PER_RECORD


# ---------------------------------------------------------------- write


@contextlib.contextmanager
def open_store(directory: Path, facts: dict[str, Any], num_records: int) -> Iterator[TrajectoryStore]:
    """Begin a set, or go on with one that was interrupted; one process at a time.

    Args:
        directory: absent, empty, or begun with the same facts.
        facts: JSON values that the trajectories depend on, `shard_size`, `seed` and `held_out_share` among them.
        num_records: of the whole set.

    Raises:
        UserError: it was begun with other facts, is something else, is damaged, or another process writes it.
    """
    _check_ours(directory)
    with only_writer(directory):
        yield TrajectoryStore(directory, _begin(directory, facts, num_records))


def is_whole(directory: Path) -> bool:
    """Whether a set is there to which nothing is to be added.

    Raises:
        UserError: its manifest cannot be read.
    """
    return (directory / MANIFEST).exists() and read_manifest(directory).complete


@contextlib.contextmanager
def only_writer(directory: Path) -> Iterator[None]:
    """Keep other processes from writing a directory, which is made if it is not there.

    Raises:
        UserError: another process writes it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / LOCK).open("w") as handle:
        # The kernel drops the lock with the process, however that ends; the file itself may stay.
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{directory} is being written by another process: wait for it, or name another output directory."
            ) from None
        yield


def _check_ours(directory: Path) -> None:
    """Nothing is put among files that are not ours."""
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file: name another output directory.")
    ours = {MANIFEST, LOCK, _partial(MANIFEST)}
    names = {path.name for path in directory.iterdir()} if directory.exists() else set()
    if MANIFEST not in names and names - ours:
        raise UserError(f"{directory} is not empty and holds no {MANIFEST}: name another output directory.")


def _begin(directory: Path, facts: dict[str, Any], num_records: int) -> Manifest:
    wanted = Manifest(json.loads(json.dumps(facts)), num_records)
    if not (directory / MANIFEST).exists():
        _write_manifest(directory, wanted)
        return wanted
    found = read_manifest(directory)
    _check_same(directory, found, wanted)
    for shard in found.shards:
        path = directory / shard.file
        if not path.is_file() or path.stat().st_size != shard.bytes:
            raise UserError(f"{path} is missing or damaged: name another output directory and begin again.")
    return found


def _check_same(directory: Path, found: Manifest, wanted: Manifest) -> None:
    before, now = ({**m.facts, "num_records": m.num_records} for m in (found, wanted))
    if changes := describe_changes(before, now):
        raise UserError(
            f"{directory} was begun with {changes}: give the same prompts and options, or name another output "
            "directory."
        )


def describe_changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Facts that differ, for a sentence: `seed 3 (now 4), …`; empty where none does."""
    other = [name for name in sorted(before | now) if before.get(name) != now.get(name)]
    return ", ".join(f"{name} {_short(before.get(name))} (now {_short(now.get(name))})" for name in other)


def _short(value: Any) -> str:
    return f"{value[:16]}…" if isinstance(value, str) and len(value) > 24 else str(value)


class TrajectoryStore:
    """A set being written (see `open_store`)."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self.manifest = manifest

    def add(self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]) -> None:
        """Write the next shard: on disk, then in the manifest, each whole or not at all."""
        name = f"shard-{len(self.manifest.shards):05d}.safetensors"
        share = self.manifest.facts["held_out_share"]
        held_out = np.array([is_held_out(ids, share) for ids in prompt_ids], dtype=np.uint8)
        prompts, prompt_lengths = _flat(prompt_ids)
        completions, completion_lengths = _flat(completion_ids)
        content = save(
            {
                "prompt_ids": prompts,
                "prompt_lengths": prompt_lengths,
                "completion_ids": completions,
                "completion_lengths": completion_lengths,
                "held_out": held_out,
            }
        )
        write_whole(self.directory, name, content)
        shard = Shard(
            file=name,
            records=len(prompt_ids),
            held_out=int(held_out.sum()),
            prompt_tokens=len(prompts),
            completion_tokens=len(completions),
            bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
        )
        manifest = dataclasses.replace(self.manifest, shards=(*self.manifest.shards, shard))
        _write_manifest(self.directory, manifest)
        self.manifest = manifest


def fill(
    store: TrajectoryStore,
    rounds: Sequence[tuple[Sequence[Sequence[int]], Backend]],
    report: Callable[[int], None] = lambda done: None,
) -> Manifest:
    """Continue every prompt that the store lacks, shard by shard; no shard holds records of two rounds.

    Args:
        rounds: prompts, in the order they were first given in, and what continues them, once for each continuation.
        report: called with the number of finished records, those found on disk included.

    Returns:
        The manifest of the whole set.
    """
    facts, first = store.manifest.facts, 0  # record of the round
    for prompts, backend in rounds:
        while (done := store.manifest.done) < first + len(prompts):
            report(done)
            batch = prompts[done - first : done - first + facts["shard_size"]]
            seed = derive_seed(facts["seed"], len(store.manifest.shards))
            store.add(batch, backend.continue_prompts(batch, seed=seed, report=_after(done, report)))
        first += len(prompts)
    report(store.manifest.done)
    return store.manifest


def _after(done: int, report: Callable[[int], None]) -> Callable[[int], None]:
    return lambda more: report(done + more)


def _flat(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Rows end to end and their lengths, int32 [sum] and int32 [rows]."""
    whole = array("i")
    for row in rows:
        whole.extend(row)
    return np.array(whole, dtype=np.int32), np.array([len(row) for row in rows], dtype=np.int32)


def _write_manifest(directory: Path, manifest: Manifest) -> None:
    value = {"format": FORMAT, **dataclasses.asdict(manifest)}
    write_whole(directory, MANIFEST, (json.dumps(value, indent=1) + "\n").encode())


def _partial(name: str) -> str:
    return f".{name}.partial"


def write_whole(directory: Path, name: str, content: bytes) -> None:
    """Under another name first; the rename, once both are on the disk, is what makes the file exist."""
    partial = directory / _partial(name)
    with partial.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(directory / name)
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---------------------------------------------------------------- read


def read_manifest(directory: Path) -> Manifest:
    """What a directory holds.

    Raises:
        UserError: no such directory, no manifest in it, or one of another format.
    """
    path = directory / MANIFEST
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value["format"] != FORMAT:
            raise UserError(
                f"{path} has format {value['format']!r}, this version reads {FORMAT}: run `ppow data` again."
            )
        shards = tuple(Shard(**shard) for shard in value["shards"])
        return Manifest(value["facts"], value["num_records"], shards)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} is not the manifest of a trajectory set ({error}): give a directory that `ppow data` wrote."
        ) from error


def read_records(directory: Path, held_out: bool) -> tuple[list[list[int]], list[list[int]]]:
    """Prompt ids and continuation ids of one split, in the order of the prompts.

    Raises:
        UserError: the set is not complete, or a shard is not the file that was written.
    """
    manifest = read_manifest(directory)
    if not manifest.complete:
        raise UserError(
            f"{directory} holds {manifest.done} of {manifest.num_records} trajectories: run the same `ppow data` "
            "command again, it goes on where it stopped."
        )
    prompts: list[list[int]] = []
    completions: list[list[int]] = []
    for shard in manifest.shards:
        tensors = _load_shard(directory, shard)
        chosen = tensors["held_out"].astype(bool) == held_out
        prompts += _rows(tensors["prompt_ids"], tensors["prompt_lengths"], chosen)
        completions += _rows(tensors["completion_ids"], tensors["completion_lengths"], chosen)
    return prompts, completions


def _load_shard(directory: Path, shard: Shard) -> dict[str, np.ndarray]:
    path = directory / shard.file
    content = path.read_bytes() if path.is_file() else b""
    if hashlib.sha256(content).hexdigest() != shard.sha256:
        raise UserError(f"{path} is missing or damaged: copy the directory again, or run `ppow data` again.")
    return load(content)


def _rows(flat: np.ndarray, lengths: np.ndarray, chosen: np.ndarray) -> list[list[int]]:
    ends = np.cumsum(lengths)
    return [flat[ends[i] - lengths[i] : ends[i]].tolist() for i in np.flatnonzero(chosen)]


def load_splits(
    directory: Path, target_fingerprint: str, temperature: float, further_temperature: float | None = None
) -> tuple[Trajectories, Trajectories | None]:
    """Training and held-out trajectories of a set; None where nothing was held out.

    Args:
        target_fingerprint: of the target that is trained for; the set must be its own.
        temperature: that is trained for; the set must have been sampled at it.
        further_temperature: that continuations after the first must have been sampled at, where the set has such;
            None for any.

    Raises:
        UserError: another target's, at another temperature, incomplete, damaged, or nothing to train on.
    """
    from ppow_train.data import collate

    facts = read_manifest(directory).facts
    if facts["target_fingerprint"] != target_fingerprint:
        raise UserError(
            f"{directory} was generated by another target (fingerprint {_short(facts['target_fingerprint'])}, this "
            f"one has {_short(target_fingerprint)}): train for that target, or run `ppow data` with this one."
        )
    if facts["temperature"] != temperature:
        raise UserError(
            f"{directory} was generated at temperature {facts['temperature']}, training is for {temperature}: give "
            f"--serving-temperature {facts['temperature']}, or run `ppow data` at the other."
        )
    further = facts.get("further_temperature")
    if further_temperature is not None and further not in (None, further_temperature):
        raise UserError(
            f"{directory} has further continuations at temperature {further}, training is for {further_temperature}: "
            f"give --greedy-sampling-temperature {further}, or run `ppow data` with the other."
        )
    train, held_out = read_records(directory, held_out=False), read_records(directory, held_out=True)
    if not train[0]:
        raise UserError(
            f"{directory} holds nothing to train on: run `ppow data` with a lower --held-out-share."
        )
    return collate(*train), collate(*held_out) if held_out[0] else None
