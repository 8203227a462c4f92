"""Models of a few thousand weights for the training tests: a target, a causal LM drafter, EAGLE-3 heads of all makes.

Their weights are drawn wide, so that distributions are far from uniform and every position and token matters. Left out:
anything trained.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from ppow_train.drafters import load_drafter
from ppow_train.target import Target
from ppow_train.tiny.text import train_tokenizer

VOCAB, TARGET_LAYERS, TAP_LAYERS = 288, 8, (2, 4, 5)
KINDS = ("causal_lm", "eagle3", "eagle31", "reduced", "original")
DRAFT_VOCAB = 120
K = 4


@dataclasses.dataclass(frozen=True)
class Directories:
    """One target and its drafters on disk; `drafter[kind]` for each of KINDS."""

    root: Path
    target: Path
    drafter: dict[str, Path]


def qwen3(layers: int, hidden_size: int = 64, vocab_size: int = VOCAB) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )


def widen(model: torch.nn.Module, seed: int) -> None:
    """Redraw every weight: matrices wide, norms around one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.2 if parameter.ndim > 1 else 1 + 0.1 * noise)


def build_eagle3(directory: Path, target: Path, seed: int, layers: int = 1, **options: Any) -> None:
    """An EAGLE-3 head made by the library, in its own format; `options` as in `from_training_args`."""
    from speculators.models.eagle3 import Eagle3DraftModel

    head = Eagle3DraftModel.from_training_args(
        qwen3(layers),
        **{
            "draft_vocab_size": VOCAB,
            "ttt_steps": 3,
            "target_layer_ids": list(TAP_LAYERS),
            "verifier_name_or_path": str(target),
            "draft_attn_impl": "eager",
            **options,
        },
    )
    head.config.speculators_config.verifier.name_or_path = None
    widen(head, seed)
    head.save_pretrained(directory)


def vocabulary_map(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """d2t, int64 [DRAFT_VOCAB], and t2d, bool [VOCAB], of a random choice of the target's tokens."""
    ids = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(seed))[:DRAFT_VOCAB].sort().values
    t2d = torch.zeros(VOCAB, dtype=torch.bool)
    t2d[ids] = True
    return ids - torch.arange(DRAFT_VOCAB), t2d


ORIGINAL_CONFIG = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "num_key_value_heads": 2,
    "pad_token_id": -1,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "vocab_size": VOCAB,
}


def original_tensors(
    seed: int, hidden: int = 64, tapped: int = 64, d2t: Any = None
) -> dict[str, torch.Tensor]:
    """Tensors of a head in the original format, under its own names, without embeddings; reduced with a `d2t`."""
    draft_vocab = VOCAB if d2t is None else len(d2t)
    shapes = {
        "fc": (hidden, 3 * tapped),
        "lm_head": (draft_vocab, hidden),
        "midlayer.mlp.down_proj": (hidden, 96),
        "midlayer.mlp.gate_proj": (96, hidden),
        "midlayer.mlp.up_proj": (96, hidden),
        "midlayer.self_attn.k_proj": (hidden // 2, 2 * hidden),
        "midlayer.self_attn.o_proj": (hidden, hidden),
        "midlayer.self_attn.q_proj": (hidden, 2 * hidden),
        "midlayer.self_attn.v_proj": (hidden // 2, 2 * hidden),
        "midlayer.hidden_norm": (hidden,),
        "midlayer.input_layernorm": (hidden,),
        "midlayer.post_attention_layernorm": (hidden,),
        "norm": (hidden,),
    }
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        tensors[f"{name}.weight"] = noise * 0.2 if len(shape) > 1 else 1 + 0.1 * noise
    return tensors


def write_original(directory: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """A head in the original format, as published ones are laid out."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({**ORIGINAL_CONFIG, **config}), encoding="utf-8")
    save_file(tensors, directory / "model.safetensors")
    return directory


def build(root: Path) -> Directories:
    """Write target and drafters under `root`."""
    drafter = {kind: root / kind for kind in KINDS}
    for seed, layers, directory in ((1, TARGET_LAYERS, root / "target"), (2, 2, drafter["causal_lm"])):
        model = Qwen3ForCausalLM(qwen3(layers))
        widen(model, seed)
        model.save_pretrained(directory)
        train_tokenizer(["windows of draft tokens"], VOCAB, directory)
    build_eagle3(drafter["eagle3"], root / "target", seed=3, norm_before_residual=True)
    build_eagle3(
        drafter["eagle31"],
        root / "target",
        seed=4,
        layers=2,
        norm_before_residual=False,
        norm_output=True,
        fc_norm=True,
    )
    d2t, t2d = vocabulary_map(seed=5)
    build_eagle3(
        drafter["reduced"],
        root / "target",
        seed=5,
        norm_before_residual=True,
        draft_vocab_size=DRAFT_VOCAB,
        d2t=d2t,
        t2d=t2d,
    )
    d2t, t2d = vocabulary_map(seed=6)
    tensors = {**original_tensors(6, d2t=d2t), "d2t": d2t, "t2d": t2d}
    write_original(
        drafter["original"], tensors, draft_vocab_size=DRAFT_VOCAB
    )  # its embeddings are the target's
    return Directories(root, root / "target", drafter)


@dataclasses.dataclass(frozen=True)
class LoadedPair:
    """A target and one drafter; tests must leave both as they were."""

    target: Target
    drafter: Any  # a Drafter; tests reach for its model and its own methods


def load(directories: Directories, kind: str) -> LoadedPair:
    """A fresh pair."""
    drafter = load_drafter(directories.drafter[kind], target=directories.target)
    return LoadedPair(Target(directories.target, drafter.tap_layers), drafter)


def sliding_copy(model: Path, to: Path, span: int) -> Path:
    """A model of `qwen3` whose odd layers attend to `span` tokens."""
    shutil.copytree(model, to)
    config = json.loads((to / "config.json").read_text())
    kinds = ["full_attention", "sliding_attention"] * config["num_hidden_layers"]
    config |= {"use_sliding_window": True, "sliding_window": span}
    config["layer_types"] = kinds[: config["num_hidden_layers"]]
    (to / "config.json").write_text(json.dumps(config))
    return to
