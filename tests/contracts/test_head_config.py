"""An EAGLE-3 head in the library's format is trained as vLLM serves it, whatever its config.json leaves out.

Both sides fill in defaults of their own, and not the same ones; what vLLM has no value for, training refuses to be
without (tests/training/test_eagle_checkpoint.py), and here it is asked whether vLLM really has none.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from ppow_train.drafters.eagle3_checkpoint import _NEEDED, _NEEDED_OF_QWEN3, _library_config

CONFIG: dict[str, Any] = {
    "speculators_model_type": "eagle3",
    "speculators_config": {
        "algorithm": "eagle3",
        "default_proposal_method": "greedy",
        "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 5}],
        "verifier": {"architectures": ["Qwen3ForCausalLM"], "name_or_path": None},
    },
    "draft_vocab_size": 120,
    "eagle_aux_hidden_state_layer_ids": [2, 4, 5],
    "fc_norm": False,
    "norm_before_fc": False,
    "norm_before_residual": True,
    "norm_output": False,
    "target_hidden_size": 64,
    "transformer_layer_config": {
        "attention_bias": False,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 96,
        "max_position_embeddings": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 1,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "tie_word_embeddings": False,
        "vocab_size": 288,
    },
}
SWITCHES = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip


def served(directory: Path, model_type: str) -> dict[str, Any]:
    """What vLLM's model of such a head takes from the config, as it takes it."""
    from vllm.transformers_utils.config import get_config, set_default_rope_theta

    config = get_config(str(directory), trust_remote_code=False)
    if model_type == "qwen3":  # as its decoder layer does
        set_default_rope_theta(config, default_theta=1000000)
    heads = config.num_attention_heads
    return {
        "model": config.architectures[0],
        **{name: bool(getattr(config, name)) for name in SWITCHES},
        "draft_vocab_size": getattr(config, "draft_vocab_size", None) or config.vocab_size,
        "width": getattr(config, "target_hidden_size", config.hidden_size),
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "kv_heads": getattr(config, "num_key_value_heads", heads),
        "bias": getattr(config, "attention_bias", False),
        "rope": getattr(config, "rope_parameters", None) or {"rope_type": "default", "rope_theta": 10000.0},
    }


def trained(directory: Path) -> dict[str, Any]:
    """The same of what is trained."""
    config = _library_config(json.loads((directory / "config.json").read_text()))
    layer = config.transformer_layer_config
    return {
        "model": {"llama": "Eagle3LlamaForCausalLM", "qwen3": "Eagle3Qwen3ForCausalLM"}[layer.model_type],
        **{name: getattr(config, name) for name in SWITCHES},
        "draft_vocab_size": config.draft_vocab_size,
        "width": config.target_hidden_size or layer.hidden_size,
        "head_dim": layer.head_dim,
        "kv_heads": layer.num_key_value_heads,
        "bias": layer.attention_bias,
        "rope": layer.rope_parameters,
    }


def compare(directory: Path, model_type: str | None, change: Any) -> None:
    config = copy.deepcopy(CONFIG)
    layer = config["transformer_layer_config"]
    if model_type:
        layer["model_type"] = model_type
    change(config, layer)
    (directory / "config.json").write_text(json.dumps(config))
    assert trained(directory) == served(directory, layer.get("model_type", "llama"))


@pytest.mark.parametrize("model_type", ["llama", "qwen3", None])
@pytest.mark.parametrize("name", [*SWITCHES, "draft_vocab_size", "target_hidden_size"])
@pytest.mark.parametrize("null", [False, True])
def test_switches_and_sizes_that_are_absent(name, null, model_type, tmp_path):
    compare(
        tmp_path, model_type, lambda config, layer: config.update({name: None}) if null else config.pop(name)
    )


@pytest.mark.parametrize("model_type", ["llama", "qwen3", None])
@pytest.mark.parametrize("name", ["head_dim", "attention_bias", "rope_parameters", "tie_word_embeddings"])
def test_what_layers_leave_out(name, model_type, tmp_path):
    compare(tmp_path, model_type, lambda config, layer: layer.pop(name))


def test_llama_layers_without_groups_of_queries(tmp_path):
    compare(tmp_path, "llama", lambda config, layer: layer.pop("num_key_value_heads"))


@pytest.mark.parametrize(
    ("model_type", "name"),
    [*(("llama", name) for name in _NEEDED), *(("qwen3", name) for name in _NEEDED_OF_QWEN3)],
)
def test_what_vllm_has_no_value_for(model_type, name, tmp_path):
    """Its config stays without, and its layers read it without a default: the number of key-value heads, too."""
    import inspect

    from vllm.model_executor.models import llama, llama_eagle3, qwen3, qwen3_eagle3
    from vllm.transformers_utils.config import get_config

    config = copy.deepcopy(CONFIG)
    config["transformer_layer_config"]["model_type"] = model_type
    del config["transformer_layer_config"][name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert not hasattr(get_config(str(tmp_path), trust_remote_code=False), name)
    layers = {
        "llama": (llama.LlamaDecoderLayer, llama_eagle3),
        "qwen3": (qwen3.Qwen3DecoderLayer, qwen3_eagle3),
    }
    assert any(f"config.{name}" in inspect.getsource(source) for source in layers[model_type])


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 500000.0},
        {"rope_theta": 500000.0, "rope_scaling": None},
        {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
        {"rope_scaling": LLAMA3},
        {"rope_scaling": None},
        {"rope_parameters": {"rope_type": "default"}},
        {"rope_parameters": LLAMA3},
        {"rope_parameters": None},
        {},
    ],
    ids=str,
)
def test_rotary_embeddings_as_older_and_newer_configs_write_them(rope, model_type, tmp_path):
    def change(config: dict[str, Any], layer: dict[str, Any]) -> None:
        del layer["rope_parameters"]
        layer.update(rope)

    compare(tmp_path, model_type, change)


def test_vllms_own_default_of_a_qwen3_layer():
    """`served` repeats it, since it is in the constructor of a layer."""
    import inspect

    from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer

    assert "set_default_rope_theta(config, default_theta=1000000)" in inspect.getsource(
        Qwen3DecoderLayer.__init__
    )
