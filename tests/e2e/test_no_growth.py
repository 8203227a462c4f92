"""What an engine keeps of requests that have ended: nothing. Half a day of traffic is more than a server's memory."""

from __future__ import annotations

import gc
import random
import tracemalloc

import pytest
import torch
from serving_engine import engine
from serving_pair import random_lora, save_adapter

pytestmark = pytest.mark.engine

ROUND = 32  # requests that are sent together
ROUNDS = 12
# Of a request, in the mean: much less than its bookkeeping is in vLLM. Tables of bounded size, the
# window's and those of vLLM's own metrics, still fill meanwhile.
KEPT_BYTES = 200


@pytest.fixture(scope="module")
def served(pair, tmp_path_factory):
    """An engine with an adaptive window, that has seen requests enough for its tables to be large."""
    from ppow_train.drafters import load_drafter

    drafter = load_drafter(pair.eagle3, dtype=torch.bfloat16, target=pair.target).model
    directory = tmp_path_factory.mktemp("kept") / "adapter"
    adapter = save_adapter(directory, random_lora(drafter, 1e-3), "eagle3", pair.eagle3, pair.target)
    spec = {"method": "ppow", "model": str(adapter.directory), "num_speculative_tokens": 4}
    with engine(pair.target, spec, max_num_seqs=8) as llm:
        send(llm, ROUNDS)
        yield llm


def send(llm, rounds: int) -> None:
    """Greedy and sampled requests of many lengths, one in eight of them aborted before its first step."""
    from vllm import SamplingParams

    draw = random.Random(0)
    for _ in range(rounds):
        for number in range(ROUND):
            tokens = [draw.randrange(5, 100) for _ in range(draw.randrange(3, 24))]
            params = SamplingParams(
                temperature=draw.random() < 0.5, max_tokens=draw.randrange(1, 12), ignore_eos=True
            )
            name = f"{draw.random()}"
            llm.llm_engine.add_request(name, {"prompt_token_ids": tokens}, params)
            if not number % 8:
                llm.llm_engine.abort_request([name])
        while llm.llm_engine.has_unfinished_requests():
            llm.llm_engine.step()


def kept_bytes(llm) -> float:
    """Python memory that a request leaves behind, in bytes, over `ROUNDS` rounds."""
    gc.collect()
    tracemalloc.start()
    try:
        send(llm, ROUNDS // 2)  # what was made before tracing began is replaced
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        send(llm, ROUNDS)
        gc.collect()
        return (tracemalloc.get_traced_memory()[0] - before) / (ROUND * ROUNDS)
    finally:
        tracemalloc.stop()


def test_requests_leave_nothing_behind(served):
    assert kept_bytes(served) < KEPT_BYTES


def test_the_measure_finds_a_window_that_keeps_what_it_is_told(served, monkeypatch):
    kind = type(served.llm_engine.engine_core.engine_core.scheduler.ppow_window)
    kept, observe = [], kind.observe_draft

    def keeping(self, *told):
        kept.append(told)
        return observe(self, *told)

    monkeypatch.setattr(kind, "observe_draft", keeping)
    assert kept_bytes(served) > KEPT_BYTES
