"""Every decode step of the V2 model runner finds the full graph of its draft length, and no other.

vLLM's own class lists the graphs and picks one; only capturing, which needs a GPU, is left out.
"""

from __future__ import annotations

import copy
import logging
from types import SimpleNamespace

import pytest

from vllm_ppow.compat import decode_graphs, v2_runner, window

MAX_NUM_SEQS, K = 64, 8
LARGEST = 512  # tokens of vLLM's largest graph on most GPUs

pytestmark = pytest.mark.skipif(
    not v2_runner.drafts_as_scheduled(), reason="this vLLM's V2 model runner has one draft length"
)


def capture_sizes() -> list[int]:
    """vLLM's defaults up to 512 tokens: its ladder, and some numbers of requests at every query length."""
    requests = [1, 2, 4, *range(8, MAX_NUM_SEQS + 1, 8)]
    of_lengths = [n * query for query in range(1, K + 2) for n in requests]
    ladder = [1, 2, 4, *range(8, 256, 8), *range(256, LARGEST + 1, 16)]
    return sorted({size for size in ladder + of_lengths if size <= LARGEST})


@pytest.fixture
def make():
    """A function from vLLM's table of draft lengths to its list of graphs, as if they were captured."""
    from vllm.config import CUDAGraphMode
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

    def build(table, load_format="ppow", maximum=K):
        manager = object.__new__(CudaGraphManager)
        manager.vllm_config = SimpleNamespace(
            num_speculative_tokens=maximum,
            cache_config=SimpleNamespace(use_kda_recoverssm=False),
            speculative_config=SimpleNamespace(
                num_speculative_tokens_per_batch_size=table,
                uses_dynamic_speculative_decoding=lambda: table is not None,
                draft_load_config=SimpleNamespace(load_format=load_format),
            ),
        )
        manager.compilation_config = SimpleNamespace(
            cudagraph_capture_sizes=capture_sizes(), max_cudagraph_capture_size=LARGEST
        )
        manager.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
        manager.max_num_reqs, manager.decode_query_len = MAX_NUM_SEQS, maximum + 1
        manager.varlen_decode, manager.ubatch_runner = False, None
        manager.lora_capture_cases, manager._lora_dispatch_map, manager._max_lora_case = [0], {}, 0
        manager._candidates, manager._capture_descs = {}, {}
        return manager

    return build


def listed(manager, mended: bool):
    """The same manager with its graphs listed."""
    list_candidates = type(manager)._init_candidates
    list_candidates = getattr(list_candidates, "__wrapped__", list_candidates)
    if mended:
        list_candidates = decode_graphs._listing_each_length(list_candidates)
    list_candidates(manager)
    manager._graphs_captured = True
    return manager


def modes(manager) -> dict[tuple[int, int], str]:
    """How each decode batch would run: (requests, draft length) -> FULL, PIECEWISE or NONE."""
    found = {}
    for batch in range(1, MAX_NUM_SEQS + 1):
        for length in range(manager.decode_query_len):
            tokens, query = batch * (length + 1), length + 1
            desc = manager.dispatch(batch, tokens, query, 0, max_query_len=query)
            if desc.cg_mode.name == "FULL":
                assert desc.uniform_token_count == query
                assert desc.num_tokens >= tokens
                assert desc.num_reqs >= batch
            found[batch, length] = desc.cg_mode.name
    return found


def test_every_length_finds_its_graph(make):
    table = window.table(list(range(K + 1)), MAX_NUM_SEQS)
    before = modes(listed(make(table), mended=False))
    after = modes(listed(make(table), mended=True))
    has_graph = {pair for pair in after if -(-pair[0] * (pair[1] + 1) // 16) * 16 + 16 <= LARGEST}
    missed = {pair for pair in has_graph if before[pair] != "FULL"}
    assert len(missed) > 0.25 * len(has_graph), "vLLM finds them itself (PR 56136): the mend can go"
    assert min(batch for batch, _ in missed) > 8, "README says so"
    assert {pair for pair in has_graph if after[pair] != "FULL"} == set()
    assert all(after[pair] == mode for pair, mode in before.items() if mode == "FULL")


def test_the_graph_is_the_smallest_that_will_do(make):
    """No more padding than with that draft length alone, which vLLM lists right."""
    several = listed(make(window.table(list(range(K + 1)), MAX_NUM_SEQS)), mended=True)
    alone = listed(make(None), mended=False)
    for batch in range(1, 56):
        tokens = batch * (K + 1)
        chosen, own = (m.dispatch(batch, tokens, K + 1, 0, max_query_len=K + 1) for m in (several, alone))
        assert (chosen.num_tokens, chosen.num_reqs) == (own.num_tokens, own.num_reqs)


def test_prefills_are_served_as_before(make):
    manager = listed(make(window.table([0, 1, 2, 3], MAX_NUM_SEQS), maximum=3), mended=True)
    for tokens in range(1, LARGEST + 1):
        assert manager.dispatch(3, tokens, None, 0, max_query_len=None).cg_mode.name == "PIECEWISE"


@pytest.mark.parametrize(("table", "load_format"), [(None, "ppow"), ([(1, 8, 3), (9, 64, 1)], "auto")])
def test_others_are_left_alone(make, table, load_format):
    ours = listed(make(table, load_format), mended=True)
    theirs = listed(make(table, load_format), mended=False)
    assert ours._candidates == theirs._candidates


def test_a_list_of_another_kind_stops_nothing(make, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    manager = make(window.table([0, 1, 2, 3], MAX_NUM_SEQS), maximum=3)
    wrapped = decode_graphs._listing_each_length(lambda self: setattr(self, "_capture_descs", [1]))
    wrapped(manager)
    assert "without full CUDA graphs" in caplog.text


def test_adding_twice_adds_nothing(make):
    manager = listed(make(window.table(list(range(K + 1)), MAX_NUM_SEQS)), mended=True)
    before = copy.deepcopy(manager._candidates)
    assert decode_graphs.complete(manager._capture_descs, manager._candidates) == 0
    assert manager._candidates == before
