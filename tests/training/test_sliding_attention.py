"""Sliding attention: a whole pass is the model's own, and windows behind a cache are refused where it spans too little.

Left out: that a command refuses before anything is generated (test_training_command.py, test_study_facts.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_bad_input import refused
from training_pair import VOCAB, K, load, qwen3, widen
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    Qwen3ForCausalLM,
)
from unpacked import causal_window

from ppow_train import causal
from ppow_train.drafters.causal_lm import CausalLMDrafter
from ppow_train.last_layer import read_slots
from ppow_train.packing import window_tokens
from ppow_train.rollout import WindowRunner
from ppow_train.target import Target
from ppow_train.types import Trajectories
from ppow_train.walk import expected_walk

SPAN, LENGTH = 8, 40
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "sliding_window": SPAN,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}


def sliding_target(tmp_path: Path, span: int) -> Target:
    """A target whose odd layers attend to `span` tokens."""
    config = qwen3(4)
    config.layer_types = ["full_attention", "sliding_attention"] * 2
    config.use_sliding_window, config.sliding_window = True, span
    model = Qwen3ForCausalLM(config)
    widen(model, 11)
    model.save_pretrained(tmp_path / "sliding")
    return Target(tmp_path / "sliding")


@pytest.fixture(params=["gemma3", "gpt_oss"])
def model(request: Any) -> Any:
    if request.param == "gemma3":
        model: Any = Gemma3ForCausalLM(Gemma3TextConfig(**SIZES))
    else:
        model = GptOssForCausalLM(GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2))
    widen(model, 3)
    return model.eval()


@pytest.fixture
def long() -> Trajectories:
    ids = torch.randint(1, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    return Trajectories(ids, torch.tensor([4, 3]), torch.tensor([LENGTH, LENGTH - 5]))


@torch.no_grad()
def test_a_whole_pass_is_the_models_own(model, long):
    """Of trajectories five times as long as it attends to: states, logits along the path, and what a head reads."""
    starts = torch.tensor([[5, 20, 31], [6, 19, 30]])
    own = model(input_ids=long.input_ids, output_hidden_states=True, use_cache=False)
    read = read_slots(starts - 1, K, LENGTH)
    for encoded in (causal.encode(model, long, (1, 3)), causal.encode(model, long, (1, 3), read)):
        slots = starts[..., None] - 1 + torch.arange(K)
        wanted = torch.stack([logits[at] for logits, at in zip(own.logits, slots, strict=True)])
        torch.testing.assert_close(
            causal.path_logits(model, encoded, starts, K), wanted, atol=1e-5, rtol=1e-5
        )
        taps = torch.cat([own.hidden_states[1], own.hidden_states[3]], dim=-1)
        torch.testing.assert_close(encoded.taps, taps, atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_windows_behind_a_cache_are_refused_beyond_the_span(model, long):
    """Where the span suffices they are the model's own; one token further they would not be."""
    encoded = causal.encode(model, long)
    starts = torch.tensor([[SPAN - K + 1]] * 2)  # its last token that is fed is the last that the layers span
    tokens = window_tokens(long.input_ids, starts, K)
    scores = causal.block_logits(model, encoded, starts, tokens)
    alone = causal_window(model, long.input_ids[0, : starts[0, 0]], tokens[0, 0])
    torch.testing.assert_close(scores[0, 0], alone, atol=1e-5, rtol=1e-5)
    with refused(f"attend to {SPAN} tokens", f"have {SPAN + 1},", "another objective"):
        causal.block_logits(model, encoded, starts + 1, tokens)


def test_a_span_that_suffices(trajectories, tmp_path):
    """Packed keys may outnumber it: they belong to many windows."""
    target = sliding_target(tmp_path, span=24)
    starts = torch.tensor([[4, 9, 16, 12]] * 3)
    encoded = target.encode(trajectories)
    for _ in range(2):  # the second pass finds the cache as it was
        scores = target.score(encoded, starts, window_tokens(trajectories.input_ids, starts, K))
    with torch.no_grad():
        ids = trajectories.input_ids[0]
        alone = causal_window(target.model, ids[:9], ids[9 : 9 + K])
    torch.testing.assert_close(scores[0, 1], alone, atol=2e-4, rtol=1e-4)


def test_what_reads_along_the_path_takes_any_length(directories, trajectories, tmp_path):
    """Objectives on target paths and the expected walk, with sliding attention in the target or in the drafter."""
    sliding, pair = sliding_target(tmp_path, span=6), load(directories, "causal_lm")
    own = CausalLMDrafter(sliding.model)
    for target, drafter in ((sliding, pair.drafter), (pair.target, own)):
        runner = WindowRunner(target, drafter, trajectories, K, 1.0)
        windows = runner.path_windows(torch.tensor([0]), torch.tensor([15]))
        logits = windows.target_logits if target is sliding else windows.draft_logits
        ids = trajectories.input_ids[0]
        with torch.no_grad():
            alone = causal_window(sliding.model, ids[:15], ids[15 : 15 + K])
        torch.testing.assert_close(logits[0], alone, atol=2e-4, rtol=1e-4)
        assert expected_walk(runner, 8, greedy_drafts=False).num_drafts.isfinite().all()
