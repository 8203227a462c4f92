"""Engines for tests: started in this process with little memory, and shut down so that the next one can start."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROMPTS = [[5, 6, 7, 8], [100, 200, 44], [9]]
MAX_TOKENS = 24


@contextlib.contextmanager
def engine(target: Path, speculative_config: dict[str, Any] | None, **options: Any) -> Iterator[Any]:
    """An `LLM` on the target; whatever happens, its resources are freed at the end."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = None
    try:
        llm = LLM(
            str(target),
            speculative_config=speculative_config,
            **{
                "dtype": "bfloat16",
                "enforce_eager": True,
                "max_model_len": 128,
                "max_num_seqs": 4,
                "disable_log_stats": False,
                **_little_of_a_gpu(),
                **options,
            },
        )
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def _little_of_a_gpu() -> dict[str, Any]:
    """On a GPU tests of several processes run beside each other: none takes what vLLM would, and none measures it."""
    import torch

    if not torch.cuda.is_available():
        return {}
    return {"kv_cache_memory_bytes": 2**29, "gpu_memory_utilization": 0.02}


def generate(llm: Any, temperature: float = 0.0) -> list[list[int]]:
    """Token ids that the engine continues PROMPTS with."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=temperature, max_tokens=MAX_TOKENS, ignore_eos=True, seed=0)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def expected(vocab: int) -> list[list[int]]:
    """The continuations of PROMPTS by the target of serving_pair: every token is followed by its successor."""
    return [[(ids[-1] + 1 + i) % vocab for i in range(MAX_TOKENS)] for ids in PROMPTS]
