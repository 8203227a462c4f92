"""Objectives on target paths: supervised losses and their position weights against formulas, gradients, sums.

That `exact` and `overlap` are what they claim is shown by enumeration in test_verification.py.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import pytest
import torch

from ppow_train.objectives.choose import Objective, make_objective
from ppow_train.objectives.names import CST_LOSSES
from ppow_train.objectives.path_windows import PathWindows
from ppow_train.options import PPOWOptions
from ppow_train.vocabulary import reduced_vocabulary

IDS = (6, 0, 3, 4)  # of 7 tokens, those that a reduced vocabulary can draft


@dataclasses.dataclass
class Case:
    """Random windows with the two distributions of every token as lists over the target's vocabulary."""

    windows: PathWindows
    draft_logits: torch.Tensor
    p: list[list[list[float]]]
    q: list[list[list[float]]]
    ids: tuple[int, ...]


def make_case(reduced: bool) -> Case:
    generator = torch.Generator().manual_seed(0)
    target, draft = torch.randn(2, 5, 3, 7, generator=generator) * 1.5
    tokens = torch.randint(7, (5, 3), generator=generator)
    p = target.softmax(-1).tolist()
    if not reduced:
        draft.requires_grad_()
        return Case(PathWindows(tokens, target, draft), draft, p, draft.softmax(-1).tolist(), tuple(range(7)))
    vocabulary = reduced_vocabulary(torch.tensor(IDS), 7)
    draft = draft[..., :4].clone().requires_grad_()
    q = torch.zeros(5, 3, 7)
    q[..., list(IDS)] = draft.detach().softmax(-1)
    windows = PathWindows(
        vocabulary.columns(tokens), vocabulary.with_rest(target), vocabulary.with_empty_rest(draft), True
    )
    return Case(windows, draft, p, q.tolist(), IDS)


@pytest.fixture(params=[False, True], ids=["full", "reduced"])
def case(request: Any) -> Case:
    return make_case(request.param)


@pytest.fixture
def windows() -> PathWindows:
    return make_case(reduced=False).windows


def objective_of(name: str, **options: Any) -> Objective:
    return make_objective(PPOWOptions(objective=name, **options))


def per_token(name: str, whole_p: list[float], whole_q: list[float], ids: tuple[int, ...]) -> float:
    """Each loss of one token from its definition; p is renormalised on what can be drafted, but not for the overlap."""
    inside = sum(whole_p[i] for i in ids)
    p, q = [whole_p[i] / inside for i in ids], [whole_q[i] for i in ids]

    def kl(one: list[float], other: list[float]) -> float:
        return sum(x * math.log(x / y) for x, y in zip(one, other, strict=True))

    overlap = sum(min(x, y) for x, y in zip(whole_p, whole_q, strict=True))
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
def test_supervised_losses(name, decay, case):
    """Mean over windows of Σ_i decay^i · loss_i, the weights summing to one."""
    total = 0.0
    weights = [decay**i / sum(decay**j for j in range(3)) for i in range(3)]
    for n in range(5):
        for i in range(3):
            total += weights[i] * per_token(name, case.p[n][i], case.q[n][i], case.ids) / 5
    ours = objective_of(f"cst:{name}", position_decay=decay)(case.windows)
    assert ours.item() == pytest.approx(total, rel=1e-4)


def test_an_alias_is_the_same_loss(windows):
    one, other = (objective_of(name)(windows) for name in ("cst:kl", "cst:kl_div"))
    assert one.equal(other)


@pytest.mark.parametrize("smoothing", [0.0, 0.5])
def test_drafts_per_token(smoothing, case):
    """Mean over windows of 1 / (1 + Σ_i Π_{l<=i} ((1 − s) overlap_l + s))."""
    total = 0.0
    for n in range(5):
        survival, kept = 1.0, 0.0
        for i in range(3):
            overlap = 1 - per_token("tv", case.p[n][i], case.q[n][i], case.ids)
            survival *= (1 - smoothing) * overlap + smoothing
            kept += survival
        total += 1 / (1 + kept) / 5
    ours = objective_of("drafts", survival_smoothing=smoothing)(case.windows)
    assert ours.item() == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("name", ["exact", "overlap", "drafts", *(f"cst:{loss}" for loss in CST_LOSSES)])
def test_every_objective_moves_every_position(name, case):
    """With finite gradients, also where its tokens cannot be drafted; and is lower at the target itself."""
    windows = case.windows
    objective = objective_of(name)
    (gradient,) = torch.autograd.grad(objective(windows), case.draft_logits)
    assert gradient.isfinite().all()
    assert (gradient.abs().amax(dim=(0, 2)) > 1e-4).all()
    agreed = windows.target_logits.clone()
    if windows.has_rest:
        assert (windows.tokens == len(IDS)).any(dim=0).all(), (
            "a token that cannot be drafted at every position"
        )
        agreed[..., -1] = float("-inf")
    assert objective(dataclasses.replace(windows, draft_logits=agreed)) < objective(windows)


def test_window_objectives_weigh_the_cost(windows):
    """With the target as draft everything is accepted: both are −R_speedup(K)."""
    agreed = PathWindows(windows.tokens, windows.target_logits, windows.target_logits)
    for name in ("exact", "overlap"):
        assert objective_of(name, draft_cost_ratio=0.5)(agreed).item() == pytest.approx(-3 / 2.5, rel=1e-5)
        assert objective_of(name, draft_cost_ratio=0.0)(agreed).item() == pytest.approx(-3, rel=1e-5)


def test_published_ppow_is_no_objective_on_target_paths():
    with pytest.raises(ValueError, match="ppow is not an objective on target paths"):
        objective_of("ppow")


# ---------------------------------------------------------------- D-PACE


@pytest.mark.parametrize("alpha", [0.5, 0.2, 1.0])
@pytest.mark.parametrize("name", ["ce", "tv"])
def test_dpace_weighs_by_what_hangs_on_a_position(name, alpha, case):
    """1/K Σ_i w_i · loss_i, w_i = Σ_{j>=i} Π_{l<=j} ((1 − α) c_l + α), c = q(argmax p) or the overlap."""
    total = 0.0
    for n in range(5):
        losses = [per_token(name, case.p[n][i], case.q[n][i], case.ids) for i in range(3)]
        confidence = [math.exp(-loss) if name == "ce" else 1 - loss for loss in losses]
        smooth = [(1 - alpha) * value + alpha for value in confidence]
        weights = [sum(math.prod(smooth[: j + 1]) for j in range(i, 3)) for i in range(3)]
        total += sum(weight * loss for weight, loss in zip(weights, losses, strict=True)) / 3 / 5
    ours = objective_of(f"cst:{name}", position_weights="dpace", dpace_alpha=alpha)(case.windows)
    assert ours.item() == pytest.approx(total, rel=1e-4)


def test_dpace_is_the_librarys_for_cross_entropy(case):
    """Value and gradient: the weights are constants."""
    from speculators.losses import dpace_loss_decay, loss_function
    from speculators.losses.eager import ce_loss

    windows = case.windows.without_rest()
    mask = torch.ones(1, 15)
    weigh = functools.partial(dpace_loss_decay, loss_mask=mask, block_size=3, dpace_alpha=0.5)
    flat = (logits.reshape(1, 15, -1) for logits in (windows.draft_logits, windows.target_logits))
    wanted = loss_function(*flat, mask, torch.arange(15)[None] % 3, ce_loss, weigh)
    ours = objective_of("cst:ce", position_weights="dpace")(case.windows)
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=0)
    one, other = (
        torch.autograd.grad(loss, case.draft_logits, retain_graph=True)[0] for loss in (ours, wanted)
    )
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


# ---------------------------------------------------------------- sums


def test_a_sum_weighs_each_part_by_its_own_formula(case):
    parts = {name: objective_of(name)(case.windows) for name in ("overlap", "cst:tv", "cst:ce")}
    assert len({round(value.item(), 3) for value in parts.values()}) == 3
    mixed = objective_of(".5*cst:ce + overlap + 4 * cst:tv")(case.windows)
    torch.testing.assert_close(mixed, 0.5 * parts["cst:ce"] + parts["overlap"] + 4 * parts["cst:tv"])
