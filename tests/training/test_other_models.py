"""Drafters and targets that are not built like Llama: their layers and sizes are found, or they are refused at once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from training_pair import VOCAB, K, widen
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)
from unpacked import causal_window

from ppow_train.causal import check_positions, check_windows
from ppow_train.config import PPOWConfig
from ppow_train.distributed import admit_computations
from ppow_train.errors import UserError
from ppow_train.lora_targets import LLAMA_LAYERS, check_lora_targets, default_targets
from ppow_train.packing import window_tokens
from ppow_train.pair import load_pair
from ppow_train.shapes import Shapes
from ppow_train.tiny.text import train_tokenizer
from ppow_train.training import train_adapter
from ppow_train.types import Trajectories

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def opt() -> torch.nn.Module:
    own = {"ffn_dim": 48, "max_position_embeddings": 128, "word_embed_proj_dim": 32}
    return OPTForCausalLM(OPTConfig(**SIZES, **own))


def bloom() -> torch.nn.Module:
    return BloomForCausalLM(BloomConfig(**SIZES))


MODELS: dict[str, tuple[Any, int, list[str]]] = {
    "opt": (opt, 48, ["fc1", "fc2", "k_proj", "out_proj", "q_proj", "v_proj"]),
    "phi3": (
        lambda: Phi3ForCausalLM(Phi3Config(**SIZES, intermediate_size=48)),
        48,
        ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"],
    ),
    "neox": (
        lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, intermediate_size=48)),
        48,
        ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"],
    ),
    "falcon": (
        lambda: FalconForCausalLM(FalconConfig(**SIZES, ffn_hidden_size=48)),
        48,
        ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"],
    ),
    "bloom": (bloom, 128, ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"]),
    "gpt2": (
        lambda: GPT2LMHeadModel(
            GPT2Config(**SIZES | {"num_hidden_layers": 1}, n_embd=32, n_layer=1, n_head=2, n_positions=64)
        ),
        128,
        [],
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_sizes_and_layers_are_found(name):
    make, intermediate, layers = MODELS[name]
    model = make()
    assert Shapes.of(model).intermediate == intermediate
    assert default_targets(model) == layers
    if layers:
        check_lora_targets(model, layers)
    else:
        with pytest.raises(UserError, match="no linear layers that LoRA could adapt"):
            check_lora_targets(model, LLAMA_LAYERS)


def test_llamas_layers_keep_their_order(loaded):
    assert set(LLAMA_LAYERS) <= set(loaded.drafter.lora_targets)
    if loaded.drafter.drafter_type == "causal_lm":
        assert loaded.drafter.lora_targets == list(LLAMA_LAYERS)


def test_a_model_without_sizes_is_refused_in_a_sentence():
    config = SimpleNamespace(num_hidden_layers=1, num_attention_heads=2)
    config.get_text_config = lambda: config
    model = torch.nn.Linear(2, 2)
    model.config = config
    with pytest.raises(UserError, match=r"config of Linear does not tell its sizes .*hidden_size"):
        Shapes.of(model)


def test_windows_of_a_model_with_masks_of_its_own_are_refused():
    model = bloom().eval()
    widen(model, 1)
    with pytest.raises(UserError, match="does not take windows packed behind a shared prefix"):
        check_windows(model)
    own = opt().eval()
    widen(own, 1)
    check_windows(own)


def test_an_opt_pair_is_trained(tmp_path, progress):
    for seed, name in enumerate(("target", "drafter")):
        model = opt()
        widen(model, seed)
        model.save_pretrained(tmp_path / name)
    train_tokenizer(["windows of draft tokens"], VOCAB, tmp_path / "target")
    pair = load_pair(str(tmp_path / "target"), str(tmp_path / "drafter"))
    ids = torch.randint(1, VOCAB, (2, 20), generator=torch.Generator().manual_seed(5))
    rows = Trajectories(ids, torch.tensor([3, 5]), torch.tensor([20, 14]))
    starts = torch.tensor([[4, 9, 12], [6, 7, 8]])
    packed = pair.target.score(pair.target.encode(rows), starts, window_tokens(ids, starts, K))
    with torch.no_grad():
        alone = causal_window(pair.target.model, ids[0, :9], ids[0, 9 : 9 + K])
    torch.testing.assert_close(packed[0, 1], alone, atol=2e-4, rtol=1e-4)
    config = PPOWConfig(
        output_dir=str(tmp_path / "state"),
        use_cpu=True,
        num_speculative_tokens=K,
        trajectories_per_step=2,
        windows_per_step=4,
        max_steps=1,
        lora_rank=2,
        save_strategy="no",
    )
    written = train_adapter(pair, rows, config, tmp_path / "adapter", progress=progress).adapter
    assert written.config.training["updates"] == 1
    assert Path(written.directory / "adapter_model.safetensors").is_file()


def test_dropout_is_off_while_windows_are_computed():
    """The distribution that drafts in serving is trained, and however many forwards an update has, they agree."""
    model = opt().train()
    assert model.config.dropout > 0
    admit_computations(model)
    seen = model(compute=lambda: [module.training for module in model.modules()])
    assert not any(seen)
    ids = torch.arange(1, 9)[None]
    first, second = (model.train()(compute=lambda: model.model(ids).last_hidden_state) for _ in range(2))
    assert torch.equal(first, second)


def test_learned_positions_end_where_their_table_does():
    check_positions(opt(), 128)
    with pytest.raises(
        UserError, match=r"has a table of 128 positions, the longest prompt .* are 129 tokens"
    ):
        check_positions(opt(), 129)
    computed = Phi3ForCausalLM(Phi3Config(**SIZES, intermediate_size=48, max_position_embeddings=128))
    check_positions(computed, 129)
