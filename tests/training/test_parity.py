"""The simulated serving walk against one done step by step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ppow_train.data import collate
from ppow_train.pair import load_pair
from ppow_train.rollout import WindowRunner
from ppow_train.verification import acceptance_ratio, overlap
from ppow_train.walk import expected_walk, simulate_walk
from vllm_ppow.metrics import SpecDecodeCounts

TINY = Path(__file__).parents[2] / "examples" / "tiny"
K, MAX_TOKENS = 4, 24
PROMPTS = [[40, 300, 17, 5, 900, 61, 12, 8], [500, 21, 22, 23, 700, 9]]


@pytest.fixture(scope="module", params=["eagle3", "causal_lm"])
def greedy_runner(request) -> WindowRunner:
    """The tiny pair with greedy continuations of two prompts."""
    pair = load_pair(str(TINY / "target"), str(TINY / request.param))
    completions = []
    for prompt in PROMPTS:
        output = pair.target.model.generate(
            torch.tensor([prompt]), max_new_tokens=MAX_TOKENS + K, do_sample=False, pad_token_id=0
        )
        completions.append(output[0, len(prompt) :].tolist())
    return WindowRunner(pair.target, pair.drafter, collate(PROMPTS, completions), K, 1.0, greedy=True)


def walk_by_hand(runner: WindowRunner) -> SpecDecodeCounts:
    """Draft from where the last draft ended, one forward per draft, as a server does."""
    per_position, drafts = [0] * K, 0
    for row in range(len(runner.trajectories)):
        alone = runner.trajectories.select(torch.tensor([row]))
        target = runner.target.encode(alone)
        with torch.no_grad():
            draft = runner.drafter.encode(alone, target)
        produced, prompt = 1, int(alone.prompt_lengths[0])
        while produced < MAX_TOKENS and prompt + produced + K <= int(alone.lengths[0]):
            start = torch.tensor([[prompt + produced]])
            tokens, _ = runner.drafter.sample(draft, start, K, temperature=0)
            kept = 0
            while kept < K and int(tokens[0, 0, kept]) == int(alone.input_ids[0, prompt + produced + kept]):
                per_position[kept] += 1
                kept += 1
            drafts += 1
            produced += kept + 1
    return SpecDecodeCounts(drafts, drafts * K, sum(per_position), tuple(per_position))


def test_the_walk_equals_one_done_by_hand(greedy_runner):
    expected = walk_by_hand(greedy_runner)
    assert expected.num_accepted_tokens > 5  # else the walk would not have been tested
    assert simulate_walk(greedy_runner, MAX_TOKENS, greedy_drafts=True) == expected
    assert simulate_walk(greedy_runner, MAX_TOKENS, greedy_drafts=True, chunk=3) == expected


def test_at_temperature_zero_the_expected_walk_is_the_walk(greedy_runner):
    counted = walk_by_hand(greedy_runner)
    expected = expected_walk(greedy_runner, MAX_TOKENS, greedy_drafts=True)
    assert expected.num_drafts.sum() == counted.num_drafts
    assert expected.num_accepted_tokens.sum() == counted.num_accepted_tokens
    assert expected.mean_accepted == pytest.approx(counted.mean_accepted)
    assert expected.acceptance_per_position == pytest.approx(counted.acceptance_per_position)


def test_a_sampled_walk_is_repeatable_and_random(greedy_runner):
    first = simulate_walk(greedy_runner, MAX_TOKENS, greedy_drafts=False, seed=1)
    assert first == simulate_walk(greedy_runner, MAX_TOKENS, greedy_drafts=False, seed=1)
    assert any(
        first != simulate_walk(greedy_runner, MAX_TOKENS, greedy_drafts=False, seed=s) for s in (2, 3, 4)
    )


def test_acceptance_given_the_output_has_the_right_mean():
    """Σ_y p(y) · min(1, q/p)(y) = Σ_v min(p, q): seen from the output, drafts are accepted as often as in a rollout."""
    generator = torch.Generator().manual_seed(0)
    target, draft = torch.randn(2, 50, 7, generator=generator, dtype=torch.float64)
    p = target.softmax(-1)
    ratio = acceptance_ratio(draft.log_softmax(-1), target.log_softmax(-1))
    assert torch.allclose((p * ratio).sum(-1), overlap(target, draft))
