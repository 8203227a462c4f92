"""Packed windows against the same windows run one at a time (unpacked.py): values, gradients, caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from training_pair import KINDS, VOCAB, K, LoadedPair, load
from unpacked import draft_windows, over_target_vocabulary, target_windows

from ppow_train.drafters.base import ChainDrafter
from ppow_train.packing import window_tokens
from ppow_train.types import Encoded, Trajectories

TOLERANCE: Any = {"atol": 2e-4, "rtol": 1e-4}  # logits spread over tens; float32, other orders of summation


@pytest.fixture(scope="module")
def starts() -> torch.Tensor:
    """Windows that overlap, repeat and touch both ends of what each trajectory has room for (K = 4)."""
    return torch.tensor([[4, 9, 9, 16], [6, 8, 10, 7], [2, 7, 3, 2]])


@pytest.fixture(scope="module")
def tokens(starts: Any) -> torch.Tensor:
    """Off the path: drawn at random."""
    return torch.randint(1, VOCAB, (*starts.shape, K), generator=torch.Generator().manual_seed(9))


def encode(loaded: LoadedPair, trajectories: Trajectories) -> tuple[Encoded, Encoded]:
    target = loaded.target.encode(trajectories)
    return target, loaded.drafter.encode(trajectories, target)


def uniforms(starts: torch.Tensor, length: int, seed: int) -> torch.Tensor:
    return torch.rand(*starts.shape, length, generator=torch.Generator().manual_seed(seed))


def test_score_equals_windows_run_alone(loaded, trajectories, starts, tokens):
    _, draft = encode(loaded, trajectories)
    with torch.no_grad():
        packed = loaded.drafter.score(draft, starts, tokens)
        alone = draft_windows(loaded.target, loaded.drafter, trajectories, starts, tokens)
    assert alone.std() > 0.5
    torch.testing.assert_close(packed, alone, **TOLERANCE)


def test_target_scores_equal_windows_run_alone(loaded, trajectories, starts, tokens):
    target, _ = encode(loaded, trajectories)
    alone = target_windows(loaded.target, trajectories, starts, tokens)
    torch.testing.assert_close(loaded.target.score(target, starts, tokens), alone, **TOLERANCE)
    own = window_tokens(trajectories.input_ids, starts, K)
    alone = target_windows(loaded.target, trajectories, starts, own)
    torch.testing.assert_close(loaded.target.path_logits(target, starts, K), alone, **TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_those_of_windows_run_alone(kind, directories, trajectories, starts, tokens):
    """Of LoRA and base weights, with LoRA off its starting point (B = 0 gives A no gradient)."""
    pair = load(directories, kind)
    inject_adapter_in_model(LoraConfig(r=4, target_modules=pair.drafter.lora_targets), pair.drafter.model)
    generator = torch.Generator().manual_seed(1)
    trained = {}
    for name, parameter in pair.drafter.model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        parameter.requires_grad_("verifier_" not in name)
        if parameter.requires_grad:
            trained[name] = parameter
    _, draft = encode(pair, trajectories)
    logits = pair.drafter.score(draft, starts, tokens)
    weights = torch.randn(logits.shape, generator=generator)
    packed = (logits * weights).mean()
    alone = (draft_windows(pair.target, pair.drafter, trajectories, starts, tokens) * weights).mean()
    ours = torch.autograd.grad(packed, list(trained.values()))
    wanted = torch.autograd.grad(alone, list(trained.values()))
    assert any("lora_A" in name for name in trained)
    for name, one, other in zip(trained, ours, wanted, strict=True):
        assert other.abs().max() > 0, name
        scale = other.abs().max().item()
        difference = (one - other).abs().max().item()
        assert difference < 1e-3 * scale, name


def test_block_equals_chain(directories, trajectories, starts, tokens):
    """The causal LM's one-forward windows against the chain that all kinds share."""
    pair = load(directories, "causal_lm")
    _, draft = encode(pair, trajectories)
    with torch.no_grad():
        block = pair.drafter.score(draft, starts, tokens)
        chain = ChainDrafter.score(pair.drafter, draft, starts, tokens)
        first = pair.drafter.score(draft, starts, tokens[..., :1])
    torch.testing.assert_close(block, chain, **TOLERANCE)
    torch.testing.assert_close(first, block[..., :1, :], **TOLERANCE)


def test_windows_leave_the_cache_as_it_was(loaded, trajectories, starts, tokens):
    target, draft = encode(loaded, trajectories)
    before = [
        (layer.keys.clone(), layer.values.clone())
        for encoded in (target, draft)
        for layer in encoded.cache.layers
    ]
    with torch.no_grad():
        loaded.target.score(target, starts, tokens)
        loaded.drafter.score(draft, starts, tokens)
        loaded.drafter.sample(draft, starts, K, 1.0, uniforms(starts, K, seed=0))
    after = [(layer.keys, layer.values) for encoded in (target, draft) for layer in encoded.cache.layers]
    assert before
    for (keys, values), (keys_after, values_after) in zip(before, after, strict=True):
        assert keys.equal(keys_after)
        assert values.equal(values_after)


def test_path_logits_are_scores_of_the_trajectorys_tokens(loaded, trajectories, starts):
    _, draft = encode(loaded, trajectories)
    own = window_tokens(trajectories.input_ids, starts, K)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded.drafter.path_logits(draft, trajectories, starts, K),
            loaded.drafter.score(draft, starts, own),
            **TOLERANCE,
        )


def test_greedy_samples_are_the_argmax_chain(loaded, trajectories, starts):
    _, draft = encode(loaded, trajectories)
    sampled, _ = loaded.drafter.sample(draft, starts, K, temperature=0)
    drafted = torch.zeros_like(sampled)
    for step in range(K):  # each token from scratch, given the ones before it
        with torch.no_grad():
            logits = draft_windows(
                loaded.target, loaded.drafter, trajectories, starts, drafted[..., : step + 1]
            )
        drafted[..., step] = over_target_vocabulary(loaded.drafter, logits[..., step, :]).argmax(-1)
    assert sampled.equal(drafted)


def test_sampled_logits_are_scores_of_the_sampled_tokens(loaded, trajectories, starts):
    _, draft = encode(loaded, trajectories)
    sampled, logits = loaded.drafter.sample(draft, starts, K, 1.0, uniforms(starts, K, seed=0))
    with torch.no_grad():
        torch.testing.assert_close(logits, loaded.drafter.score(draft, starts, sampled), **TOLERANCE)
    again, _ = loaded.drafter.sample(draft, starts, K, 1.0, uniforms(starts, K, seed=0))
    other, _ = loaded.drafter.sample(draft, starts, K, 1.0, uniforms(starts, K, seed=1))
    assert sampled.equal(again)
    assert not sampled.equal(other)


def test_samples_follow_the_temperature(loaded, trajectories):
    """500 first tokens at one place against the softmax at that temperature: mean log-probability, 4 errors."""
    _, draft = encode(loaded, trajectories)
    many = torch.full((3, 500), 7)
    sampled, logits = loaded.drafter.sample(draft, many, 1, 0.5, uniforms(many, 1, seed=2))
    logp = (over_target_vocabulary(loaded.drafter, logits[:, 0, 0]) / 0.5).log_softmax(-1)
    seen = logp.gather(-1, sampled[..., 0])
    wanted = -torch.special.entr(logp.exp()).sum(-1)
    assert ((seen.mean(-1) - wanted).abs() < 4 * seen.std(-1) / 500**0.5 + 1e-6).all()


def test_padding_is_never_read(loaded, trajectories, starts, tokens):
    ids = trajectories.input_ids.clone()
    for row, length in enumerate(trajectories.lengths.tolist()):
        ids[row, length:] = VOCAB - 1
    assert not ids.equal(trajectories.input_ids)
    repadded = Trajectories(ids, trajectories.prompt_lengths, trajectories.lengths)
    with torch.no_grad():
        one = loaded.drafter.score(encode(loaded, trajectories)[1], starts, tokens)
        other = loaded.drafter.score(encode(loaded, repadded)[1], starts, tokens)
    torch.testing.assert_close(one, other, **TOLERANCE)
