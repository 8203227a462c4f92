"""Rewards: the speedup formula, proximity, its running threshold, and the form that TRL calls."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from ppow_train.rewards import ProximityThreshold, make_reward_funcs, proximity_reward
from vllm_ppow.speedup import speedup_increments, speedup_reward


def test_speedup_is_the_papers_formula():
    assert speedup_reward(0, 0.12) == 0
    assert speedup_reward(5, 0.12) == pytest.approx(5 / 1.6)
    assert speedup_reward(7, 0.0) == 7


def test_speedup_rises_ever_less_and_stays_below_its_bound():
    worth = [speedup_reward(k, 0.12) for k in range(200)]
    steps = [after - before for before, after in itertools.pairwise(worth)]
    assert all(step > 0 for step in steps)
    assert all(after < before for before, after in itertools.pairwise(steps))
    assert worth[-1] < 1 / 0.12
    assert speedup_reward(10**6, 0.12) == pytest.approx(1 / 0.12, rel=1e-4)


def test_increments_telescope():
    increments = speedup_increments(10, 0.12)
    assert len(increments) == 10
    for k in range(11):
        assert sum(increments[:k]) == pytest.approx(speedup_reward(k, 0.12))


def test_all_drafted_tokens_can_be_charged():
    """k / (Kγ + 1): linear in k, and the published reward where everything is accepted."""
    assert [speedup_reward(k, 0.12, 8) for k in (0, 3, 8)] == pytest.approx([0, 3 / 1.96, 8 / 1.96])
    assert speedup_reward(8, 0.12, 8) == speedup_reward(8, 0.12)
    assert speedup_increments(8, 0.12, 8) == pytest.approx([1 / 1.96] * 8)
    speedup, _ = make_reward_funcs(0.12, 0.2, 8)
    assert speedup(num_accepted_tokens=[0, 3]) == pytest.approx([0, 3 / 1.96])


def test_proximity_only_where_nothing_was_accepted_and_the_target_is_near():
    accepted = torch.tensor([0, 0, 0, 1, 3])
    divergence = torch.tensor([-1.0, 2.0, 2.5, -1.0, 0.0])
    reward = proximity_reward(accepted, divergence, epsilon=2.0, weight=0.2)
    assert reward.tolist() == pytest.approx([0.2, 0.0, 0.0, 0.0, 0.0])


def test_threshold_is_the_quantile_of_the_misses():
    threshold = ProximityThreshold(quantile=0.25)
    accepted = torch.tensor([0, 0, 0, 0, 0, 4])
    divergence = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, -100.0])
    epsilon = threshold.update(accepted, divergence)
    assert epsilon == pytest.approx(2.0)
    rewarded = proximity_reward(accepted, divergence, epsilon, 1.0)
    assert rewarded.sum().item() == 1


def test_threshold_moves_slowly_and_survives_steps_without_misses():
    threshold = ProximityThreshold(quantile=0.5, momentum=0.9)
    one, none = torch.tensor([0]), torch.tensor([2])
    assert threshold.update(none, torch.tensor([7.0])) == -math.inf
    assert threshold.update(one, torch.tensor([10.0])) == pytest.approx(10.0)
    assert threshold.update(none, torch.tensor([7.0])) == pytest.approx(10.0)
    assert threshold.update(one, torch.tensor([20.0])) == pytest.approx(11.0)


def test_threshold_from_zero_keeps_its_momentum():
    threshold = ProximityThreshold(quantile=0.5, momentum=0.9)
    assert threshold.update(torch.tensor([0]), torch.tensor([0.0])) == 0.0
    assert threshold.update(torch.tensor([0]), torch.tensor([10.0])) == pytest.approx(1.0)


def test_a_fixed_threshold_does_not_move():
    threshold = ProximityThreshold(quantile=0.5, fixed=3.0)
    assert threshold.update(torch.tensor([0]), torch.tensor([10.0])) == 3.0


def test_no_miss_yet_rewards_nothing():
    reward = proximity_reward(torch.tensor([0]), torch.tensor([-1e9]), -math.inf, 0.2)
    assert reward.tolist() == [0.0]


def test_reward_functions_as_trl_calls_them():
    speedup, proximity = make_reward_funcs(0.12, 0.2)
    columns = {
        "prompts": [[0], [0], [1]],
        "completions": ["a", "b", "c"],
        "completion_ids": [[1], [2], [3]],
        "num_accepted_tokens": [0, 5, 0],
        "divergence": [1.0, 1.0, 9.0],
        "proximity_epsilon": [2.0, 2.0, 2.0],
    }
    assert speedup(**columns) == pytest.approx([0.0, 5 / 1.6, 0.0])
    assert proximity(**columns) == pytest.approx([0.2, 0.0, 0.0])
    assert (speedup.__name__, proximity.__name__) == ("speedup", "proximity")
