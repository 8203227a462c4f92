"""Objectives for greedy drafts: q_τ for the argmax, against enumeration of every draft; which form is chosen when."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from enumerated_windows import CASE_NAMES, CASES, over_target_paths, windows_on
from enumeration import Tables, agreement_survival, greedy_draft, greedy_path, random_tables

from ppow_train.objectives.choose import make_objective
from ppow_train.objectives.forms import GreedyDrafts, GreedyTarget, SampledDrafts
from ppow_train.objectives.window import exact, overlap_window
from ppow_train.options import PPOWOptions
from vllm_ppow.speedup import speedup_increments

COST, SHARPENING = 0.12, 1.5


@pytest.fixture(params=CASES, ids=CASE_NAMES)
def tables(request: Any) -> Tables:
    *shape, draftable = request.param
    return random_tables(*shape, draftable=draftable)


def sharpened(tables: Tables) -> Tables:
    """The same with q_τ as its draft distribution, differentiable in the same logits."""
    return dataclasses.replace(tables, draft_logits=[logits * SHARPENING for logits in tables.draft_logits])


def worth(survival: torch.Tensor) -> torch.Tensor:
    return (survival * survival.new_tensor(speedup_increments(len(survival), COST))).sum()


def assert_same_gradient(ours: torch.Tensor, wanted: torch.Tensor, tables: Tables) -> None:
    gradients = torch.autograd.grad(ours, tables.draft_logits)
    for gradient, other in zip(gradients, torch.autograd.grad(wanted, tables.draft_logits), strict=True):
        assert other.abs().max() > 1e-6
        torch.testing.assert_close(gradient, other, atol=1e-12, rtol=0)


def test_exact_is_the_expected_reward_where_drafts_come_from_the_sharpened_q(tables):
    ours = over_target_paths(tables, lambda windows: exact(windows, COST, form=GreedyDrafts(SHARPENING)))
    enumerated = -worth(agreement_survival(sharpened(tables)))
    torch.testing.assert_close(ours, enumerated, atol=1e-12, rtol=0)
    assert_same_gradient(ours, enumerated, tables)


def test_exact_becomes_what_greedy_drafts_earn(tables):
    """As τ -> 0, against the one greedy draft, accepted token by token with probability p."""
    p, _ = tables.chances(greedy_draft(tables))
    ours = over_target_paths(tables, lambda windows: exact(windows, COST, form=GreedyDrafts(1e4)))
    torch.testing.assert_close(ours.detach(), -worth(p.cumprod(0)), atol=1e-9, rtol=0)
    blunt = over_target_paths(tables, lambda windows: exact(windows, COST, form=GreedyDrafts(1.0)))
    assert (blunt - ours).abs() > 1e-2


@pytest.mark.parametrize("draftable", [None, (2, 0)])
def test_the_product_is_exact_where_the_path_does_not_matter(draftable):
    tables = random_tables(3, 3, seed=4, by_path=False, draftable=draftable)
    product = over_target_paths(
        tables, lambda windows: overlap_window(windows, COST, form=GreedyDrafts(SHARPENING))
    )
    enumerated = -worth(agreement_survival(sharpened(tables)))
    torch.testing.assert_close(product, enumerated, atol=1e-12, rtol=0)


def test_at_temperature_0_the_draft_must_be_the_greedy_trajectory(tables):
    path = greedy_path(tables)
    wanted = torch.zeros(tables.num_speculative_tokens, dtype=torch.float64)
    for draft in tables.drafts():
        _, q = sharpened(tables).chances(draft)
        matches = torch.tensor([one == other for one, other in zip(draft, path, strict=True)])
        wanted = wanted + q.prod() * matches.double().cumprod(0)
    ours = exact(windows_on(tables, path), COST, form=GreedyTarget(SHARPENING))
    torch.testing.assert_close(ours, -worth(wanted), atol=1e-12, rtol=0)
    (gradient,) = torch.autograd.grad(ours, tables.draft_logits[0])
    assert gradient.isfinite().all()


@pytest.mark.parametrize("draftable", [None, (2, 0)])
@pytest.mark.parametrize(
    ("options", "form"),
    [
        ({}, SampledDrafts()),
        ({"draft_sample_method": "greedy"}, GreedyDrafts(1.0 / 0.4)),
        ({"draft_sample_method": "greedy", "greedy_target": "hard"}, GreedyDrafts(1.0 / 0.4)),
        ({"serving_temperature": 0.0}, SampledDrafts()),
        ({"serving_temperature": 0.0, "draft_sample_method": "greedy"}, SampledDrafts()),
        ({"serving_temperature": 0.0, "greedy_target": "hard"}, GreedyTarget(0.5 / 0.4)),
    ],
)
def test_the_form_follows_how_drafts_are_served(options, form, draftable):
    """q sharpened to 0.4 from the temperature of training, 1.0 or 0.5."""
    windows = windows_on(random_tables(3, 3, seed=1, draftable=draftable), (0, 2, 0))
    for name, objective in (("exact", exact), ("overlap", overlap_window)):
        temperatures = {"greedy_sampling_temperature": 0.5, "greedy_sharpness_temperature": 0.4}
        ours = make_objective(PPOWOptions(objective=name, **temperatures, **options))(windows)
        torch.testing.assert_close(ours, objective(windows, COST, form=form))


@pytest.mark.parametrize("name", ["exact", "overlap"])
@pytest.mark.parametrize(
    "options",
    [{}, {"draft_sample_method": "greedy"}, {"serving_temperature": 0.0, "greedy_target": "hard"}],
)
def test_every_form_can_charge_for_all_drafted_tokens(name, options):
    """E[k] / (Kγ + 1): the cost is one factor, and E[k] what is left where drafting costs nothing."""
    windows = windows_on(random_tables(3, 3, seed=1), (0, 2, 0))

    def value(**cost: Any) -> torch.Tensor:
        everything = {"objective": name, "num_speculative_tokens": 3, **options, **cost}
        return make_objective(PPOWOptions(**everything))(windows)

    drafted = value(draft_cost_ratio=0.5, cost_reading="drafted")
    torch.testing.assert_close(drafted, value(draft_cost_ratio=0.0) / 2.5)
    assert (drafted - value(draft_cost_ratio=0.5)).abs() > 1e-3


def test_the_forms_are_different_numbers():
    windows = windows_on(random_tables(3, 3, seed=1), (0, 2, 0))
    forms = (SampledDrafts(), GreedyDrafts(2.0), GreedyTarget(2.0))
    values = [objective(windows, COST, form=form) for objective in (exact, overlap_window) for form in forms]
    assert len({round(value.item(), 4) for value in values}) == 5  # of a greedy target both are the same
