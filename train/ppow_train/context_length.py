"""How many tokens a model takes by its config.json, and what follows where a drafter takes fewer than its target.

Left out: the target's own limit, which nothing may exceed (generation.py); what vLLM adds for rotary scaling.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_ppow.artifact import read_model_config

if TYPE_CHECKING:
    from ppow_train.types import Trajectories

UNDRAFTED = (
    "longer requests are served without drafts, and with a draft model, or on vLLM's V1 model runner, so are all "
    "others while one of them runs"
)


def inner_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config.json that describes the layers: nested in multimodal models and in speculators' format."""
    for key in ("text_config", "transformer_layer_config"):
        if isinstance(config.get(key), dict):
            return config[key]
    return config


def context_length(directory: Path) -> int | None:
    """Tokens that the model in a directory takes, prompt and output; None where its config.json does not say.

    Raises:
        ArtifactError: there is no readable config.json.
    """
    length = inner_config(read_model_config(directory)).get("max_position_embeddings")
    return length if type(length) is int else None


def tell_longer(drafter: Path, trajectories: Sequence[Trajectories]) -> str | None:
    """A warning of prompts that are longer, with their continuations, than their drafter is served for.

    Args:
        drafter: its directory.
        trajectories: of the target, all that the run trains or measures on.

    Returns:
        None where there are none, or nobody knows.
    """
    limit = context_length(drafter)
    lengths = [length for some in trajectories for length in some.lengths.tolist()]
    beyond = 0 if limit is None else sum(length > limit for length in lengths)
    if not beyond:
        return None
    return (
        f"Warning: the drafter takes {limit} tokens, {beyond} of {len(lengths)} prompts with their continuations "
        f"({100 * beyond / len(lengths):.0f} %) have more: {UNDRAFTED}. Give shorter prompts, a lower "
        "--max-new-tokens, or a drafter that takes more."
    )
