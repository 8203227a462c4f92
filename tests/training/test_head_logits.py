"""What models do to their head's output: the target and a causal LM drafter see the logits that the model gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_bad_input import refused
from training_pair import VOCAB, K, load, qwen3, widen
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    Qwen3ForCausalLM,
)

from ppow_train.drafters.causal_lm import CausalLMDrafter
from ppow_train.packing import window_tokens
from ppow_train.target import Target

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}
MODELS: dict[str, Any] = {
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**COMMON, logits_scaling=8.0)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**COMMON, logit_scale=0.0625)),
    "cohere2": lambda: Cohere2ForCausalLM(Cohere2Config(**COMMON, logit_scale=0.25)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**COMMON, final_logit_softcapping=5.0)),
}


@pytest.fixture(params=MODELS)
def directory(request: Any, tmp_path: Path) -> Path:
    model = MODELS[request.param]()
    widen(model, 12)
    model.save_pretrained(tmp_path / request.param)
    return tmp_path / request.param


@torch.no_grad()
def test_logits_are_the_models_own(directory, trajectories):
    target = Target(directory)
    drafter = CausalLMDrafter.load(directory, "cpu", torch.float32)
    own = target.model(input_ids=trajectories.input_ids, use_cache=False).logits
    plain = target.model.get_output_embeddings()(target.encode(trajectories).hidden)
    assert (own - plain).abs().max() > 1.0, "the head alone says something else"

    starts = torch.tensor([[4, 7], [6, 9], [2, 5]])
    rows = torch.arange(3)[:, None, None]
    wanted = own[rows, starts[..., None] - 1 + torch.arange(K)]
    tokens = window_tokens(trajectories.input_ids, starts, K)
    seen = target.encode(trajectories)
    drafted = drafter.encode(trajectories, None)
    for logits in (
        target.path_logits(seen, starts, K),
        target.score(seen, starts, tokens),
        drafter.path_logits(drafted, trajectories, starts, K),
        drafter.score(drafted, starts, tokens),
    ):
        torch.testing.assert_close(logits, wanted, atol=5e-4, rtol=1e-4)
    torch.testing.assert_close(
        drafter.slot_logits(drafted, starts - 1), wanted[:, :, 0], atol=5e-4, rtol=1e-4
    )


def test_logits_that_come_to_be_in_an_unknown_way(directories, monkeypatch):
    own = Qwen3ForCausalLM.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = own(self, *args, **kwargs)
        output.logits = output.logits * 1.1
        return output

    load(directories, "causal_lm")
    monkeypatch.setattr(Qwen3ForCausalLM, "forward", forward)
    for read in (Target, lambda directory: CausalLMDrafter.load(directory, "cpu", torch.float32)):
        with refused("Qwen3ForCausalLM", "not known here", "take another model"):
            read(directories.target)


def test_a_head_that_does_nothing_else_gives_the_very_same_numbers(trajectories):
    from ppow_train.causal import head_logits

    model = Qwen3ForCausalLM(qwen3(1))
    hidden = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    assert head_logits(model, hidden).equal(model.get_output_embeddings()(hidden).float())
