"""Kinds of drafter behind one Protocol; another kind is one file here and one line in `load_drafter`."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ppow_train.drafters.base import Drafter
from ppow_train.errors import UserError

__all__ = ["Drafter", "detect_drafter_type", "load_drafter"]


def detect_drafter_type(directory: Path) -> str:
    """`eagle3` or `causal_lm`, by the drafter's config.json.

    Raises:
        UserError: no readable config, or a kind that is not supported.
    """
    file = directory / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not readable ({error}): give the drafter's own directory.") from error
    if config.get("speculators_model_type") == "eagle3":
        return "eagle3"
    architectures = config.get("architectures") or []
    if any(name.endswith("ForCausalLM") for name in architectures):
        return "causal_lm"
    raise UserError(
        f"{directory} is neither a causal LM nor an EAGLE-3 head in speculators format (architectures "
        f"{architectures}): convert the head with the speculators library first."
    )


def load_drafter(directory: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Drafter:
    """Load a drafter of any supported kind, trainable, on a device."""
    if detect_drafter_type(directory) == "eagle3":
        from ppow_train.drafters.eagle3 import Eagle3Drafter

        return Eagle3Drafter.load(directory, device, dtype)
    from ppow_train.drafters.causal_lm import CausalLMDrafter

    return CausalLMDrafter.load(directory, device, dtype)
