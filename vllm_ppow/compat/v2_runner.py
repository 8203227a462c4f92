"""What the V2 model runner of the installed vLLM can do, asked of its code. Left out: whether it is the one in use."""

from __future__ import annotations

import importlib


def drafts_as_scheduled() -> bool:
    """Whether it heeds the draft length in a SchedulerOutput (vLLM >= 0.32); the V1 runner always does."""
    try:
        runner = importlib.import_module("vllm.v1.worker.gpu.model_runner")
    except ImportError:
        return False
    kept = getattr(runner, "ExecuteModelState", None)  # what it remembers of a step until it samples
    return "num_spec_tokens_to_schedule" in getattr(kept, "_fields", ())
