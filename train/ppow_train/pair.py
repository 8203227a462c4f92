"""The pair of a run: target and drafter loaded, checked against each other, and identified. Left out: training it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from ppow_train.drafters import Drafter, load_drafter
from ppow_train.errors import UserError
from ppow_train.progress import quiet_libraries
from ppow_train.target import Target
from vllm_ppow.artifact import ModelRef, fingerprint_model
from vllm_ppow.resolve import resolve_directory


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
    target_dir, _ = resolve_directory(target)
    drafter_dir, _ = resolve_directory(drafter)
    refs = [_reference(name, directory) for name, directory in ((target, target_dir), (drafter, drafter_dir))]
    loaded = load_drafter(drafter_dir, device, target=target_dir)
    if target_dtype == "auto" and torch.device(device).type == "cpu":
        target_dtype = "float32"  # many CPUs are slower with less
    pair = Pair(Target(target_dir, loaded.tap_layers, device, target_dtype), loaded, *refs)
    if pair.target.vocab_size != loaded.vocab_size:
        raise UserError(
            f"Drafter {drafter} reads {loaded.vocab_size} tokens, target {target} has {pair.target.vocab_size}: "
            "they must share one tokenizer."
        )
    return pair


def _reference(name: str, directory: Path) -> ModelRef:
    recorded = str(directory.resolve()) if Path(name).expanduser().exists() else name
    return ModelRef(recorded, fingerprint_model(directory))
