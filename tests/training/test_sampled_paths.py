"""Temperature 0 on trajectories that were sampled: what counts is the target's argmax, not what they happen to say."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from enumerated_windows import CASE_NAMES, CASES, windows_on
from enumeration import random_tables
from training_pair import K, LoadedPair, load

from ppow_train.config import PPOWConfig
from ppow_train.data import collate
from ppow_train.drafters.causal_lm import CausalLMDrafter
from ppow_train.objectives.choose import make_objective
from ppow_train.objectives.forms import GreedyTarget
from ppow_train.objectives.formulas import formula
from ppow_train.objectives.window import exact, overlap_window
from ppow_train.options import PPOWOptions
from ppow_train.rollout import WindowRunner
from ppow_train.training import make_runner
from ppow_train.types import Rollout, Trajectories
from ppow_train.verification import greedy_accepted_length

ROWS = torch.tensor([0] * 30 + [1] * 20 + [2] * 10)
STARTS = torch.tensor([6] * 15 + [11] * 15 + [7] * 20 + [4] * 10)


def runner_on(loaded: LoadedPair, rows: Trajectories, sampled_paths: bool, own: bool = False) -> WindowRunner:
    """Serving at temperature 0; drafts are the drafter's, or the target's `own`, of which many are accepted."""
    drafter = CausalLMDrafter(loaded.target.model) if own else loaded.drafter
    return WindowRunner(loaded.target, drafter, rows, K, 0.3, greedy=True, sampled_paths=sampled_paths)


def roll_out(runner: WindowRunner) -> Rollout:
    noise = runner.draw_noise(len(ROWS), torch.Generator().manual_seed(0))
    return runner.roll_out(ROWS, STARTS, noise)


@torch.no_grad()
def argmax_after(loaded: LoadedPair, prefix: torch.Tensor) -> int:
    """What the target says next, by a forward of its own."""
    return int(loaded.target.model(input_ids=prefix[None], use_cache=False).logits[0, -1].argmax())


def greedy_trajectories(loaded: LoadedPair) -> Trajectories:
    prompts, continued = [[5, 6, 7], [8, 9, 10, 11, 12], [13]], []
    for prompt in prompts:
        ids = torch.tensor(prompt)
        for _ in range(15):
            ids = torch.cat([ids, torch.tensor([argmax_after(loaded, ids)])])
        continued.append(ids[len(prompt) :].tolist())
    return collate(prompts, continued)


@pytest.fixture(scope="module")
def same(directories) -> LoadedPair:
    return load(directories, "causal_lm")


def test_a_draft_token_is_accepted_if_it_is_the_argmax(same, trajectories):
    """Token by token; these trajectories are no greedy ones, so a match with them means nothing."""
    rollout = roll_out(runner_on(same, trajectories, sampled_paths=True, own=True))
    wanted = []
    for row, start, drafted in zip(ROWS.tolist(), STARTS.tolist(), rollout.tokens, strict=True):
        ids, accepted = trajectories.input_ids[row, :start], 0
        while accepted < K and argmax_after(same, ids) == drafted[accepted]:
            ids = torch.cat([ids, drafted[accepted : accepted + 1]])
            accepted += 1
        wanted.append(accepted)
    assert rollout.num_accepted_tokens.tolist() == wanted
    assert 0.3 < torch.tensor(wanted).float().mean() < K - 0.3
    paths = torch.stack([trajectories.input_ids[r, s : s + K] for r, s in zip(ROWS, STARTS, strict=True)])
    assert not greedy_accepted_length(rollout.tokens, paths).equal(rollout.num_accepted_tokens)


def test_on_greedy_trajectories_both_are_the_same(same):
    rows = greedy_trajectories(same)
    by_argmax, by_path = (roll_out(runner_on(same, rows, asked, own=True)) for asked in (True, False))
    assert by_path.num_accepted_tokens.sum() > 0
    for field in dataclasses.fields(Rollout):
        assert getattr(by_argmax, field.name).equal(getattr(by_path, field.name)), field.name


def test_path_windows_know_the_argmax(loaded, trajectories):
    """Of the whole vocabulary, as a column of the drafter's."""
    windows = runner_on(loaded, trajectories, sampled_paths=True).path_windows(ROWS, STARTS)
    plain = runner_on(loaded, trajectories, sampled_paths=False).path_windows(ROWS, STARTS)
    assert plain.greedy_tokens is None
    assert windows.target_logits.equal(plain.target_logits)
    assert windows.draft_logits.equal(plain.draft_logits)
    wanted = [
        [argmax_after(loaded, trajectories.input_ids[row, : start + i]) for i in range(K)]
        for row, start in zip(ROWS.tolist(), STARTS.tolist(), strict=True)
    ]
    assert windows.greedy_tokens is not None
    assert windows.greedy_tokens.equal(loaded.drafter.vocabulary.columns(torch.tensor(wanted)))
    assert not windows.greedy_tokens.equal(windows.tokens)


@pytest.mark.parametrize("case", CASES, ids=CASE_NAMES)
def test_the_hard_form_takes_the_argmax(case):
    """A window whose path departs from the argmax is worth what one is whose path is the argmax."""
    *shape, draftable = case
    tables = random_tables(*shape, draftable=draftable)
    path = next(iter(tables.paths()))
    windows = windows_on(tables, path)
    other = (windows.tokens + 1) % windows.draft_logits.shape[-1]
    departed = dataclasses.replace(windows, tokens=other, greedy_tokens=windows.tokens)
    for objective in (exact, overlap_window):
        on_path = objective(windows, 0.12, form=GreedyTarget(2.0))
        assert objective(departed, 0.12, form=GreedyTarget(2.0)).equal(on_path)
        assert not objective(dataclasses.replace(windows, tokens=other), 0.12, form=GreedyTarget(2.0)).equal(
            on_path
        )
    options = PPOWOptions(objective="drafts", serving_temperature=0.0, greedy_target="hard")
    assert make_objective(options)(departed).equal(make_objective(options)(windows))


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ({"objective": "ppow", "serving_temperature": 0.0, "continuations": 2}, True),
        ({"objective": "ppow", "serving_temperature": 0.0}, False),
        ({"objective": "ppow", "continuations": 2}, False),
        (
            {"objective": "exact", "serving_temperature": 0.0, "greedy_target": "hard", "continuations": 2},
            True,
        ),
        ({"objective": "exact", "serving_temperature": 0.0, "greedy_target": "hard"}, False),
        ({"objective": "exact", "serving_temperature": 0.0, "continuations": 2}, False),
    ],
)
def test_it_is_looked_up_where_it_matters(options, needed, loaded, trajectories, tmp_path):
    pair: Any = SimpleNamespace(target=loaded.target, drafter=loaded.drafter)
    config = PPOWConfig(output_dir=str(tmp_path), use_cpu=True, num_speculative_tokens=K, **options)
    assert make_runner(pair, trajectories, config).sampled_paths is needed
    told = formula(PPOWOptions(**options))
    if options["objective"] == "exact" and "greedy_target" in options:
        assert ("argmax p_l" in told) is needed
        assert ("y_l" in told) is not needed
