"""Rows and their packing, and a rollout's figures against plain forwards of the target, one row at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from training_pair import K
from unpacked import draft_windows, over_target_vocabulary, target_windows

from ppow_train.packed_rows import in_rows, pack_rows
from ppow_train.rollout import WindowRunner
from ppow_train.types import Rollout, Trajectories
from ppow_train.verification import (
    acceptance_ratio,
    greedy_accepted_length,
    sampled_accepted_length,
    token_logps,
)

TRAJECTORY = torch.tensor([2, 0, 2, 1, 0, 2])
START = torch.tensor([3, 16, 2, 7, 5, 7])


def roll_out(runner: WindowRunner, trajectory: torch.Tensor, start: torch.Tensor, seed: int) -> Rollout:
    noise = runner.draw_noise(len(trajectory), torch.Generator().manual_seed(seed))
    return runner.roll_out(trajectory, start, noise)


def test_pack_and_unpack_shuffled_rows(trajectories):
    packed = pack_rows(trajectories, TRAJECTORY, START)
    assert packed.starts.shape == (3, 3)
    assert in_rows([packed], [packed.starts]).equal(START)
    assert packed.trajectories.input_ids[packed.row].equal(trajectories.input_ids[TRAJECTORY])
    values = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    assert in_rows([packed], [packed.pack(values)]).equal(values)


def test_padding_repeats_rows_of_the_same_trajectory(trajectories):
    packed = pack_rows(trajectories, TRAJECTORY, START)
    owner = packed.pack(TRAJECTORY)
    assert owner.tolist() == [[0, 0, 0], [1, 1, 1], [2, 2, 2]]
    assert packed.starts[1].tolist() == [7, 7, 7]
    assert packed.pack(START).equal(packed.starts)


def test_packing_drops_trajectories_without_rows(trajectories):
    packed = pack_rows(trajectories, torch.tensor([2, 1]), torch.tensor([4, 6]))
    assert len(packed.trajectories) == 2
    assert packed.trajectories.input_ids.shape[1] == 14, "cut to the longest of those that occur"
    assert in_rows([packed], [packed.starts]).tolist() == [4, 6]


def test_the_target_remembers_its_last_pass_only(runner, trajectories):
    """Kept for the same trajectories, whoever selects them; windows leave it as it was; others replace it."""
    target = runner.target
    rows = torch.tensor([0, 2])
    kept = target.encode(trajectories.select(rows))
    tokens = torch.ones(2, 1, K, dtype=torch.long)
    before = target.score(kept, torch.tensor([[5], [3]]), tokens)
    assert target.encode(trajectories.select(rows.clone())) is kept
    assert target.score(kept, torch.tensor([[5], [3]]), tokens).equal(before)
    other = target.encode(trajectories)
    assert other is not kept
    assert target.encode(trajectories.select(rows)) is not kept
    target.forget()
    assert target.encode(trajectories.select(rows)).hidden.equal(kept.hidden)


def one_row(trajectories: Trajectories, row: int) -> Trajectories:
    return trajectories.select(torch.tensor([row]))


def logps_alone(
    runner: Any, trajectory: int, start: int, window: torch.Tensor, of: Callable[..., torch.Tensor]
) -> torch.Tensor:
    """Log-probability of each token of a window, from windows run alone; `of` gives the logits."""
    logits = of(one_row(runner.trajectories, trajectory), torch.tensor([[start]]), window.view(1, 1, -1))[
        0, 0
    ]
    return token_logps(logits / runner.temperature, window)


@pytest.fixture
def rollout(runner):
    return roll_out(runner, TRAJECTORY, START, seed=0)


def test_rollout_scores_every_row_under_its_own_prefix(runner, rollout):
    by_target = lambda *window: target_windows(runner.target, *window)  # noqa: E731
    by_drafter = lambda *window: over_target_vocabulary(  # noqa: E731
        runner.drafter, draft_windows(runner.target, runner.drafter, *window)
    )
    for row, (trajectory, start) in enumerate(zip(TRAJECTORY.tolist(), START.tolist(), strict=True)):
        window = rollout.tokens[row]
        with torch.no_grad():
            drafted = logps_alone(runner, trajectory, start, window, by_drafter)
            wanted = logps_alone(runner, trajectory, start, window, by_target)
        torch.testing.assert_close(rollout.draft_logps[row], drafted, atol=5e-4, rtol=1e-4)
        torch.testing.assert_close(rollout.target_logps[row], wanted, atol=5e-4, rtol=1e-4)


def test_divergence_token_by_token(runner, rollout):
    """Δ = Σ log P(y_t | x, y_<t) − Σ log P(ŷ_t | x, ŷ_<t): the second sum conditions on the drafted prefix."""
    for row, (trajectory, start) in enumerate(zip(TRAJECTORY.tolist(), START.tolist(), strict=True)):
        ids = runner.trajectories.input_ids[trajectory]
        sums = []
        for window in (ids[start : start + K], rollout.tokens[row]):
            total = 0.0
            for t in range(K):
                prefix = torch.cat([ids[:start], window[:t]])[None]
                with torch.no_grad():
                    logits = runner.target.model(input_ids=prefix, use_cache=False).logits[0, -1]
                total += (logits / runner.temperature).log_softmax(-1)[window[t]].item()
            sums.append(total)
        assert rollout.divergence[row].item() == pytest.approx(sums[0] - sums[1], abs=5e-3)


def test_accepted_length_at_temperature_zero_is_the_match_with_the_trajectory(loaded, trajectories):
    many = torch.zeros(100, dtype=torch.long)
    runner = WindowRunner(loaded.target, loaded.drafter, trajectories, K, 0.7, greedy=True)
    drafted = roll_out(runner, many, many + 6, seed=0).tokens[0]
    ids = trajectories.input_ids.clone()
    ids[0, 6 : 6 + K] = drafted  # else chance would have to bring a match
    changed = Trajectories(ids, trajectories.prompt_lengths, trajectories.lengths)
    runner = WindowRunner(loaded.target, loaded.drafter, changed, K, 0.7, greedy=True)
    rollout = roll_out(runner, many, many + 6, seed=0)
    assert rollout.num_accepted_tokens.equal(greedy_accepted_length(rollout.tokens, drafted.expand(100, -1)))
    assert rollout.num_accepted_tokens[0] == K


def test_accepted_length_by_sampling_follows_the_ratios(loaded, trajectories):
    """With the target as its own drafter everything is kept; with another one, what the ratios say on average."""
    from ppow_train.drafters.causal_lm import CausalLMDrafter

    same = WindowRunner(loaded.target, CausalLMDrafter(loaded.target.model), trajectories, K, 0.7)
    rows = torch.zeros(32, dtype=torch.long)
    kept = roll_out(same, rows, rows + 6, seed=0).num_accepted_tokens
    assert kept.float().mean() > K - 0.2, "ratios of one lose only to rounding"
    other = WindowRunner(loaded.target, loaded.drafter, trajectories, K, 3.0)
    rows = torch.zeros(400, dtype=torch.long)
    rollout = roll_out(other, rows, rows + 6, seed=1)
    ratio = acceptance_ratio(rollout.target_logps, rollout.draft_logps)
    expected = ratio.cumprod(-1).sum(-1)
    difference = rollout.num_accepted_tokens - expected
    assert expected.mean() > 0.05
    assert difference.mean().abs() < 4 * difference.std() / 400**0.5
    assert sampled_accepted_length(ratio, torch.zeros_like(ratio)).sum() > 0


def test_a_row_draws_the_same_in_any_company(runner, rollout):
    """Neither the number of processes nor that of forwards may change what is drafted."""
    noise = runner.draw_noise(len(TRAJECTORY), torch.Generator().manual_seed(0))
    parts = zip(TRAJECTORY.split(2), START.split(2), noise.split(2), strict=True)
    apart = Rollout.join([runner.roll_out(*part) for part in parts])
    assert apart.tokens.equal(rollout.tokens)
    assert apart.num_accepted_tokens.equal(rollout.num_accepted_tokens)
    torch.testing.assert_close(apart.draft_logps, rollout.draft_logps, atol=5e-4, rtol=1e-4)


def test_rollouts_follow_the_generator(runner, rollout):
    again = roll_out(runner, TRAJECTORY, START, seed=0)
    other = roll_out(runner, TRAJECTORY, START, seed=1)
    assert rollout.tokens.equal(again.tokens)
    assert rollout.num_accepted_tokens.equal(again.num_accepted_tokens)
    assert not rollout.tokens.equal(other.tokens)


def test_logps_that_the_update_differentiates_are_the_rollouts(runner, rollout):
    logps, entropy = runner.draft_logps(TRAJECTORY, START, rollout.tokens)
    torch.testing.assert_close(logps, rollout.draft_logps, atol=5e-4, rtol=1e-4)
    assert (entropy > 0).all()


def test_path_windows_are_rows_in_order(runner, trajectories):
    windows = runner.path_windows(TRAJECTORY, START)
    for row, (trajectory, start) in enumerate(zip(TRAJECTORY.tolist(), START.tolist(), strict=True)):
        own = trajectories.input_ids[trajectory, start : start + K]
        alone = one_row(trajectories, trajectory), torch.tensor([[start]]), own.view(1, 1, -1)
        with torch.no_grad():
            p = target_windows(runner.target, *alone)[0, 0] / runner.temperature
            q = draft_windows(runner.target, runner.drafter, *alone)[0, 0] / runner.temperature
        if not windows.has_rest:
            assert windows.tokens[row].equal(own)
            torch.testing.assert_close(windows.target_logits[row], p, atol=1e-3, rtol=1e-4)
            torch.testing.assert_close(windows.draft_logits[row], q, atol=1e-3, rtol=1e-4)
            continue
        ids = (torch.arange(q.shape[-1]) + runner.drafter.model.d2t).tolist()
        assert windows.tokens[row].tolist() == [ids.index(t) if t in ids else len(ids) for t in own.tolist()]
        torch.testing.assert_close(windows.target_logits[row, :, :-1], p[:, ids], atol=1e-3, rtol=1e-4)
        rest = 1 - p.softmax(-1)[:, ids].sum(-1)
        torch.testing.assert_close(windows.target_logits[row].softmax(-1)[:, -1], rest, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(windows.draft_logits[row, :, :-1], q, atol=1e-3, rtol=1e-4)
        assert (windows.draft_logits[row, :, -1] == float("-inf")).all()
