"""The expected serving walk: against every walk enumerated, against many that were drawn, in blocks, and kept."""

from __future__ import annotations

import pytest
import torch
from training_pair import K

from ppow_train import walk
from ppow_train.data import collate
from ppow_train.rollout import WindowRunner
from ppow_train.verification import token_logps
from ppow_train.walk import expected_walk, simulate_walk, target_paths

MAX_TOKENS = 10  # ends the first trajectory; the other two end before


def ratios(runner: WindowRunner, row: int, start: int) -> list[float]:
    """min(1, q/p)(y) of one window, run alone."""
    with torch.no_grad():
        window = runner.path_windows(torch.tensor([row]), torch.tensor([start]))
    draft, target = (
        token_logps(logits, window.tokens)[0] for logits in (window.draft_logits, window.target_logits)
    )
    return (draft - target).exp().clamp(max=1.0).tolist()


def enumerate_walks(runner: WindowRunner, row: int) -> torch.Tensor:
    """Expected drafts and accepted tokens by position, [1 + K], as the mean over every walk there is."""
    total = torch.zeros(1 + K, dtype=torch.float64)
    prompt, end = int(runner.trajectories.prompt_lengths[row]), int(runner.trajectories.lengths[row])
    by_start: dict[int, list[float]] = {}

    def go(produced: int, chance: float, seen: torch.Tensor) -> None:
        if produced >= MAX_TOKENS or prompt + produced + K > end:
            total.add_(chance * seen)
            return
        if produced not in by_start:
            by_start[produced] = ratios(runner, row, prompt + produced)
        reached = 1.0
        for kept in range(K + 1):
            lost = 1.0 - by_start[produced][kept] if kept < K else 1.0
            counted = torch.tensor([1] * (1 + kept) + [0] * (K - kept))
            go(produced + kept + 1, chance * reached * lost, seen + counted)
            reached *= 1.0 - lost

    go(1, 1.0, torch.zeros(1 + K, dtype=torch.float64))
    return total


def test_every_walk_enumerated(runner):
    expected = expected_walk(runner, MAX_TOKENS, greedy_drafts=False)
    wanted = torch.stack([enumerate_walks(runner, row) for row in range(3)])
    torch.testing.assert_close(expected.num_drafts, wanted[:, 0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(expected.num_accepted_tokens_per_pos, wanted[:, 1:], atol=1e-4, rtol=1e-4)
    accepted = float(wanted[:, 1:].sum() / wanted[:, 0].sum())
    assert expected.mean_accepted == pytest.approx(accepted, abs=1e-4)
    assert accepted > 0.01, "else nothing was tested"


class Remembering(WindowRunner):
    """Answers the same question once: many walks ask for the same windows."""

    def path_windows(self, trajectory, start):
        known = self.__dict__.setdefault("known", {})
        key = (*trajectory.tolist(), *start.tolist())
        if key not in known:
            known[key] = super().path_windows(trajectory, start)
        return known[key]


@pytest.mark.parametrize("greedy_drafts", [False, True])
def test_the_mean_of_many_walks(loaded, trajectories, greedy_drafts):
    runner = Remembering(loaded.target, loaded.drafter, trajectories, K, temperature=3.0)
    expected = expected_walk(runner, MAX_TOKENS, greedy_drafts)
    drawn = [
        simulate_walk(runner, MAX_TOKENS, greedy_drafts, seed) for seed in range(1 if greedy_drafts else 500)
    ]
    for name in ("num_drafts", "num_accepted_tokens"):
        counts = torch.tensor([float(getattr(counts, name)) for counts in drawn])
        error = 0.0 if greedy_drafts else float(counts.std() / len(counts) ** 0.5)
        assert abs(float(getattr(expected, name).sum()) - float(counts.mean())) <= 4 * error


def test_blocks_change_nothing(runner, monkeypatch):
    whole = expected_walk(runner, MAX_TOKENS, greedy_drafts=False)
    monkeypatch.setattr(walk, "_LOGITS_ON_CPU", 1)
    monkeypatch.setattr(walk, "_BATCH", 2)
    parts = expected_walk(runner, MAX_TOKENS, greedy_drafts=False)
    torch.testing.assert_close(
        parts.num_accepted_tokens_per_pos, whole.num_accepted_tokens_per_pos, atol=1e-4, rtol=1e-4
    )


def test_the_targets_part_is_kept_for_other_drafters(runner, monkeypatch):
    paths = list(target_paths(runner))
    runner.drafter.model.requires_grad_(False)
    head = next(p for n, p in runner.drafter.model.named_parameters() if n.startswith("lm_head"))
    saved = head.clone()
    before = expected_walk(runner, MAX_TOKENS, False, paths)
    head.mul_(0.5)
    try:
        fresh = expected_walk(runner, MAX_TOKENS, False)
        monkeypatch.setattr(type(runner.target), "encode", lambda *_: pytest.fail("encoded again"))
        after = expected_walk(runner, MAX_TOKENS, False, paths)
    finally:
        head.copy_(saved)
    assert after.mean_accepted == fresh.mean_accepted
    assert abs(after.mean_accepted - before.mean_accepted) > 1e-4


def test_a_prompt_without_room_counts_nothing(loaded, trajectories):
    short = collate([[1, 2, 3]], [[4] * K])
    both = collate(
        [[1, 2, 3], trajectories.input_ids[0, :3].tolist()], [[4] * K, trajectories.input_ids[0, 3:].tolist()]
    )
    walked = [
        expected_walk(WindowRunner(loaded.target, loaded.drafter, rows, K, 0.7), MAX_TOKENS, False)
        for rows in (short, both, trajectories.select(torch.tensor([0])))
    ]
    assert walked[0].num_drafts.tolist() == [0.0]
    assert walked[1].num_drafts[0] == 0.0
    torch.testing.assert_close(walked[1].num_drafts[1], walked[2].num_drafts[0])
    assert (
        expected_walk(WindowRunner(loaded.target, loaded.drafter, both, K, 0.7), 1, False).num_drafts.sum()
        == 0
    )
