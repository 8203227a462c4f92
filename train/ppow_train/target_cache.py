"""What the target thinks along the trajectories, computed once and kept: in memory, or on disk.

Objectives on target paths read the target's last hidden states and, for an EAGLE head, its taps at every token; they
are the same at every update. Keeping them saves the target's forward: H + T·H numbers per token (H hidden size, T
taps), which is why it is optional and its size is told before anything is computed. Drafted windows (ppow)
need the target's keys and values as well, which are never kept. Left out: what is read of them (rollout.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, Protocol

import torch
from rich.progress import Progress

from ppow_train.errors import UserError
from ppow_train.locks import locked
from ppow_train.machine import available_bytes, gib, processes_here
from ppow_train.options import PPOWOptions
from ppow_train.shapes import (
    PASS_BYTES,
    Shapes,
    batches,
    padded_tokens,
    pass_bytes_per_token,
    tokens_at_once,
)
from ppow_train.target import Target
from ppow_train.target_config import config_digest
from ppow_train.types import Encoded, Trajectories

# `auto` keeps what is no larger in memory: by size alone, so that a resumed run decides alike.
AUTO_BYTES = 2 * 2**30
_BATCH = 16  # trajectories per forward at most; part of the numbers (other batches round differently)
_SHARD = 256  # trajectories per file
_FORMAT = 1
_ABANDONED_S = 24 * 3600


class TargetCache(Protocol):
    """Keeps the target's states along trajectories."""

    def encoded(self, rows: torch.Tensor, length: int) -> Encoded:
        """States of the given trajectories, int64 [B], cut or padded to `length` slots: `Encoded` without keys."""
        ...


def cache_bytes(target: Target, trajectories: Trajectories) -> int:
    """Size of the states of all trajectories, in bytes."""
    per_token = Shapes.of(target.model).states(len(target.tap_layers))
    return int(trajectories.lengths.sum()) * per_token


def fill_bytes(target: Target, trajectories: Trajectories) -> int:
    """What the target takes at most while it reads these trajectories in order to keep its states."""
    tokens = padded_tokens(trajectories.lengths.tolist(), tokens_at_once(target), _BATCH)
    return tokens * pass_bytes_per_token(target)


def resolve_kind(
    target: Target, trajectories: Trajectories, options: PPOWOptions
) -> Literal["none", "memory", "disk"]:
    """What `options.target_cache` comes to for these trajectories."""
    if options.objective == "ppow":
        return "none"
    if options.target_cache != "auto":
        return options.target_cache
    return "memory" if cache_bytes(target, trajectories) <= AUTO_BYTES else "none"


def open_cache(
    target: Target,
    trajectories: Trajectories,
    options: PPOWOptions,
    directory: Path | None,
    fingerprint: str,
    progress: Progress,
) -> TargetCache | None:
    """The cache that the options ask for, filled; None where nothing is kept.

    Args:
        directory, fingerprint: as in `DiskCache`.
        progress: shows how far the target has read, and how much is kept.

    Raises:
        UserError: no room for it, or no directory where one is needed.
    """
    kind = resolve_kind(target, trajectories, options)
    if kind == "none":
        return None
    needed = cache_bytes(target, trajectories)
    task = progress.add_task(
        "target reads the trajectories", total=len(trajectories), note=f"{needed / 2**20:,.0f} MiB, {kind}"
    )

    def report(done: int) -> None:
        progress.update(task, completed=done)

    if kind == "memory":
        _check_memory(needed)
        return MemoryCache(target, trajectories, report)
    if directory is None:
        raise UserError("target_cache disk needs a directory: give one, or target_cache memory or none.")
    return DiskCache(target, trajectories, directory, fingerprint, report)


def _check_memory(needed: int) -> None:
    main = torch.device("cpu")
    available = available_bytes(main) / processes_here(main)
    if needed > available:
        raise UserError(
            f"The target's states take {gib(needed)} of memory, {gib(available)} are free for each process: give "
            "--target-cache disk, or none, which computes them at every update."
        )


class _Layout:
    """How the states of a trajectory, [n, H + T·H], become `Encoded` again."""

    def __init__(self, target: Target) -> None:
        self.hidden_size = target.model.config.get_text_config().hidden_size
        self.has_taps = bool(target.tap_layers)
        self.device = target.model.device

    def padded(self, states: list[torch.Tensor], length: int) -> Encoded:
        """[n_i, H + T·H] each -> `Encoded` with `length` slots; padding is zero and never read."""
        padded = states[0].new_zeros(len(states), length, states[0].shape[1])
        for row, state in enumerate(states):
            padded[row, : min(length, len(state))] = state[:length]
        padded = padded.to(self.device)
        taps = padded[..., self.hidden_size :] if self.has_taps else None
        return Encoded(padded[..., : self.hidden_size], None, first_slot=1, taps=taps)


class MemoryCache:
    """All states in main memory, moved to the target's device as they are read."""

    def __init__(
        self, target: Target, trajectories: Trajectories, report: Callable[[int], None] = lambda done: None
    ) -> None:
        self._layout = _Layout(target)
        self._states = list(_states(target, trajectories, report))

    def encoded(self, rows: torch.Tensor, length: int) -> Encoded:
        """See `TargetCache`."""
        return self._layout.padded([self._states[row] for row in rows.tolist()], length)


class DiskCache:
    """All states in safetensors files of `_SHARD` trajectories, read as they are needed.

    Args:
        directory: where caches are kept; this one gets a name made of its content, so that it is found again. Of
            several processes that want the same one, one makes it and the others wait.
        fingerprint: of the target's weights.

    Raises:
        UserError: the disk has no room for it.
    """

    def __init__(
        self,
        target: Target,
        trajectories: Trajectories,
        directory: Path,
        fingerprint: str,
        report: Callable[[int], None] = lambda done: None,
    ) -> None:
        self._layout = _Layout(target)
        self.directory = directory / f"target-{_key(target, trajectories, fingerprint)}"
        if not self.directory.exists():
            with locked(self.directory):
                if not self.directory.exists():
                    _check_room(directory, cache_bytes(target, trajectories))
                    _write_shards(self.directory, _states(target, trajectories, report))
        report(len(trajectories))

    def encoded(self, rows: torch.Tensor, length: int) -> Encoded:
        """See `TargetCache`."""
        return self._layout.padded([self._read(row) for row in rows.tolist()], length)

    def _read(self, row: int) -> torch.Tensor:
        from safetensors import safe_open

        with safe_open(_shard(self.directory, row // _SHARD), framework="pt") as file:
            return file.get_tensor(str(row))


def _states(
    target: Target, trajectories: Trajectories, report: Callable[[int], None]
) -> Iterator[torch.Tensor]:
    """[n_i, H + T·H] of each trajectory in order, on the CPU."""
    lengths = trajectories.lengths.tolist()
    rows = torch.arange(len(trajectories), device=trajectories.lengths.device)
    for part in batches(lengths, tokens_at_once(target), _BATCH):
        states = _read(target, trajectories.select(rows[part]))
        yield from (state[:length].clone() for state, length in zip(states, lengths[part], strict=True))
        report(part.stop)
    target.forget()


@torch.no_grad()
def _read(target: Target, chosen: Trajectories) -> torch.Tensor:
    """[B, L, H + T·H], on the CPU; nothing on the target's device outlives the call but what it remembers."""
    encoded = target.encode(chosen)
    states = encoded.hidden if encoded.taps is None else torch.cat([encoded.hidden, encoded.taps], dim=-1)
    return states.cpu()


def _key(target: Target, trajectories: Trajectories, fingerprint: str) -> str:
    model = target.model
    of_target = [fingerprint, config_digest(model.config), list(target.tap_layers), str(model.dtype)]
    digest = hashlib.sha256(json.dumps([_FORMAT, _BATCH, PASS_BYTES, *of_target]).encode())
    for ids in trajectories.unpadded():
        digest.update(ids.numpy().tobytes() + b"|")
    return digest.hexdigest()[:16]


def _shard(directory: Path, index: int) -> Path:
    return directory / f"states-{index:05}.safetensors"


def _check_room(directory: Path, needed: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise UserError(
            f"The target's states take {gib(needed)}, {directory} has {gib(free)} free: give "
            "another --cache, or --target-cache none, which computes them at every update."
        )


def _remove_abandoned(cache: Path) -> None:
    """Remove what processes that were killed while they wrote have left: unfinished, and not written to for a day."""
    for unfinished in cache.glob(".target-*.*"):
        with contextlib.suppress(OSError):
            if time.time() - unfinished.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(unfinished, ignore_errors=True)


def _write_shards(directory: Path, states: Iterator[torch.Tensor]) -> None:
    """Whole or not at all."""
    from safetensors.torch import save_file

    _remove_abandoned(directory.parent)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        shard: dict[str, torch.Tensor] = {}
        for row, state in enumerate(states):
            shard[str(row)] = state
            if len(shard) == _SHARD:
                save_file(shard, _shard(temporary, row // _SHARD))
                shard = {}
        if shard:
            save_file(shard, _shard(temporary, row // _SHARD))
        try:
            os.rename(temporary, directory)
        except OSError:
            if not directory.exists():  # else another process has written the same
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
