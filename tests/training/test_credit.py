"""Per-token credit of ppow: its expected gradient over all groups of drafts and coins is that of E[R], enumerated."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from enumeration import Tables, accepted_length_distribution, greedy_path, random_tables

from ppow_train.config import PPOWConfig
from ppow_train.credit import acceptance_credit, token_advantages
from ppow_train.errors import UserError
from ppow_train.microbatches import divide_step
from ppow_train.options import PPOWOptions
from ppow_train.types import Rollout
from ppow_train.verification import leading_count
from vllm_ppow.speedup import speedup_reward

# V, K, seed, tokens that can be drafted, windows in a group
CASES = [(3, 2, 0, None, 2), (3, 2, 2, None, 3), (4, 3, 3, (2, 0), 2), (4, 2, 5, (1, 3, 0), 3)]
COST = 0.3


@pytest.fixture(params=CASES, ids=lambda case: "V{}-K{}-seed{}-drafts{}-G{}".format(*case))
def case(request: Any) -> tuple[Tables, int]:
    *shape, draftable, group_size = request.param
    return random_tables(*shape, draftable=draftable), group_size


class Outcomes:
    """Every drafted window with every accepted length that it can have, S in all.

    Attributes:
        k: int64 [S]; chance, differentiable: [S].
        log_q, below: [S, K], of the drafted tokens; below where q < p.
    """

    def __init__(self, tables: Tables, greedy: bool) -> None:
        k, chance, log_q, below = [], [], [], []
        length, path = tables.num_speculative_tokens, greedy_path(tables)
        for draft in tables.drafts():
            p, q = tables.chances(draft)
            keep = torch.minimum(p / q, torch.ones_like(p))
            if greedy:
                keep = torch.tensor([float(one == other) for one, other in zip(draft, path, strict=True)])
            for accepted in range(length + 1):
                rejected = 1 - keep[accepted] if accepted < length else 1.0
                k.append(accepted)
                chance.append(q.prod() * keep[:accepted].prod() * rejected)
                log_q.append(q.log())
                below.append(q < p)
        self.k, self.chance = torch.tensor(k), torch.stack(chance)
        self.log_q, self.below = torch.stack(log_q), torch.stack(below)

    def expected_gradient(self, tables: Tables, counts: torch.Tensor, group_size: int) -> list[torch.Tensor]:
        """E[ Σ_t A_t ∇log q(ŷ_t) ], the mean over a group, over all groups: independent drafts, independent coins."""
        groups = torch.tensor(list(itertools.product(range(len(self.k)), repeat=group_size)))
        rows = groups.flatten()
        worth = [speedup_reward(k, COST) for k in range(tables.num_speculative_tokens + 1)]
        advantages = acceptance_credit(self.k[rows], counts[rows], worth, group_size).double()
        score = (advantages * self.log_q[rows]).sum(-1).view(-1, group_size).mean(-1)
        chance = self.chance.detach()[groups].prod(-1)
        assert chance.sum().item() == pytest.approx(1.0)
        return list(torch.autograd.grad((chance * score).sum(), tables.draft_logits, retain_graph=True))


def gradient_of(reward: torch.Tensor, tables: Tables) -> list[torch.Tensor]:
    gradients = list(torch.autograd.grad(reward, tables.draft_logits, retain_graph=True))
    assert all(gradient.abs().max() > 1e-4 for gradient in gradients)
    return gradients


def worth_of(k: torch.Tensor) -> torch.Tensor:
    return torch.tensor([speedup_reward(value, COST) for value in k.tolist()], dtype=torch.float64)


def test_credit_is_unbiased_where_acceptance_is_drawn(case):
    tables, group_size = case
    outcomes = Outcomes(tables, greedy=False)
    chances = accepted_length_distribution(tables)
    wanted = gradient_of((chances * worth_of(torch.arange(len(chances)))).sum(), tables)
    ours = outcomes.expected_gradient(tables, outcomes.below, group_size)
    for gradient, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-6, rtol=0)


def test_without_the_indicator_it_is_biased(case):
    """The plain score function, as if acceptance did not move with the weights."""
    tables, group_size = case
    outcomes = Outcomes(tables, greedy=False)
    wanted = gradient_of((outcomes.chance * worth_of(outcomes.k)).sum(), tables)
    plain = outcomes.expected_gradient(tables, torch.ones_like(outcomes.below), group_size)
    assert (plain[0] - wanted[0]).abs().max() > 1e-3


def test_credit_is_unbiased_at_temperature_0(case):
    tables, group_size = case
    outcomes = Outcomes(tables, greedy=True)
    reward = (outcomes.chance * worth_of(outcomes.k)).sum()
    assert reward > 0, "the target's own tokens cannot be drafted: choose another seed"
    wanted = torch.autograd.grad(reward, tables.draft_logits, retain_graph=True)
    ours = outcomes.expected_gradient(tables, torch.ones_like(outcomes.below), group_size)
    assert wanted[0].abs().max() > 1e-4
    for gradient, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-6, rtol=0)


def test_credit_by_hand():
    """f = k; token t is worth k − (t−1), its baseline is the mean over the others that were verified at t."""
    counts = torch.tensor([[True, True], [True, True], [False, True]])
    advantages = acceptance_credit(torch.tensor([2, 0, 1]), counts, [0.0, 1.0, 2.0], group_size=3)
    assert advantages.tolist() == [[2.0, 1.0], [-1.0, 0.0], [-1.0, -1.0]]


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ({}, [[True, False], [False, True]]),
        ({"serving_temperature": 0.0}, [[True, True], [True, True]]),
    ],
)
@pytest.mark.parametrize("reading", ["accepted", "drafted"])
def test_advantages_of_a_rollout(options, counts, reading):
    """q < p counts where acceptance is drawn, every token at temperature 0; the reward is charged as configured."""
    draft_logps = torch.tensor([[-2.0, -1.0], [-1.0, -2.0]])
    k = torch.tensor([2, 1])
    rollout = Rollout(
        torch.zeros(2, 2, dtype=torch.long), draft_logps, torch.full((2, 2), -1.5), k, torch.zeros(2)
    )
    settings = PPOWOptions(num_speculative_tokens=2, num_generations=2, cost_reading=reading, **options)
    charged = 2 if reading == "drafted" else None
    worth = [speedup_reward(value, 0.12, charged) for value in range(3)]
    wanted = acceptance_credit(k, torch.tensor(counts), worth, 2)
    torch.testing.assert_close(token_advantages(rollout, settings), wanted)
    assert wanted.abs().max() > 0.1


def test_late_tokens_of_short_windows_have_no_advantage():
    k = torch.tensor([0, 1, 3, 3])
    advantages = acceptance_credit(k, torch.ones(4, 3, dtype=torch.bool), [0.0, 1.0, 1.5, 1.75], 2)
    assert leading_count(advantages != 0).tolist() == [1, 1, 0, 0]
    assert (advantages[2:] == 0).all(), "windows that earned the same"


def test_processes_that_would_divide_a_group_are_refused(tmp_path, monkeypatch):
    """Before anything is loaded: what a token earned is compared with what the group's other windows did."""
    options = {"trajectories_per_step": 3, "windows_per_step": 24, "num_generations": 4, "max_steps": 1}
    options |= {"objective": "ppow", "use_cpu": True, "output_dir": str(tmp_path)}
    published, acceptance = (PPOWConfig(ppow_credit=name, **options) for name in ("published", "acceptance"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    divide_step(acceptance, 12)
    assert acceptance.per_device_train_batch_size == 12
    monkeypatch.setenv("WORLD_SIZE", "4")
    divide_step(published, 12)
    assert published.per_device_train_batch_size == 6
    with pytest.raises(
        UserError, match=r"^windows_per_step must be a multiple of 16 with ppow_credit acc.*got 24"
    ):
        PPOWConfig(ppow_credit="acceptance", **options)
    with pytest.raises(UserError, match="multiple of 16"):
        divide_step(acceptance, 12)
