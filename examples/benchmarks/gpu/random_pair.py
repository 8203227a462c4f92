"""A target and an EAGLE-3 head of a given shape with random weights, and an adapter for the head, made on the spot.

What steps cost depends on shapes only, so random weights do for timing; acceptance comes from vLLM's synthetic
rejection sampling. The target is a config.json: vLLM fills it with `load_format="dummy"`. The head is written out: it
is loaded through the merge. Left out: tokenizers (prompts are token ids) and any use of what such a pair says.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from vllm_ppow.artifact import AdapterConfig, ModelRef, fingerprint_model, write_adapter

RANK = 16


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of the target; the head has one layer of the same sizes and drafts `draft_vocab_size` tokens."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    max_position_embeddings: int


QWEN3_8B = Shape(4096, 12288, 36, 32, 8, 128, 151936, 32000, 40960)
TINY = Shape(64, 128, 8, 4, 2, 32, 512, 256, 1024)


@dataclasses.dataclass(frozen=True)
class RandomPair:
    """Directories of the three."""

    target: Path
    head: Path
    adapter: Path


def pair_in(root: Path) -> RandomPair:
    """Where `build` puts them below a directory."""
    return RandomPair(root / "target", root / "head", root / "adapter")


def build(root: Path, shape: Shape, num_speculative_tokens: int) -> RandomPair:
    """Write target, head and adapter below `root`; what is complete already is kept.

    Args:
        num_speculative_tokens: K that the adapter names.
    """
    pair = pair_in(root)
    if (pair.adapter / "ppow_config.json").is_file():
        return pair
    write_config(pair.target, target_config(shape))
    # The target has no weights on disk; one tensor gives it the fingerprint that an adapter names its target by.
    save_file({"unused": torch.zeros(1)}, pair.target / "fingerprint.safetensors")
    write_head(pair.head, shape)
    write_adapter(
        pair.adapter,
        AdapterConfig(
            drafter_type="eagle3",
            base_drafter=ModelRef(str(pair.head.resolve()), fingerprint_model(pair.head)),
            target=ModelRef(str(pair.target.resolve()), fingerprint_model(pair.target)),
            num_speculative_tokens=num_speculative_tokens,
            draft_cost_ratio=0.1,
            draft_sample_method="greedy",
            temperature=0.0,
        ),
        lambda path: _write_lora(Path(path), shape),
    )
    return pair


def write_head(directory: Path, shape: Shape) -> None:
    """Write an EAGLE-3 head in the original format."""
    write_config(directory, _head_config(shape))
    save_file(_head_tensors(shape), directory / "model.safetensors", metadata={"format": "pt"})


def target_config(shape: Shape) -> dict[str, object]:
    return {
        **_common(shape),
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_hidden_layers": shape.num_hidden_layers,
        "vocab_size": shape.vocab_size,
        "attention_bias": False,
    }


def _head_config(shape: Shape) -> dict[str, object]:
    return {
        **_common(shape),
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "vocab_size": shape.vocab_size,
        "draft_vocab_size": shape.draft_vocab_size,
    }


def _common(shape: Shape) -> dict[str, object]:
    return {
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.max_position_embeddings,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def head_shapes(shape: Shape) -> dict[str, tuple[int, int]]:
    """Name -> [out, in] of the head's matrices, in the original EAGLE-3 format."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    query, key = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    return {
        "fc": (hidden, 3 * hidden),
        "lm_head": (shape.draft_vocab_size, hidden),
        "midlayer.self_attn.q_proj": (query, 2 * hidden),
        "midlayer.self_attn.k_proj": (key, 2 * hidden),
        "midlayer.self_attn.v_proj": (key, 2 * hidden),
        "midlayer.self_attn.o_proj": (hidden, query),
        "midlayer.mlp.gate_proj": (inner, hidden),
        "midlayer.mlp.up_proj": (inner, hidden),
        "midlayer.mlp.down_proj": (hidden, inner),
    }


def _head_tensors(shape: Shape) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}.weight": (torch.randn(size, generator=generator) * 0.02).to(torch.bfloat16)
        for name, size in head_shapes(shape).items()
    }
    for name in (
        "norm",
        "midlayer.hidden_norm",
        "midlayer.input_layernorm",
        "midlayer.post_attention_layernorm",
    ):
        tensors[f"{name}.weight"] = torch.ones(shape.hidden_size, dtype=torch.bfloat16)
    tensors["d2t"] = torch.zeros(shape.draft_vocab_size, dtype=torch.int64)  # draft id i is target id i
    tensors["t2d"] = torch.arange(shape.vocab_size) < shape.draft_vocab_size
    return tensors


def _write_lora(directory: Path, shape: Shape) -> None:
    """A LoRA of rank RANK on every matrix, as PEFT writes it."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, (rows, columns) in head_shapes(shape).items():
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator) * 0.01
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) * 0.01
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    modules = sorted({name.rpartition(".")[2] for name in head_shapes(shape)})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": modules, "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def write_config(directory: Path, config: dict[str, object]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
