"""What the steps of an engine in this process took, and whether a full GPU held them up.

Left out: passes and processes (serving_eval.py), what a step's parts take (vllm_ppow/compat/profiling.py).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def timed_steps(engine: Any) -> Iterator[list[float]]:
    """Seconds of every step of an LLMEngine inside the block, in order."""
    seconds: list[float] = []
    step = engine.step

    def timed() -> Any:
        began = time.perf_counter()
        try:
            return step()
        finally:
            seconds.append(time.perf_counter() - began)

    engine.step = timed
    try:
        yield seconds
    finally:
        del engine.step  # the method shows again


def allocation_retries() -> int:
    """Times since this process began that PyTorch found its GPU full and gave back what it kept; 0 without a GPU."""
    import torch

    return int(torch.cuda.memory_stats().get("num_alloc_retries", 0)) if torch.cuda.is_available() else 0
