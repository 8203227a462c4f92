"""Small models whose behaviour is known beforehand, for serving tests: a target, its drafters, adapters.

Token x is always followed by x + 1 (mod V): the row of lm_head for x + 1 is the embedding of x, and layers are close to
nothing. A causal LM drafter with the same two matrices is always right; an EAGLE-3 head is right at the first position,
where it sees the hidden state of the target, and wrong after it. Two more heads, EAGLE-3 and EAGLE-3.1, are in the
original EAGLE format, can draft two of three tokens only and share the target's embeddings. Left out: training, and
drafters of real quality.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from vllm_ppow.artifact import Adapter, AdapterConfig, ModelRef, fingerprint_model, write_adapter

VOCAB, HIDDEN, LAYERS, K = 320, 64, 8, 3
ORIGINAL_IDS = [token for token in range(VOCAB) if token % 3]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclasses.dataclass(frozen=True)
class Pair:
    """Directories of one target and its drafters."""

    root: Path
    target: Path
    eagle3: Path
    causal_lm: Path
    original: Path
    original31: Path

    def drafter(self, kind: str) -> Path:
        """Directory of the drafter of a kind: "eagle3", "causal_lm", "original" or "original31"."""
        return {
            "eagle3": self.eagle3,
            "causal_lm": self.causal_lm,
            "original": self.original,
            "original31": self.original31,
        }[kind]


def qwen3_config(layers: int) -> Qwen3Config:
    """A Qwen3 of hidden size 64 with tensor-parallel-divisible heads."""
    return Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=VOCAB - 1,
        dtype=torch.bfloat16,
    )


def _embeddings() -> torch.Tensor:
    return torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(0))


def _fill(model: torch.nn.Module, lm_head_shift: int) -> None:
    """Embeddings e, and the lm_head whose row for token x + shift is e[x]."""
    embeddings = _embeddings()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("embed_tokens.weight"):
                parameter.copy_(embeddings)
            elif name.endswith("lm_head.weight") and "verifier" not in name:
                parameter.copy_(embeddings.roll(lm_head_shift, 0))


def build_pair(root: Path) -> Pair:
    """Write the target and both drafters under `root`, in bfloat16."""
    names = ("target", "head3", "drafter", "head3_original", "head31_original")
    pair = Pair(root, *(root / name for name in names))
    torch.manual_seed(1)
    target = Qwen3ForCausalLM(qwen3_config(LAYERS))
    _fill(target, 1)
    target.to(torch.bfloat16).save_pretrained(pair.target)
    write_tokenizer(pair.target)
    drafter = Qwen3ForCausalLM(qwen3_config(1))
    _fill(drafter, 1)
    drafter.to(torch.bfloat16).save_pretrained(pair.causal_lm)
    head = build_head(pair.target)
    head.to(torch.bfloat16).save_pretrained(pair.eagle3)
    write_original_head(pair.original)
    write_original_head(
        pair.original31,
        [f"fc_norm.{i}" for i in range(3)],
        fc_norm=True,
        norm_output=True,
        norm_before_residual=True,
    )
    return pair


def build_head(target: Path) -> torch.nn.Module:
    """An EAGLE-3 head in speculators format, right at the first draft position."""
    from speculators.models.eagle3 import Eagle3DraftModel

    head = Eagle3DraftModel.from_training_args(
        qwen3_config(1),
        t2d=None,
        d2t=None,
        draft_vocab_size=VOCAB,
        norm_before_residual=True,
        ttt_steps=3,
        verifier_name_or_path=str(target),
        draft_attn_impl="eager",
    )
    _fill(head, 2)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if name.endswith("fc.weight"):
                parameter.copy_(torch.eye(HIDDEN).repeat(1, 3) / 3)
    return head


def write_original_head(directory: Path, more_norms: Sequence[str] = (), **switches: bool) -> None:
    """An EAGLE-3 head in the original format, right at the first draft position wherever it can draft the token.

    Its layer is large enough to sway the tokens after the first.

    Args:
        more_norms: names of norms that the switches bring with them.
        switches: further keys of config.json.
    """
    shapes = {
        "mlp.down_proj": (HIDDEN, 128),
        "mlp.gate_proj": (128, HIDDEN),
        "mlp.up_proj": (128, HIDDEN),
        "self_attn.k_proj": (64, 2 * HIDDEN),
        "self_attn.o_proj": (HIDDEN, 128),
        "self_attn.q_proj": (128, 2 * HIDDEN),
        "self_attn.v_proj": (64, 2 * HIDDEN),
    }
    generator = torch.Generator().manual_seed(2)
    tensors = {
        f"midlayer.{name}.weight": torch.randn(shape, generator=generator) * 0.1
        for name, shape in shapes.items()
    }
    for name in (
        "norm",
        "midlayer.hidden_norm",
        "midlayer.input_layernorm",
        "midlayer.post_attention_layernorm",
        *more_norms,
    ):
        tensors[f"{name}.weight"] = torch.ones(HIDDEN)
    tensors["fc.weight"] = torch.eye(HIDDEN).repeat(1, 3) / 3
    tensors["lm_head.weight"] = _embeddings().roll(2, 0)[ORIGINAL_IDS]
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    tensors["d2t"] = torch.tensor(ORIGINAL_IDS) - torch.arange(len(ORIGINAL_IDS))
    tensors["t2d"] = torch.arange(VOCAB) % 3 > 0
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "draft_vocab_size": len(ORIGINAL_IDS),
        "hidden_size": HIDDEN,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **switches,
    }
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def write_tokenizer(directory: Path) -> None:
    """A word-level tokenizer whose token x is the text "tx"."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="t0", eos_token=f"t{VOCAB - 1}"
    ).save_pretrained(directory)


def load_drafter(kind: str, directory: Path, target: Path | None = None) -> torch.nn.Module:
    """The drafter as the training library holds it, in bfloat16; a head in the original format needs its target."""
    if kind == "causal_lm":
        return Qwen3ForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    if kind.startswith("original"):
        from ppow_train.drafters import load_drafter

        return load_drafter(directory, dtype=torch.bfloat16, target=target).model
    from speculators.models.eagle3 import Eagle3DraftModel

    return Eagle3DraftModel.from_pretrained(directory, dtype=torch.bfloat16)


def random_lora(model: torch.nn.Module, scale: float = 0.3, **options: object) -> torch.nn.Module:
    """A PEFT model with random nonzero A and B."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LINEAR, **options})
    peft_model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return peft_model


def save_adapter(
    directory: Path, peft_model: torch.nn.Module, kind: str, base: Path, target: Path, **overrides: object
) -> Adapter:
    """Write an adapter directory for `base` and `target`."""
    config = AdapterConfig(
        **{
            "drafter_type": "causal_lm" if kind == "causal_lm" else "eagle3",
            "base_drafter": ModelRef(str(base), fingerprint_model(base)),
            "target": ModelRef(str(target), fingerprint_model(target)),
            "num_speculative_tokens": K,
            "draft_cost_ratio": 0.1,
            "draft_sample_method": "greedy",
            "temperature": 0.0,
            **overrides,
        }
    )
    return write_adapter(
        directory, config, lambda path: peft_model.save_pretrained(path, save_embedding_layers=False)
    )


def random_adapter(root: Path, kind: str, pair: Pair, scale: float = 0.3, **options: object) -> Adapter:
    """An adapter of random deltas on the pair's drafter."""
    model = random_lora(load_drafter(kind, pair.drafter(kind), pair.target), scale, **options)
    return save_adapter(root / f"adapter_{kind}", model, kind, pair.drafter(kind), pair.target)


def checkpoint_name(kind: str, name: str) -> str:
    """The name in the drafter's checkpoint of what the training library calls `name`."""
    return name.replace("layers.0.", "midlayer.") if kind.startswith("original") else name


def restoring_adapter(root: Path, kind: str, pair: Pair) -> tuple[Path, Adapter]:
    """A drafter spoiled by -B·A, and the adapter B·A that restores it.

    Returns:
        Directory of the spoiled drafter, and the adapter made for it.
    """
    original = pair.drafter(kind)
    options: dict[str, object] = (
        {"target_modules": ["lm_head", "down_proj"]}
        if kind == "causal_lm"
        else {"target_modules": ["fc", "o_proj", "lm_head"], "exclude_modules": "verifier_lm_head"}
    )
    model = random_lora(load_drafter(kind, original, pair.target), 1.0, **options)
    spoiled = root / f"spoiled_{kind}"
    spoiled.mkdir(parents=True)
    (spoiled / "config.json").write_text((original / "config.json").read_text())
    tensors = load_file(original / "model.safetensors")
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "get_delta_weight"):
            tensors[f"{checkpoint_name(kind, name)}.weight"] -= module.get_delta_weight("default").to(
                torch.bfloat16
            )
    save_file(tensors, spoiled / "model.safetensors", metadata={"format": "pt"})
    return spoiled, save_adapter(root / f"restoring_{kind}", model, kind, spoiled, pair.target)
