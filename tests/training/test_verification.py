"""Acceptance maths against enumeration of every draft, coin and target path (enumeration.py)."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from enumerated_windows import CASE_NAMES, CASES, over_target_paths, vocabulary_of
from enumeration import Tables, accepted_length_distribution, random_tables, survival

from ppow_train.objectives.path_windows import PathWindows
from ppow_train.objectives.window import exact, overlap_window
from ppow_train.verification import (
    acceptance_ratio,
    greedy_accepted_length,
    leading_count,
    overlap,
    sampled_accepted_length,
    survival_on_path,
    survival_product,
    token_logps,
)
from vllm_ppow.speedup import speedup_reward

COST = 0.12


@pytest.fixture(params=CASES, ids=CASE_NAMES)
def tables(request: Any) -> Tables:
    *shape, draftable = request.param
    return random_tables(*shape, draftable=draftable)


def survival_of(windows: PathWindows) -> torch.Tensor:
    return survival_on_path(
        token_logps(windows.target_logits, windows.tokens),
        token_logps(windows.draft_logits, windows.tokens),
        overlap(windows.target_logits, windows.draft_logits),
    )[0]


def test_enumeration_is_a_distribution(tables):
    chances = accepted_length_distribution(tables)
    assert chances.sum().item() == pytest.approx(1.0, abs=1e-12)
    assert (chances > 0.01).all(), "every length must occur, or the comparisons below prove little"


def test_survival_on_path_is_unbiased(tables):
    expected = over_target_paths(tables, survival_of)
    torch.testing.assert_close(expected, survival(tables), atol=1e-12, rtol=0)


def test_expected_accepted_length(tables):
    lengths = torch.arange(tables.num_speculative_tokens + 1, dtype=torch.float64)
    enumerated = (accepted_length_distribution(tables) * lengths).sum()
    torch.testing.assert_close(over_target_paths(tables, survival_of).sum(), enumerated, atol=1e-12, rtol=0)


def enumerated_reward(tables: Tables) -> torch.Tensor:
    worth = [speedup_reward(k, COST) for k in range(tables.num_speculative_tokens + 1)]
    return (accepted_length_distribution(tables) * torch.tensor(worth, dtype=torch.float64)).sum()


def test_exact_is_the_expected_reward_and_its_gradient(tables):
    ours = over_target_paths(tables, lambda windows: exact(windows, COST))
    enumerated = -enumerated_reward(tables)
    torch.testing.assert_close(ours, enumerated, atol=1e-12, rtol=0)
    gradients = torch.autograd.grad(ours, tables.draft_logits)
    for gradient, wanted in zip(gradients, torch.autograd.grad(enumerated, tables.draft_logits), strict=True):
        assert wanted.abs().max() > 1e-3
        torch.testing.assert_close(gradient, wanted, atol=1e-12, rtol=0)


def test_expected_accepted_length_against_sampling(tables):
    """Monte Carlo by `sampled_accepted_length`, 4 standard errors."""
    length, count = tables.num_speculative_tokens, 40_000
    generator = torch.Generator().manual_seed(3)
    tokens: list[torch.Tensor] = []
    target_logps: list[torch.Tensor] = []
    draft_logps: list[torch.Tensor] = []
    for step in range(length):
        target = tables.target_logits[step][tuple(tokens)].expand(count, -1)
        draft = tables.draft_logits[step].detach()[tuple(tokens)].expand(count, -1)
        column = torch.multinomial(draft.softmax(-1), 1, generator=generator)[:, 0]
        tokens.append(vocabulary_of(tables).to_target(column))
        target_logps.append(token_logps(target, tokens[-1]))
        draft_logps.append(token_logps(draft, vocabulary_of(tables).columns(tokens[-1])))
    ratio = acceptance_ratio(torch.stack(target_logps, -1), torch.stack(draft_logps, -1))
    uniforms = torch.rand(ratio.shape, generator=generator, dtype=ratio.dtype)
    accepted = sampled_accepted_length(ratio, uniforms).double()
    error = (accepted.mean() - survival(tables).sum().detach()).abs()
    assert error < 4 * accepted.std() / count**0.5


def test_rejection_sampling_is_lossless(tables):
    """The first emitted token, drafted and kept or recovered from max(p − q, 0), is distributed as p."""
    p, q = tables.target_logits[0].softmax(-1), torch.zeros(tables.vocab_size, dtype=torch.float64)
    q[list(tables.draft_tokens)] = tables.draft_logits[0].detach().softmax(-1)
    keep = acceptance_ratio(p.log(), q.log())
    residual = (p - q).clamp(min=0)
    emitted = q * keep + (q * (1 - keep)).sum() * residual / residual.sum()
    torch.testing.assert_close(emitted, p, atol=1e-12, rtol=0)


def test_product_equals_path_estimate_where_the_path_does_not_matter():
    tables = random_tables(3, 3, seed=4, by_path=False)
    product = survival_product(overlap(*tables.along((0, 0, 0))))
    torch.testing.assert_close(over_target_paths(tables, survival_of), product, atol=1e-12, rtol=0)
    ours = over_target_paths(tables, lambda windows: overlap_window(windows, COST))
    torch.testing.assert_close(ours, -enumerated_reward(tables), atol=1e-12, rtol=0)


def test_product_is_another_number_where_the_path_matters():
    tables = random_tables(3, 3, seed=0)
    product = over_target_paths(
        tables, lambda windows: survival_product(overlap(windows.target_logits, windows.draft_logits))[0]
    )
    assert product[0].item() == pytest.approx(survival(tables)[0].item(), abs=1e-12)
    assert (product[1:] - survival(tables)[1:]).abs().min() > 1e-3


def test_overlap_is_one_minus_total_variation():
    generator = torch.Generator().manual_seed(0)
    target, draft = torch.randn(2, 5, 7, 11, generator=generator, dtype=torch.float64) * 2
    variation = 0.5 * (target.softmax(-1) - draft.softmax(-1)).abs().sum(-1)
    torch.testing.assert_close(overlap(target, draft), 1 - variation)
    torch.testing.assert_close(overlap(target, target), torch.ones(5, 7, dtype=torch.float64))


@pytest.mark.parametrize("flags", list(itertools.product((False, True), repeat=4)))
def test_leading_count(flags):
    slow = len(list(itertools.takewhile(bool, flags)))
    assert leading_count(torch.tensor([flags])).tolist() == [slow]


def test_greedy_accepted_length():
    drafted = torch.tensor([[[1, 2, 3], [1, 9, 3], [9, 2, 3], [1, 2, 9]]])
    greedy = torch.tensor([[[1, 2, 3]] * 4])
    assert greedy_accepted_length(drafted, greedy).tolist() == [[3, 1, 0, 2]]


def test_a_token_as_likely_as_drafted_is_always_kept():
    ratio = acceptance_ratio(torch.tensor([-1.0, -0.5]), torch.tensor([-1.0, -2.0]))
    assert ratio.tolist() == [1.0, 1.0]
    assert sampled_accepted_length(ratio, torch.tensor([0.9999999, 0.9999999])).item() == 2
