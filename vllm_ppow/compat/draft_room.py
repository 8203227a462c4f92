"""Keeps drafting for the whole batch when one request comes close to the maximum length.

vLLM's V1 model runner asks once per step whether K more tokens of the *longest* request fit the drafter; if not, it
drafts nothing for any request: it verifies K zeros each instead, and the drafter's KV cache misses that step for good,
prompts that were being prefilled included. But only the drafter's first pass must fit: the passes after it clamp each
request by itself, and the scheduler cuts the drafts of each request to the room it has left. Whether they are clamped
is asked of the function itself, with numbers, on the device it runs on. Output is the target's with and without this.
Can go when vLLM decides per request. Left out: the V2 model runner, which has no such question, and drafters that are
shorter than the target.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from vllm_ppow.compat import seams
from vllm_ppow.compat.engine_args import serves_ppow

_RUNNER = ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner", "_input_fits_in_drafter")
_STEP = (
    "vllm.v1.spec_decode.utils",
    "eagle_step_update_slot_mapping_and_metadata",
    (
        "positions_1d",
        "block_table_tensor",
        "seq_lens",
        "block_size",
        "max_model_len",
        "out_clamped_positions",
        "out_slot_mapping",
    ),
)


def install() -> None:
    """Wrap the V1 model runner's question; without it or without clamping, vLLM's own answer stands, with a warning."""
    try:
        seams.find_function(*_STEP)
        seams.wrap(*_RUNNER, ("self", "common_attn_metadata"), _asking_for_the_first_pass_only)
    except seams.SeamMissingError as error:
        seams.logger.warning("Requests close to max_model_len stop the drafting of all others: %s", error)


def _asking_for_the_first_pass_only(original: Callable[..., Any]) -> Callable[..., Any]:
    def _input_fits_in_drafter(self: Any, common_attn_metadata: Any) -> bool:
        if (
            original(self, common_attn_metadata)
            or common_attn_metadata is None
            or not serves_ppow(self.speculative_config)
            or self.effective_drafter_max_model_len < self.max_model_len
            or self.speculative_config.parallel_drafting  # whose one pass takes K tokens as inputs
            or not clamps(self.device)
        ):
            return original(self, common_attn_metadata)
        # A draft model's first pass takes the sampled token as one more input.
        more = 1 if self.speculative_config.uses_draft_model() else 0
        return common_attn_metadata.max_seq_len + more <= self.max_model_len

    return _input_fits_in_drafter


def longest_drafted(vllm_config: Any) -> int | None:
    """How long the longest request of a step may be, draft tokens included, for the step to draft; None: any length.

    The worker is asked the same; where it says no, it verifies zeros in place of drafts. The V2 model runner asks
    nothing, and vLLM lengthens the position tables of EAGLE-3 heads to the target's, but not those of draft models.
    """
    speculative = vllm_config.speculative_config
    drafter, target = speculative.draft_model_config.max_model_len, vllm_config.model_config.max_model_len
    is_draft_model = speculative.uses_draft_model()
    if vllm_config.use_v2_model_runner and not is_draft_model:
        return None
    if drafter < target or speculative.parallel_drafting or not _can_install():
        return drafter - speculative.num_speculative_tokens
    return target - (1 if is_draft_model else 0)


def _can_install() -> bool:
    """Asked where the scheduler runs, which the workers need not do."""
    try:
        seams.find_function(*_STEP)
        seams.find(*_RUNNER, ("self", "common_attn_metadata"))
    except seams.SeamMissingError:
        return False
    return True


@functools.cache
def clamps(device: torch.device) -> bool:
    """Whether a draft step past the maximum length reads one token, writes none, and leaves other requests alone."""
    module = seams.find_function(*_STEP)
    positions, seq_lens = torch.tensor([3, 7], device=device), torch.tensor([4, 8], device=device).int()
    moved, slots = torch.full_like(positions, -7), torch.full_like(positions, -7)
    module.eagle_step_update_slot_mapping_and_metadata(
        positions_1d=positions,
        block_table_tensor=torch.tensor([[1, 2], [3, 4]], dtype=torch.int32, device=device),
        seq_lens=seq_lens,
        block_size=4,
        max_model_len=8,
        out_clamped_positions=moved,
        out_slot_mapping=slots,
        input_batch_size=2,
    )
    # Request 0 goes on at position 4, the first slot of its second block; request 1 has no position 8.
    return (moved.tolist(), slots.tolist(), seq_lens.tolist()) == ([4, 0], [8, -1], [5, 1])
