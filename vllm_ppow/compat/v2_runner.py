"""What the V2 model runner of the installed vLLM can do, asked of its code. Left out: whether it is the one in use."""

from __future__ import annotations

import dis
import importlib
import inspect
from collections.abc import Callable
from typing import Any


def drafts_as_scheduled() -> bool:
    """Whether it heeds the draft length in a SchedulerOutput (vLLM >= 0.32); the V1 runner always does.

    Draft models are an exception: `shortens_draft_models`.
    """
    try:
        runner = importlib.import_module("vllm.v1.worker.gpu.model_runner")
    except ImportError:
        return False
    kept = getattr(runner, "ExecuteModelState", None)  # what it remembers of a step until it samples
    return "num_spec_tokens_to_schedule" in getattr(kept, "_fields", ())


def shortens_draft_models() -> bool:
    """Whether its draft models, too, make no more passes than a step's draft length asks for (vLLM 0.33: not yet).

    Where they do not, a shorter draft saves its verification only. Asked of the code: whether the argument is read.
    """
    try:
        speculator = importlib.import_module("vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator")
    except ImportError:
        return False
    return reads_draft_length(speculator.StandaloneARSpeculator.propose)


def reads_draft_length(propose: Callable[..., Any]) -> bool:
    """Whether a speculator's `propose` does anything with the draft length that it is given."""
    return any(
        instruction.argval == "num_speculative_tokens" and instruction.opname.startswith("LOAD_")
        for instruction in dis.get_instructions(inspect.unwrap(propose))
    )


def draws_independently() -> bool:
    """Whether the draw in place of a rejected token is independent of the one that made the draft (vLLM >= 0.31).

    Rejection sampling needs it where drafts are sampled; vllm-project/vllm#54282 gave drafts a stream of their own.
    """
    try:
        gumbel = importlib.import_module("vllm.v1.worker.gpu.sample.gumbel")
    except ImportError:
        return False
    return "is_drafting" in inspect.signature(gumbel.gumbel_sample).parameters
