"""Engines of the GPU benchmark in this process, one at a time: greedy output, counts.

Left out: engines whose speed is compared (arms.py), which ones there are (steps.py), models (random_pair.py).
"""

from __future__ import annotations

import contextlib
import gc
import platform
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from ppow_train.serving_eval import clearness

PROMPT_TOKENS = 32


def environment() -> dict[str, str]:
    """Date, card and versions, for every result."""
    import torch
    import vllm

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})"
    versions = {}
    for name in ("torch", "transformers", "trl", "vllm-ppow"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "card": card,
        "vllm": vllm.__version__,
        **versions,
    }


@contextlib.contextmanager
def engine(target: Path, spec: dict[str, Any] | None, **options: Any) -> Iterator[Any]:
    """An `LLM` in this process; its memory is freed at the end."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        str(target),
        speculative_config=spec,
        **{
            "dtype": "bfloat16",
            "logprobs_mode": "raw_logits",  # what a tie is depends on the logits' magnitude
            "skip_tokenizer_init": True,
            "enable_prefix_caching": False,
            "disable_log_stats": False,
            "seed": 0,
            **options,
        },
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def prompts(number: int, vocab_size: int) -> list[list[int]]:
    """Token ids of prompts that differ from their first token on, [number][PROMPT_TOKENS]."""
    return [[(7 * i + 3 * j + 5) % (vocab_size - 8) + 4 for j in range(PROMPT_TOKENS)] for i in range(number)]


def greedy(
    llm: Any, ids: Sequence[Sequence[int]], max_tokens: int
) -> tuple[list[list[int]], list[list[float]], list[list[float]]]:
    """Greedy continuations; at each token the gap in nats between the two best, and up to which gap it is a tie.

    Requests start together and end together, so that every step holds the same number of them.
    """
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, logprobs=2
    )
    outputs = llm.generate([{"prompt_token_ids": list(one)} for one in ids], params, use_tqdm=False)
    tokens = [list(one.outputs[0].token_ids) for one in outputs]
    return tokens, *clearness(llm, [one.outputs[0].logprobs for one in outputs])


def counts(llm: Any) -> Any:
    """What vLLM counted since the engine started (SpecDecodeCounts); None without speculation."""
    from vllm_ppow.metrics import SpecDecodeCounts

    try:
        return SpecDecodeCounts.from_metrics(llm.get_metrics())
    except ValueError:
        return None
