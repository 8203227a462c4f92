"""Prompts and trajectories that are too long are refused before the hours that they would cost.

Left out: what a server takes (test_data_endpoint.py); the refusals themselves (test_bad_input.py).
"""

from __future__ import annotations

import pytest
import torch
from test_bad_input import refused
from test_sliding_attention import sliding_target
from training_pair import K, load

from ppow_train.drafters.causal_lm import CausalLMDrafter
from ppow_train.generation import HuggingFaceBackend, Sampling, load_tokenizer
from ppow_train.rollout import WindowRunner


def test_one_prompt_too_long_is_refused_before_the_first_batch(directories, monkeypatch):
    """Not when its own batch comes, which may be after hours."""
    model = load(directories, "causal_lm").target.model
    sampling = Sampling(max_new_tokens=8, temperature=1.0, end_token_ids=(0,))
    backend = HuggingFaceBackend(model, load_tokenizer(directories.target), sampling, batch_size=1)
    monkeypatch.setattr(model, "generate", lambda *args, **kwargs: pytest.fail("began"))
    with refused("need 129 tokens", "takes 128", "--max-new-tokens"):
        backend.continue_prompts([[1], [2, 3], [4] * 121], seed=0, report=lambda done: None)


def test_the_longest_trajectory_is_checked_before_training(directories, trajectories, tmp_path):
    """Against target and drafter where windows are drafted; an update would notice only when it draws that one."""
    sliding, pair = sliding_target(tmp_path, span=19), load(directories, "causal_lm")
    spanned = trajectories.select(torch.tensor([1, 2]))
    own, drafter = CausalLMDrafter(sliding.model), pair.drafter
    for target, drafts in ((sliding, drafter), (pair.target, own)):
        WindowRunner(target, drafts, spanned, K, 1.0, drafts=True)
        WindowRunner(target, drafts, trajectories, K, 1.0)
        with refused("attend to 19 tokens", "have 20", "objective ppow", "--max-new-tokens"):
            WindowRunner(target, drafts, trajectories, K, 1.0, drafts=True)
