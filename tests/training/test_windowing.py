"""Criticality against slow loops, and what `draw_starts` draws against the chances it states."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from training_pair import VOCAB, K, load

from ppow_train.rollout import WindowRunner
from ppow_train.sampler import WindowSampler
from ppow_train.vocabulary import FULL_VOCABULARY, reduced_vocabulary
from ppow_train.window_log import expected_acceptance
from ppow_train.windowing import (
    draw_starts,
    lost_tokens,
    token_acceptance,
    token_criticality,
    window_criticality,
)


def test_token_criticality_is_confidence_times_divergence():
    generator = torch.Generator().manual_seed(0)
    target, draft = torch.randn(2, 2, 3, 5, generator=generator, dtype=torch.float64) * 2
    ours = token_criticality(target, draft)
    for b in range(2):
        for t in range(3):
            p, q = target[b, t].softmax(-1).tolist(), draft[b, t].softmax(-1).tolist()
            entropy = -sum(x * math.log(x) for x in p)
            divergence = sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
            assert ours[b, t].item() == pytest.approx((1 - entropy / math.log(5)) * divergence)


def test_token_criticality_where_not_every_token_can_be_drafted():
    """Confidence of the target as it is, divergence from the target renormalised on what can be drafted."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(6, 5, generator=generator, dtype=torch.float64) * 2
    draft = torch.randn(6, 2, generator=generator, dtype=torch.float64) * 2
    ours = token_criticality(target, draft, reduced_vocabulary(torch.tensor([3, 1]), 5))
    for t in range(6):
        p, q = target[t].softmax(-1).tolist(), draft[t].softmax(-1).tolist()
        entropy = -sum(x * math.log(x) for x in p)
        inside = p[3] + p[1]
        divergence = sum(x / inside * math.log(x / inside / y) for x, y in zip((p[3], p[1]), q, strict=True))
        assert ours[t].item() == pytest.approx((1 - entropy / math.log(5)) * divergence)


def test_where_the_target_is_unsure_or_agreed_with_nothing_is_critical():
    draft = torch.tensor([[3.0, 0.0, -1.0]])
    assert token_criticality(torch.zeros(1, 3), draft).item() == pytest.approx(0.0, abs=1e-6)
    assert token_criticality(draft, draft).item() == pytest.approx(0.0, abs=1e-6)
    assert token_criticality(torch.tensor([[9.0, 0.0, 0.0]]), draft).item() > 0.01


def test_window_criticality_is_the_mean():
    values = torch.tensor([[1.0, 2.0, 6.0, 0.0]])
    assert window_criticality(values, 3).tolist() == [pytest.approx([3.0, 8 / 3])]


def test_runner_criticality_is_that_of_whole_windows(runner, trajectories):
    """Offset o of `criticality` is the mean over the window that starts o after the first start."""
    ours = runner.criticality(torch.arange(len(trajectories)))
    target = runner.target.encode(trajectories)
    draft = runner.drafter.encode(trajectories, target)
    starts = trajectories.first_starts()
    for row, count in enumerate(trajectories.num_starts(K).tolist()):
        for offset in range(count):
            positions = starts[row] + offset + torch.arange(K)
            everywhere = positions.expand(len(trajectories), -1).clamp(
                max=trajectories.input_ids.shape[1] - 1
            )
            p = runner.target.path_logits(target, everywhere, 1)[row, :, 0] / runner.temperature
            first = torch.zeros(*everywhere.shape, 1, dtype=torch.long)  # one token: the value is not read
            q = runner.drafter.score(draft, everywhere, first)[row, :, 0] / runner.temperature
            wanted = token_criticality(p, q, runner.drafter.vocabulary)
            assert ours[row, offset].item() == pytest.approx(wanted.mean().item(), rel=1e-4)


@pytest.mark.parametrize("reduced", [False, True])
def test_lost_tokens_are_those_that_no_window_earns(reduced):
    """Against loops over positions; a token that cannot be drafted ends every window."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.tensor([[1, 3, 0, 3, 1, 2]])
    target = torch.randn(1, 6, 4, generator=generator, dtype=torch.float64) * 2
    draft = torch.randn(1, 6, 3 if reduced else 4, generator=generator, dtype=torch.float64) * 2
    drafted = [3, 0, 1] if reduced else [0, 1, 2, 3]
    vocabulary = reduced_vocabulary(torch.tensor(drafted), 4) if reduced else FULL_VOCABULARY
    ours = lost_tokens(token_acceptance(target, draft, tokens, vocabulary), 3)
    assert ours.shape == (1, 4)
    for start in range(4):
        reached, accepted = 1.0, 0.0
        for at in range(start, start + 3):
            p, own = target[0, at].softmax(-1).tolist(), int(tokens[0, at])
            q = [0.0] * 4
            for column, share in zip(drafted, draft[0, at].softmax(-1).tolist(), strict=True):
                q[column] = share
            accepted += reached * sum(map(min, p, q))
            reached *= min(1.0, q[own] / p[own])
        assert ours[0, start].item() == pytest.approx(3 - accepted)


def test_runner_lost_tokens_are_those_of_the_windows_trained_on(directories, trajectories):
    """Of a causal LM, whose windows need no chain: K − expected accepted tokens of every window."""
    pair = load(directories, "causal_lm")
    runner = WindowRunner(pair.target, pair.drafter, trajectories, K, temperature=0.7)
    ours = runner.criticality(torch.arange(len(trajectories)), "lost_tokens")
    for row, count in enumerate(trajectories.num_starts(K).tolist()):
        starts = trajectories.first_starts()[row] + torch.arange(count)
        windows = runner.path_windows(torch.full_like(starts, row), starts)
        for offset in range(count):
            one = slice(offset, offset + 1)
            accepted = expected_acceptance(
                windows.tokens[one], windows.target_logits[one], windows.draft_logits[one]
            )
            assert ours[row, offset].item() == pytest.approx(K - accepted.sum().item(), abs=1e-4)


@pytest.mark.parametrize("kind", ["divergence", "lost_tokens"])
def test_criticality_in_pieces_is_the_same(runner, trajectories, kind, monkeypatch):
    rows = torch.arange(len(trajectories))
    whole = runner.criticality(rows, kind)
    monkeypatch.setattr("ppow_train.rollout.LOGITS_AT_ONCE", 3 * VOCAB * 2)  # two positions at a time
    torch.testing.assert_close(runner.criticality(rows, kind), whole, atol=1e-5, rtol=1e-4)


NUM_STARTS = torch.tensor([5, 3, 1])
CRITICALITY = torch.tensor(
    [[4.0, 0.0, 1.0, 1.0, 2.0], [1.0, 3.0, 0.0, 99.0, 99.0], [0.0, 50.0, 0.0, 0.0, 0.0]]
)


def frequencies(draws: int, **options: Any) -> torch.Tensor:
    """Share of each offset among single draws, [3, 5]."""
    generator = torch.Generator().manual_seed(1)
    counts = torch.zeros(3, 5)
    for _ in range(draws):
        drawn = draw_starts(NUM_STARTS, 1, generator, **options)
        counts[torch.arange(3), drawn[:, 0]] += 1
    return counts / draws


def chi_square(seen: torch.Tensor, wanted: torch.Tensor, draws: int) -> float:
    at = wanted > 0
    return float((draws * (seen[at] - wanted[at]) ** 2 / wanted[at]).sum())


@pytest.mark.parametrize("uniform_share", [1.0, 0.3, 0.0])
def test_starts_are_drawn_with_the_stated_chances(uniform_share):
    draws = 4000
    seen = frequencies(draws, criticality=CRITICALITY, uniform_share=uniform_share)
    valid = torch.arange(5) < NUM_STARTS[:, None]
    uniform = valid / valid.sum(-1, keepdim=True)
    weight = CRITICALITY * valid
    adaptive = torch.where(
        weight.sum(-1, keepdim=True) > 0, weight / weight.sum(-1, keepdim=True).clamp(min=1e-9), uniform
    )
    wanted = (1 - uniform_share) * adaptive + uniform_share * uniform
    assert (seen[wanted == 0] == 0).all()
    for row in range(3):
        assert (
            chi_square(seen[row], wanted[row], draws) < 18.5
        )  # 0.1 % of chi-square with 4 degrees of freedom


def test_ordinary_windows_are_uniform():
    seen = frequencies(4000)
    assert chi_square(seen[0], torch.full((5,), 0.2), 4000) < 18.5
    assert seen[1, :3].min() > 0.28
    assert seen[1, 3:].sum() == 0


@pytest.mark.parametrize("criticality", [None, CRITICALITY + 0.01])
def test_every_start_is_drawn_as_often_as_its_chance_says(criticality):
    """In every single draw, to less than one: ordinary windows are distinct while there are enough of them."""
    generator = torch.Generator().manual_seed(2)
    valid = torch.arange(5) < NUM_STARTS[:, None]
    chance = valid / valid.sum(-1, keepdim=True)
    if criticality is not None:
        weight = criticality * valid
        chance = 0.7 * weight / weight.sum(-1, keepdim=True) + 0.3 * chance
    for _ in range(50):
        drawn = draw_starts(NUM_STARTS, 3, generator, criticality, 0.3)
        assert drawn.shape == (3, 3)
        counts = torch.stack([row.bincount(minlength=5) for row in drawn])
        assert ((counts - 3 * chance).abs() < 1).all()
        assert drawn[2].tolist() == [0, 0, 0]
        if criticality is None:
            assert len(set(drawn[0].tolist())) == len(set(drawn[1].tolist())) == 3


def test_draws_follow_the_generator():
    one, same, other = (
        draw_starts(torch.tensor([50]), 8, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)
    )
    assert one.equal(same)
    assert not one.equal(other)


@pytest.mark.parametrize("adaptive_from", [0, math.inf])
def test_drawn_windows_lie_on_the_continuation(runner, trajectories, adaptive_from):
    rows = torch.tensor([2, 0, 1, 0])
    sampler = WindowSampler(
        runner.criticality, trajectories, K, adaptive_from=adaptive_from, uniform_share=0.3
    )
    for step in range(20):
        starts = sampler.draw(rows, 2, step, torch.Generator().manual_seed(step)).starts
        assert (starts > trajectories.prompt_lengths[rows, None]).all()
        assert (starts + K <= trajectories.lengths[rows, None]).all()
