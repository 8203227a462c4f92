"""Sampled output keeps the target's distribution under speculation, and the test notices when it does not.

One prompt, many samples: the second output token is the first that speculation decides. Its exact distribution comes
from enumerating every first token with Hugging Face. Left out: longer sequences.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from serving_engine import engine

pytestmark = pytest.mark.engine

TINY = Path(__file__).parents[2] / "examples" / "tiny"
PROMPT = [40, 300, 17, 5, 900, 61, 12, 8]
SAMPLES, SHOWN = 3000, 25
# Beyond the 99.99 % point of chi-square with SHOWN degrees of freedom: 59.
LIMIT = 60.0


@pytest.fixture(scope="module")
def exact() -> torch.Tensor:
    """P(second token), float64 [V]: Σ over first tokens of p(first) · p(second | first)."""
    from transformers import AutoModelForCausalLM

    # bf16 as the engine runs it: the two must be one distribution.
    model = AutoModelForCausalLM.from_pretrained(
        TINY / "target", dtype=torch.bfloat16, use_safetensors=True
    ).eval()
    vocab = model.config.vocab_size
    prompts = torch.tensor(PROMPT).repeat(vocab, 1)
    with torch.no_grad():
        first = model(prompts[:1]).logits[0, -1].double().softmax(-1)
        likely = (first > 1e-6).nonzero().squeeze(-1)
        rows = torch.cat([prompts[: len(likely)], likely[:, None]], dim=1)
        second = torch.cat([model(part).logits[:, -1].double().softmax(-1) for part in rows.split(256)])
    return (first[likely, None] * second).sum(0) / first[likely].sum()


def chi_square(tokens: list[int], expected: torch.Tensor) -> float:
    """Pearson's statistic over the likeliest tokens and all others together."""
    top = expected.topk(SHOWN).indices
    counts = torch.bincount(torch.tensor(tokens), minlength=len(expected)).double()
    observed = torch.cat([counts[top], (counts.sum() - counts[top].sum())[None]])
    share = torch.cat([expected[top], (1 - expected[top].sum())[None]])
    wanted = share * len(tokens)
    return float(((observed - wanted) ** 2 / wanted).sum())


def second_tokens(spec: dict) -> list[int]:
    """The second output token of SAMPLES sampled continuations."""
    from vllm import SamplingParams

    with engine(TINY / "target", spec, max_num_seqs=64, seed=1, dtype="auto") as llm:
        sampling = SamplingParams(temperature=1.0, max_tokens=3, ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": PROMPT}] * SAMPLES, sampling, use_tqdm=False)
    return [output.outputs[0].token_ids[1] for output in outputs]


def spec(method: str) -> dict:
    return {
        "method": "eagle3",
        "model": str(TINY / "eagle3"),
        "num_speculative_tokens": 2,
        "draft_sample_method": method,
    }


@pytest.mark.parametrize("method", ["probabilistic", "greedy"])
def test_sampled_output_keeps_the_targets_distribution(exact, method):
    assert chi_square(second_tokens(spec(method)), exact) < LIMIT


def test_a_lossy_sampler_is_noticed(exact, monkeypatch):
    from vllm.v1.sample import rejection_sampler

    from vllm_ppow.compat import cpu_sampling

    monkeypatch.setattr(cpu_sampling, "install", lambda: False)
    monkeypatch.setattr(  # what uninitialised memory may hold
        rejection_sampler,
        "expand_batch_to_tokens",
        lambda x, cu_num_tokens, num_tokens, **_: x.new_full((num_tokens,), 0.5),
    )
    assert chi_square(second_tokens(spec("probabilistic")), exact) > LIMIT
