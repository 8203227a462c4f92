"""TRL's private touchpoints, each with the condition under which it can go. Contract-tested.

Left out: what TRL documents as public.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from typing import Any


class TargetAnchor:
    """Stands for the target where TRL asks for a reference model.

    TRL reads `ref_model` only to hand it to `_get_per_token_logps_and_entropies`, which PPOWTrainer answers from the
    verification that has run already. Can go when TRL lets a rollout return reference log-probabilities.
    """


def silence_rollout_warning() -> None:
    """TRL warns that `rollout_func` is experimental at every start; our contract tests watch it instead.

    Can go when TRL calls it stable.
    """
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")


def silence_telemetry() -> None:
    """TRL tells the Hugging Face Hub at the start of every trainer what it runs on; nobody asked for that here.

    `HF_HUB_DISABLE_TELEMETRY=0` in the environment lets it. The constant is set too: the Hub's client has read the
    variable when it was imported. Can go when TRL asks before it sends.
    """
    from huggingface_hub import constants

    if os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1") != "0":
        constants.HF_HUB_DISABLE_TELEMETRY = True


def ensure_generation_config(model: Any) -> None:
    """TRL writes pad and end tokens into `model.generation_config`, which a head that cannot `generate` lacks.

    Can go when speculators' models carry one, or TRL stops writing to it for a `rollout_func`.
    """
    from transformers import GenerationConfig

    if not hasattr(model, "generation_config"):
        model.generation_config = GenerationConfig()


@contextlib.contextmanager
def output_layer_unnamed(model: Any, wanted: bool) -> Iterator[None]:
    """TRL refuses LoRA on the layer that a model names as its output: its own forward reads the weight past the LoRA.

    Windows call that layer itself (drafters/), and TRL's forward is never asked for them. Only while a trainer is built
    the model names none, if it is `wanted`. Can go when TRL refuses only where its own forward is used.
    """
    if not wanted:
        yield
        return
    model.get_output_embeddings = lambda: None
    try:
        yield
    finally:
        del model.get_output_embeddings


def keep_embeddings_out(peft_model: Any) -> None:
    """PEFT writes embeddings and output layer, frozen, into every training state once LoRA is on the output layer.

    Can go when the Trainer of transformers lets its callers say what `save_pretrained` is given.
    """
    peft_model.save_pretrained = functools.partial(peft_model.save_pretrained, save_embedding_layers=False)


def silence_import_warnings() -> None:
    """What importing TRL does to vLLM and prints of it, though vLLM is not used here (`use_vllm` stays off).

    TRL 1.16 warns of every vLLM past 0.31, and the import of vLLM that it sets off tells a CPU that Triton cannot use
    it. Can go when TRL looks at vLLM only if it is used.
    """
    import logging
    import warnings

    warnings.filterwarnings("ignore", message="TRL currently supports vLLM versions")
    # vLLM's own default: TRL would put ERROR into the environment, and every engine started from here would inherit it.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")
    logging.getLogger("vllm.triton_utils.importing").setLevel(logging.ERROR)
