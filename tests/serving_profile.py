"""A cost profile whose figures are known beforehand, and an adapter to put it beside, for tests of what reads them."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from vllm_ppow.artifact import Adapter, AdapterConfig, ModelRef, write_adapter
from vllm_ppow.cost_profile import CostProfile

CONTEXTS, BATCHES, LENGTHS = (64, 256), (1, 4, 8), (0, 1, 2, 4)
DRAFT_STEP, TARGET_STEP = 0.001, 0.010  # seconds at batch 1; γ = 0.1


def target(context: int, batch: int, length: int) -> float:
    """10 ms, and a little per token, request and token of context."""
    return TARGET_STEP + 0.0004 * batch * length + 0.0002 * (batch - 1) + 1e-6 * (context - 64)


def draft(context: int, batch: int, length: int) -> float:
    """A first pass of 2 ms, then 1 ms per further token; both grow with the batch."""
    return (0.0015 if length == 0 else 0.002 + DRAFT_STEP * (length - 1)) * (1 + 0.05 * (batch - 1))


def overhead(context: int, batch: int, length: int) -> float:
    """1 ms, and a little per request."""
    return 0.001 + 0.0001 * batch


def _grid(seconds):
    return tuple(tuple(tuple(seconds(c, b, n) for n in LENGTHS) for b in BATCHES) for c in CONTEXTS)


PROFILE = CostProfile(
    vllm_version="0.32.0",
    device="a CPU",
    dtype="bfloat16",
    tensor_parallel_size=1,
    target_fingerprint="sha256:" + "1" * 64,
    adapter_fingerprint="sha256:" + "2" * 64,
    num_speculative_tokens=4,
    context_lengths=CONTEXTS,
    batch_sizes=BATCHES,
    draft_lengths=LENGTHS,
    target_step_seconds=_grid(target),
    draft_seconds=_grid(draft),
    overhead_seconds=_grid(overhead),
    acceptance_per_position=(0.8, 0.6, 0.4, 0.2),
    num_drafts=100,
)


def plain_adapter(directory: Path, value: float = 0.0) -> Adapter:
    """An adapter that is right by its files, of models that do not exist."""

    def write_peft(path: Path) -> None:
        save_file({"a": torch.full((8, 2), value)}, path / "adapter_model.safetensors")
        (path / "adapter_config.json").write_text("{}")

    config = AdapterConfig(
        drafter_type="eagle3",
        base_drafter=ModelRef("org/drafter", "sha256:1"),
        target=ModelRef("org/target", "sha256:2"),
        num_speculative_tokens=4,
        draft_cost_ratio=0.1,
        draft_sample_method="greedy",
        temperature=0.0,
    )
    return write_adapter(directory, config, write_peft)
