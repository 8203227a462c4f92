"""Objectives on target paths: supervised losses and their position weights against formulas, gradients, names.

That `exact` and `overlap` are what they claim is shown by enumeration in test_verification.py.
"""

from __future__ import annotations

import math

import pytest
import torch

from ppow_train.objectives import CST_LOSSES, PathWindows, make_objective


@pytest.fixture
def windows() -> PathWindows:
    generator = torch.Generator().manual_seed(0)
    target, draft = torch.randn(2, 5, 3, 7, generator=generator) * 1.5
    tokens = torch.randint(7, (5, 3), generator=generator)
    return PathWindows(tokens, target, draft.requires_grad_())


def per_token(name: str, p: list[float], q: list[float]) -> float:
    """Each loss of one token from its definition."""

    def kl(one: list[float], other: list[float]) -> float:
        return sum(x * math.log(x / y) for x, y in zip(one, other, strict=True))

    overlap = sum(min(x, y) for x, y in zip(p, q, strict=True))
    middle = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
    return {
        "ce": -math.log(q[p.index(max(p))]),
        "kl_div": kl(p, q),
        "rkl": kl(q, p),
        "jsd": (kl(p, middle) + kl(q, middle)) / 2,
        "tv": 1 - overlap,
        "nla": -math.log(overlap),
        "lk_hybrid": math.exp(-3 * overlap) * kl(p, q) + (1 - math.exp(-3 * overlap)) * (1 - overlap),
    }[name]


@pytest.mark.parametrize("decay", [1.0, 0.7])
@pytest.mark.parametrize("name", CST_LOSSES)
def test_supervised_losses(name, decay, windows):
    """Mean over windows of Σ_i decay^i · loss_i, the weights summing to one."""
    total = 0.0
    weights = [decay**i / sum(decay**j for j in range(3)) for i in range(3)]
    for n in range(5):
        for i in range(3):
            p, q = (
                logits[n, i].softmax(-1).tolist() for logits in (windows.target_logits, windows.draft_logits)
            )
            total += weights[i] * per_token(name, p, q) / 5
    ours = make_objective(f"cst:{name}", 0.12, decay)(windows)
    assert ours.item() == pytest.approx(total, rel=1e-4)


def test_an_alias_is_the_same_loss(windows):
    one, other = (make_objective(name, 0.12, 0.7)(windows) for name in ("cst:kl", "cst:kl_div"))
    assert one.equal(other)


@pytest.mark.parametrize("name", ["exact", "overlap", *(f"cst:{loss}" for loss in CST_LOSSES)])
def test_every_objective_moves_every_position(name, windows):
    """And is lower at the target itself."""
    objective = make_objective(name, 0.12, 0.7)
    (gradient,) = torch.autograd.grad(objective(windows), windows.draft_logits)
    assert (gradient.abs().amax(dim=(0, 2)) > 1e-4).all()
    agreed = PathWindows(windows.tokens, windows.target_logits, windows.target_logits)
    assert objective(agreed) < objective(windows)


def test_window_objectives_weigh_the_cost(windows):
    """With the target as draft everything is accepted: both are −R_speedup(K)."""
    agreed = PathWindows(windows.tokens, windows.target_logits, windows.target_logits)
    for name in ("exact", "overlap"):
        assert make_objective(name, 0.5, 1.0)(agreed).item() == pytest.approx(-3 / 2.5, rel=1e-5)
        assert make_objective(name, 0.0, 1.0)(agreed).item() == pytest.approx(-3, rel=1e-5)


def test_published_ppow_is_no_objective_on_target_paths():
    with pytest.raises(ValueError, match="ppow is not an objective on target paths"):
        make_objective("ppow", 0.12, 0.7)
