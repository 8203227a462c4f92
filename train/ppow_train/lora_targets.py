"""Which layers of a drafter LoRA adapts: all linear ones of its blocks, by name, or some of them.

The output layer is among them only where it is asked for, and the drafter's own: that of an EAGLE-3 head, whose
checkpoint always has it. A causal LM's is mostly its embeddings. Left out: injecting (trainer.py), merging
(vllm_ppow/merge.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from ppow_train.errors import UserError

OUTPUT_LAYER = "lm_head"
# Of Llama and all that is built like it, in this order: what adapters of such drafters have always had.
LLAMA_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def linear_names(model: torch.nn.Module) -> list[str]:
    """Last names of the linear layers that can be adapted, sorted; heads, and what is the verifier's, left out."""
    return sorted({name.rpartition(".")[2] for name in _linear(model)})


def default_targets(model: torch.nn.Module) -> list[str]:
    """What is adapted where nobody says: `LLAMA_LAYERS` where the model has them all, else all linear layers."""
    names = linear_names(model)
    return list(LLAMA_LAYERS) if set(LLAMA_LAYERS) <= set(names) else names


def check_lora_targets(model: torch.nn.Module, names: Iterable[str], has_own_output: bool = False) -> None:
    """PEFT passes over a name that fits nothing as long as another one fits.

    Args:
        has_own_output: whether the output layer can be adapted as well.

    Raises:
        UserError: a name fits no linear layer that can be adapted, or there is none.
    """
    linear = [*_linear(model), *([OUTPUT_LAYER] if has_own_output else [])]
    if not linear:
        raise UserError(
            f"The drafter ({type(model).__name__}) has no linear layers that LoRA could adapt and vLLM could merge: "
            "take another drafter."
        )
    for wanted in names:
        if not any(f".{name}".endswith(f".{wanted}") for name in linear):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise UserError(f"lora_targets must name linear layers of the drafter ({known}), got {wanted!r}.")


def _linear(model: torch.nn.Module) -> list[str]:
    get_head: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = get_head()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and module is not head
        and name.rpartition(".")[2] != OUTPUT_LAYER
        and not name.startswith("verifier_")
    ]
