"""The pair of a run: target and drafter loaded, checked against each other, and identified. Left out: training it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from ppow_train.drafters import Drafter, load_drafter
from ppow_train.errors import UserError
from ppow_train.machine import available_bytes, gib, processes_here
from ppow_train.progress import quiet_libraries
from ppow_train.target import Target
from vllm_ppow.artifact import ModelRef, fingerprint_model, model_weight_files, safetensors_ranges
from vllm_ppow.resolve import resolve_directory

_FLOAT_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}  # names of safetensors


@dataclasses.dataclass(frozen=True)
class Pair:
    """A loaded target and drafter with what identifies them."""

    target: Target
    drafter: Drafter
    target_ref: ModelRef
    drafter_ref: ModelRef


def load_pair(target: str, drafter: str, device: str = "cpu", target_dtype: str = "auto") -> Pair:
    """Load target and drafter and check that they fit.

    Args:
        target, drafter: directory or Hub repo id each.
        target_dtype: as the option of that name (options.py). The drafter, which is trained, is in float32.

    Raises:
        UserError, ArtifactError: cannot be found, or do not belong together.
    """
    quiet_libraries()
    (target_dir, target_ref), (drafter_dir, drafter_ref) = (_resolve(name) for name in (target, drafter))
    if target_dtype == "auto" and torch.device(device).type == "cpu":
        target_dtype = "float32"  # many CPUs are slower with less
    _check_room(target_dir, target_dtype, torch.device(device))
    loaded = load_drafter(drafter_dir, device, target=target_dir)
    read = Target(target_dir, loaded.tap_layers, device, target_dtype)
    pair = Pair(read, loaded, target_ref, drafter_ref)
    if pair.target.vocab_size != loaded.vocab_size:
        raise UserError(
            f"Drafter {drafter} reads {loaded.vocab_size} tokens, target {target} has {pair.target.vocab_size}: "
            "they must share one tokenizer."
        )
    return pair


def _check_room(target: Path, dtype: str, device: torch.device) -> None:
    """Refuse before anything is loaded what cannot be; the update's own memory is estimated later (memory.py)."""
    needed = weight_bytes(target, dtype)
    free = available_bytes(device) // processes_here(device)
    if needed > free:
        raise UserError(
            f"The target's weights take {gib(needed)}, {gib(free)} are free on {device} for each process: give "
            "--target-dtype bfloat16 unless it is that already, free some memory, or take a smaller target."
        )


def weight_bytes(directory: Path, dtype: str) -> int:
    """Memory that a checkpoint's weights take in a dtype, in bytes.

    Args:
        directory: of a model in safetensors.
        dtype: name of a torch dtype for what is stored in floats of at least 16 bits, or "auto": all as it is stored.
    """
    total = 0
    for file in model_weight_files(directory):
        for kind_and_shape, begin, end in safetensors_ranges(file).values():
            stored = _FLOAT_BYTES.get(kind_and_shape.partition("[")[0])
            wanted = None if dtype == "auto" else torch.finfo(getattr(torch, dtype)).bits // 8
            total += (end - begin) if stored is None or wanted is None else (end - begin) // stored * wanted
    return total


def _resolve(name: str) -> tuple[Path, ModelRef]:
    """Where a model is, and what the adapter records of it."""
    directory, from_hub = resolve_directory(name)
    fingerprint = fingerprint_model(directory)
    if not from_hub:
        return directory, ModelRef(str(directory.resolve()), fingerprint)
    # The Hub client names a snapshot by its commit: the branch moves on when the owner uploads other weights.
    return directory, ModelRef(name, fingerprint, directory.name)
