"""What the V2 model runner of the installed vLLM can do, asked of its code. Left out: whether it is the one in use."""

from __future__ import annotations

import importlib
import inspect


def drafts_as_scheduled() -> bool:
    """Whether it heeds the draft length in a SchedulerOutput (vLLM >= 0.32); the V1 runner always does."""
    try:
        runner = importlib.import_module("vllm.v1.worker.gpu.model_runner")
    except ImportError:
        return False
    kept = getattr(runner, "ExecuteModelState", None)  # what it remembers of a step until it samples
    return "num_spec_tokens_to_schedule" in getattr(kept, "_fields", ())


def draws_independently() -> bool:
    """Whether the draw in place of a rejected token is independent of the one that made the draft (vLLM >= 0.31).

    Rejection sampling needs it where drafts are sampled; vllm-project/vllm#54282 gave drafts a stream of their own.
    """
    try:
        gumbel = importlib.import_module("vllm.v1.worker.gpu.sample.gumbel")
    except ImportError:
        return False
    return "is_drafting" in inspect.signature(gumbel.gumbel_sample).parameters
