"""Kinds of drafter behind one Protocol; another kind is one file here and one line in `load_drafter`."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ppow_train.drafters.base import Drafter
from ppow_train.errors import UserError

_ORIGINAL_EAGLE3 = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM")  # read by vLLM as one and the same

__all__ = ["Drafter", "check_drafter", "detect_drafter_type", "load_drafter"]


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
    if not isinstance(config, dict):
        raise UserError(
            f"{file} must hold a JSON object, got {type(config).__name__}: give the drafter's own directory."
        )
    named = config.get("architectures") or []
    architectures = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    if config.get("speculators_model_type") == "eagle3" or set(architectures) & set(_ORIGINAL_EAGLE3):
        return "eagle3"
    is_eagle = any("eagle" in name.lower() for name in architectures)  # some end in ForCausalLM too
    if not is_eagle and any(name.endswith("ForCausalLM") for name in architectures):
        return "causal_lm"
    if not is_eagle and any(name.endswith("LMHeadModel") for name in architectures):
        raise UserError(
            f"{directory} is of an architecture ({', '.join(architectures)}) that is not trained: give a causal LM "
            "whose architecture ends in ForCausalLM."
        )
    raise UserError(
        f"{directory} is neither a causal LM nor an EAGLE-3 head in speculators format or of Llama layers in the "
        f"original format (architectures {named}): convert the head with the speculators library first."
    )


def load_drafter(
    directory: Path, device: str = "cpu", dtype: torch.dtype = torch.float32, target: Path | None = None
) -> Drafter:
    """Load a drafter of any supported kind, trainable, on a device.

    Args:
        target: directory of its target; an EAGLE-3 head that leaves its taps or its embeddings to the target needs it.
    """
    if detect_drafter_type(directory) == "eagle3":
        from ppow_train.drafters.eagle3 import Eagle3Drafter

        return Eagle3Drafter.load(directory, device, dtype, target)
    from ppow_train.drafters.causal_lm import CausalLMDrafter

    return CausalLMDrafter.load(directory, device, dtype)


def check_drafter(directory: Path, target: Path | None = None) -> None:
    """Refuse what `load_drafter` would of config.json and the tensors' names and shapes, from the files' headers alone.

    Raises:
        UserError: the config cannot be read or contradicts the tensors.
        ModuleNotFoundError: a library that training reads drafters with is not installed.
    """
    if detect_drafter_type(directory) == "eagle3":
        from ppow_train.drafters.eagle3_checkpoint import check_head

        check_head(directory, target)
        return
    from ppow_train.loading import check_causal_lm

    check_causal_lm(directory)
