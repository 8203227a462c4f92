"""Keeps the LoRA of a request out of the drafter's passes.

An EAGLE head without embeddings of its own is given the target's, and with LoRA enabled those are wrapped in a layer
that looks up each token's LoRA by its place in the target's batch. The drafter's batch has other tokens: on a CPU the
engine stops with an error about shapes, elsewhere the wrong LoRA is looked up. The drafter was trained on the target
without LoRA, and gets the plain layer. Output is the target's, with its LoRA, either way. Can go when vLLM unwraps what
it shares. Left out: the V2 model runner.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_ppow.compat import seams
from vllm_ppow.compat.engine_args import serves_ppow

PROPOSER = ("vllm.v1.spec_decode.llm_base_proposer", "SpecDecodeBaseProposer", "load_model")


def install() -> None:
    """Wrap the loading of V1 drafters; a vLLM without this seam is left as it is, with a warning."""
    try:
        seams.wrap(*PROPOSER, ("self", "target_model"), _unwrapping)
    except seams.SeamMissingError as error:
        seams.logger.warning("Drafting with LoRA on the target may fail: %s", error)


def _unwrapping(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_model(self: Any, target_model: Any) -> None:
        original(self, target_model)
        if serves_ppow(self.speculative_config):
            unwrap(self.model)

    return load_model


def unwrap(drafter: Any) -> int:
    """Replace every layer of a module that is wrapped for LoRA by the layer inside.

    Returns:
        How many there were.
    """
    from vllm.lora.layers import BaseLayerWithLoRA

    found = [
        (parent, name, child.base_layer)
        for parent in drafter.modules()
        for name, child in parent.named_children()
        if isinstance(child, BaseLayerWithLoRA)
    ]
    for parent, name, layer in found:
        setattr(parent, name, layer)
    return len(found)
