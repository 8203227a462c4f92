"""A request close to max_model_len does not stop the drafting of its neighbours, or its own up to its last token.

The causal LM drafter of serving_pair is always right: every token that is drafted must be accepted. Left out: what the
drafter's passes past the maximum length do (tests/contracts).
"""

from __future__ import annotations

import pytest
from serving_engine import engine
from serving_pair import VOCAB, random_adapter

from vllm_ppow.compat import draft_room, seams
from vllm_ppow.metrics import SpecDecodeCounts

pytestmark = pytest.mark.engine

MAX_MODEL_LEN, PROMPT_TOKENS, NUM_SPECULATIVE_TOKENS = 40, (4, 12, 20, 28), 6


@pytest.fixture(scope="module")
def adapter(pair, tmp_path_factory):
    """An adapter that changes next to nothing."""
    return random_adapter(tmp_path_factory.mktemp("room"), "causal_lm", pair, scale=1e-4)


def fill_up(pair, adapter, window="fixed") -> tuple[list[list[int]], SpecDecodeCounts]:
    """Outputs of four requests that end at max_model_len one after the other, and vLLM's counts."""
    from vllm import SamplingParams

    spec = {
        "method": "ppow",
        "model": str(adapter.directory),
        "num_speculative_tokens": NUM_SPECULATIVE_TOKENS,
        "ppow": {"window": "fixed"} if window == "fixed" else {"min_tokens": NUM_SPECULATIVE_TOKENS},
    }
    prompts = [{"prompt_token_ids": [7 + i for i in range(length)]} for length in PROMPT_TOKENS]
    with engine(pair.target, spec, max_model_len=MAX_MODEL_LEN) as llm:
        sampling = SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True)
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        counts = SpecDecodeCounts.from_metrics(llm.get_metrics())
    return [list(output.outputs[0].token_ids) for output in outputs], counts


WANTED = [[(7 + i) % VOCAB for i in range(length, MAX_MODEL_LEN)] for length in PROMPT_TOKENS]


@pytest.mark.parametrize("window", ["fixed", "adaptive"])
def test_everything_drafted_is_accepted_up_to_the_last_token(pair, adapter, window):
    output, counts = fill_up(pair, adapter, window)
    assert output == WANTED
    assert counts.num_draft_tokens > 0
    assert counts.num_accepted_tokens == counts.num_draft_tokens
    # Each request takes as few steps as its length needs: one token at prefill, then seven at a time.
    steps = [-(-(MAX_MODEL_LEN - length - 1) // (NUM_SPECULATIVE_TOKENS + 1)) for length in PROMPT_TOKENS]
    assert counts.num_drafts <= sum(steps)
    # Beside the token of prefill, none came from a step that drafted nothing.
    tokens = sum(map(len, output))
    assert tokens - len(output) - counts.num_drafts - counts.num_accepted_tokens == 0


def test_without_it_vllm_verifies_zeros_near_the_end(pair, adapter, monkeypatch):
    """When this fails, vLLM decides per request itself, and compat/draft_room.py can go."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    module, owner, method = draft_room._RUNNER
    bare = seams._installed.get((module, owner, method), getattr(GPUModelRunner, method))
    monkeypatch.setattr(draft_room, "install", lambda: None)
    monkeypatch.setattr(GPUModelRunner, method, bare)
    output, counts = fill_up(pair, adapter)
    assert output == WANTED
    assert counts.num_accepted_tokens < 0.7 * counts.num_draft_tokens
