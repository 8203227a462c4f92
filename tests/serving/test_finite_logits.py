"""Logits of a drafter whose sums overflow: rows that are no distribution, and all others untouched."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.spec_decode.llm_base_proposer import compute_probs_and_sample_next_token

from vllm_ppow.finite_logits import guard, usable

INF, NAN = float("inf"), float("nan")


DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_a_distribution_is_handed_on_as_it_is(dtype):
    logits = torch.tensor([[1.0, -INF, 3.0], [-1e4, 2.0, -INF]], dtype=dtype)
    assert usable(logits).equal(logits)
    assert (usable(logits) is logits) == (dtype != torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", [[6e4, 0.0, 1.0], [NAN, 0.0, 1.0], [INF, 0.0, 1.0], [-INF, -INF, -INF]])
def test_vllm_draws_from_a_distribution_at_its_least_temperature(row, dtype):
    sampling = SimpleNamespace(
        all_greedy=False, all_random=True, temperature=torch.tensor([0.01]), generators={}
    )
    logits = usable(torch.tensor([row], dtype=dtype))
    _, probabilities = compute_probs_and_sample_next_token(logits, sampling)
    assert probabilities.isfinite().all()
    assert probabilities.sum() == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "row", [[NAN, 0.0, 1.0], [INF, 0.0, 1.0], [INF, -INF, NAN], [-INF, -INF, -INF], [1e31, 0.0, 0.0]]
)
def test_what_is_none_is_uniform(row, dtype):
    good = [0.5, -INF, 2.0]
    logits = usable(torch.tensor([row, good, row], dtype=dtype))
    assert logits.tolist() == [[0.0] * 3, good, [0.0] * 3]
    assert (logits / 1e-5).softmax(-1).isfinite().all()


def test_a_guarded_drafter():
    class Drafter(torch.nn.Module):
        def compute_logits(self, hidden_states, spec_step_idx=0):
            return hidden_states if spec_step_idx == 0 else None

    model = Drafter()
    guard(model)
    assert model.compute_logits(torch.tensor([[NAN, 1.0]])).tolist() == [[0.0, 0.0]]
    assert model.compute_logits(torch.tensor([[2.0, 1.0]]), spec_step_idx=1) is None
