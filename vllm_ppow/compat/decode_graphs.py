"""Lets every decode step of the V2 model runner replay the full CUDA graph that was captured for its draft length.

vLLM lists, for each number of tokens, only the graphs of the next captured size, and a graph serves one query length
(draft length + 1) only. With one draft length the next size is always the right one. With several, sizes of different
lengths interleave: the next one often belongs to another length, and the step falls back to piecewise graphs, attention
eager, though a full one of its own length lies a little higher: with lengths 0 to 8 and up to 64 requests for more than
a quarter of all pairs of batch size and length (tests/serving/test_decode_graphs.py). Here the next graph of each
length is listed as well. What a graph may serve is decided by vLLM as before, so output cannot change. Can go when
vllm-project/vllm#56136, which is open, has come: then nothing is added. Left out: lengths without a graph
(compat/window.py), and the V1 model runner, which has no full graphs for lengths that change.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from vllm_ppow.compat import seams
from vllm_ppow.compat.engine_args import serves_ppow
from vllm_ppow.compat.window import TABLE

_CANDIDATES = ("vllm.v1.worker.gpu.cudagraph_utils", "CudaGraphManager", "_init_candidates")


def install() -> None:
    """Wrap where the V2 model runner lists its graphs; without it steps are slower, and a warning says so."""
    try:
        seams.wrap(*_CANDIDATES, ("self",), _listing_each_length)
    except seams.SeamMissingError as error:
        seams.logger.warning("Some draft lengths may run without full CUDA graphs: %s", error)


def _listing_each_length(original: Callable[..., Any]) -> Callable[..., Any]:
    def _init_candidates(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        speculative = self.vllm_config.speculative_config
        if not serves_ppow(speculative) or getattr(speculative, TABLE, None) is None:
            return
        try:
            complete(self._capture_descs, self._candidates)
        except Exception as error:  # a vLLM that lists otherwise: what it lists serves, slower perhaps
            seams.logger.warning("Some draft lengths may run without full CUDA graphs: %r", error)

    return _init_candidates


def complete(captured: dict[Any, list[Any]], candidates: dict[tuple[int, int], list[Any]]) -> int:
    """List, for each number of tokens, the smallest graph of every query length that is not smaller.

    Args:
        captured: descriptors of graphs by mode; those with a query length of their own (uniform_token_count) are looked
            at.
        candidates: descriptors to try in this order by (tokens, active LoRAs); changed in place. Graphs that serve any
            length stay last.

    Returns:
        how many entries were added.
    """
    added = 0
    uniform = [desc for descs in captured.values() for desc in descs if desc.uniform_token_count is not None]
    kinds: dict[Any, list[Any]] = defaultdict(list)
    for desc in sorted(uniform, key=lambda desc: desc.num_tokens):
        kinds[dataclasses.replace(desc, num_tokens=0, num_reqs=None)].append(desc)
    for descs in kinds.values():
        for before, desc in itertools.pairwise([None, *descs]):
            for tokens in range(before.num_tokens + 1 if before else 0, desc.num_tokens + 1):
                listed = candidates.setdefault((tokens, desc.num_active_loras), [])
                if desc not in listed:
                    first_general = (i for i, one in enumerate(listed) if one.uniform_token_count is None)
                    listed.insert(next(first_general, len(listed)), desc)
                    added += 1
    return added
