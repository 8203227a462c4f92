"""Logits of a drafter whose sums overflow: rows that are no distribution, and all others untouched."""

from __future__ import annotations

import pytest
import torch

from vllm_ppow.finite_logits import guard, usable

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_a_distribution_is_handed_on_as_it_is(dtype):
    logits = torch.tensor([[1.0, -INF, 3.0], [-1e4, 2.0, -INF]], dtype=dtype)
    assert usable(logits) is logits


@pytest.mark.parametrize(
    "row", [[NAN, 0.0, 1.0], [INF, 0.0, 1.0], [INF, -INF, NAN], [-INF, -INF, -INF], [1e31, 0.0, 0.0]]
)
def test_what_is_none_is_uniform(row):
    good = [0.5, -INF, 2.0]
    logits = usable(torch.tensor([row, good, row]))
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
