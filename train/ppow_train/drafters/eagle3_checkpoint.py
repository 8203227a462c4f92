"""EAGLE-3 heads on disk, in the `speculators` format and in the original EAGLE format, read into the library's model.

The two differ in config.json and in the name of the first layer (`layers.0.` and `midlayer.`). Every tensor is taken by
its exact name; the library's own loading is not used, because it fetches the target that a head's config names (which
its user may not have named) and fills what is missing without a word. Three things may be absent, and each has one
source: `embed_tokens` (then the head shares the TARGET's, as vLLM serves it, and a log line says so), `t2d` (it repeats
`d2t`) and what only the library's training reads (`verifier_*`). Left out: what a head computes (eagle3.py), heads of
other layer types, pickled checkpoints.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
from transformers import LlamaConfig

from ppow_train.errors import UserError
from ppow_train.loading import check_finite, refused
from vllm_ppow.artifact import model_weight_files, read_model_config

logger = logging.getLogger(__name__)

_EMBEDDING = "embed_tokens.weight"
_Read = Callable[[Any, str], torch.Tensor]

# What vLLM reads where a config of the library's format is silent (its transformers_utils/configs/speculators/algos.py
# and models/qwen3.py). The library's own defaults are others: no norm before the residual, a draft vocabulary of
# 32,000, Qwen3 layers, heads of 128 in them and a base of 10,000.
_SWITCHES = {"norm_before_residual": True, "norm_before_fc": False, "fc_norm": False, "norm_output": False}
_LAYERS = "llama"
_QWEN3_ROPE_THETA = 1e6
# What vLLM's layers of such a head have no value for where the config is silent (its models/llama_eagle3.py and
# models/qwen3_eagle3.py); the library would fill in those of a model of the published size.
_NEEDED = (
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "rms_norm_eps",
    "vocab_size",
)
_NEEDED_OF_QWEN3 = (*_NEEDED, "max_position_embeddings", "num_key_value_heads")


def read_head(directory: Path, target: Path | None = None) -> Any:
    """The head in a directory as an `Eagle3DraftModel` on the CPU, in float32, its taps recorded in its config.

    It lacks what only the library's own training reads, `verifier_norm` and `verifier_lm_head`.

    Args:
        directory: config.json and *.safetensors of the head.
        target: directory of its target, needed where the head leaves something to it: its taps or its embeddings.

    Raises:
        UserError: tensors are missing, unknown, or contradict the config or each other; the head needs something of
            its target that it cannot have; the kind of head is not supported.
    """
    model = _planned(directory, target)
    tensors = _fitting_tensors(model, directory, target, _content)
    check_finite(directory, tensors.items())
    _fill(model, tensors)
    return model


def check_head(directory: Path, target: Path | None = None) -> None:
    """Make the refusals of `read_head` that the headers of the files allow, without reading a tensor.

    Raises:
        UserError: as `read_head`, but for what d2t and t2d say and for numbers that are not finite.
    """
    _fitting_tensors(_planned(directory, target), directory, target, _header)


def _planned(directory: Path, target: Path | None) -> Any:
    """The model that config.json describes, without memory: sizes that contradict the tensors may be any."""
    raw = read_model_config(directory)
    is_original = "speculators_model_type" not in raw
    if is_original:
        _check_original(raw, directory)
    else:
        _check_needed(raw, directory)
    with refused(directory, "no EAGLE-3 head", "speculators"):
        config = _original_config(raw) if is_original else _library_config(raw)
    _check_logit_scale(config, directory)
    config.eagle_aux_hidden_state_layer_ids = _taps(
        config.eagle_aux_hidden_state_layer_ids, directory, target
    )
    config.transformer_layer_config._attn_implementation = (
        "sdpa"  # its default builds flex masks for its own forward
    )
    with torch.device("meta"):
        return _empty_model(config, directory, target)


def _empty_model(config: Any, directory: Path, target: Path | None) -> Any:
    with refused(directory, "no EAGLE-3 head", "speculators"):
        model = Eagle3DraftModel(config)
    _fit_target_width(model, directory, target)
    return model


def _fill(model: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Give a model without memory its tensors, instead of building it anew and copying them in.

    Two things are in no checkpoint: what follows from the config, and what nothing here reads.
    """
    state = model.state_dict()
    # Copied, since those of a file change with it.
    own = {name: tensor.to(state[name].dtype, copy=True) for name, tensor in tensors.items()}
    model.load_state_dict(own, strict=False, assign=True)
    model.rotary_emb = type(model.rotary_emb)(model.rotary_emb.config)
    model.verifier_norm = model.verifier_lm_head = None


# ---------------------------------------------------------------- config.json


def _check_original(raw: dict[str, Any], directory: Path) -> None:
    """Refuse heads of the original format that are none of ours."""
    eagle = raw.get("eagle_config") or {}
    reads_states = isinstance(eagle, dict) and eagle.get("use_aux_hidden_state", True) is True
    if raw.get("model_type", "llama") != "llama" or not reads_states:
        raise UserError(
            f"{directory} is an EAGLE-3 head with model_type {raw.get('model_type')!r} and eagle_config {eagle}: only "
            "Llama layers that read hidden states of the target are supported in the original format."
        )


def _check_needed(raw: dict[str, Any], directory: Path) -> None:
    """Refuse layers of the library's format of which the config leaves out what vLLM has no value for."""
    layer = raw.get("transformer_layer_config")
    if not isinstance(layer, dict):
        return  # the library refuses it
    named = layer.get("model_type", _LAYERS)
    missing = [
        name for name in (_NEEDED_OF_QWEN3 if named == "qwen3" else _NEEDED) if layer.get(name) is None
    ]
    if layer.get("num_key_value_heads", 1) is None and "num_key_value_heads" not in missing:
        missing.append("num_key_value_heads")  # Llama layers may leave it out, but vLLM takes no null
    if missing:
        raise UserError(
            f"{directory}/config.json gives no {' and no '.join(missing)} of the head's {named} layers, without which "
            "vLLM does not start: set what is missing in transformer_layer_config to what the head was made with."
        )


def _check_logit_scale(config: Any, directory: Path) -> None:
    """Refuse the one key that vLLM's heads read and the library's model does not."""
    scale = getattr(config.transformer_layer_config, "logit_scale", 1.0)
    if scale != 1.0:
        raise UserError(
            f"The head {directory} multiplies its logits by logit_scale {scale!r}, which vLLM would do and training "
            "would not: multiply the weights of its lm_head by it instead, and drop the key."
        )


def _library_config(raw: dict[str, Any]) -> Any:
    """A config of the library's format, absent values as vLLM reads them: what is trained is what is served."""
    layer = {"model_type": _LAYERS, **raw["transformer_layer_config"]}
    heads = layer.get("num_attention_heads")
    if layer.get("head_dim") is None and heads and "hidden_size" in layer:
        layer["head_dim"] = layer["hidden_size"] // heads
    named = {"rope_parameters", "rope_scaling", "rope_theta"} & set(layer)
    if layer["model_type"] == "qwen3" and not named:
        layer["rope_theta"] = _QWEN3_ROPE_THETA
    switches = {name: raw.get(name, default) for name, default in _SWITCHES.items()}
    filled = {
        **raw,
        **{name: False if value is None else value for name, value in switches.items()},
        "transformer_layer_config": layer,
    }
    if draft_vocab_size := raw.get("draft_vocab_size") or layer.get("vocab_size"):
        filled["draft_vocab_size"] = draft_vocab_size
    return Eagle3SpeculatorConfig.from_dict(filled)


def _original_config(raw: dict[str, Any]) -> Any:
    """A config of the original format in the library's terms, absent switches as vLLM reads them."""
    eagle = raw.get("eagle_config") or {}
    layer = LlamaConfig.from_dict({key: value for key, value in raw.items() if key != "eagle_config"})
    layer.tie_word_embeddings, layer.pad_token_id = False, None
    return Eagle3SpeculatorConfig(
        transformer_layer_config=layer,
        draft_vocab_size=raw.get("draft_vocab_size") or layer.vocab_size,
        norm_before_residual=raw.get("norm_before_residual", False),
        norm_before_fc=eagle.get("norm_before_fc", raw.get("norm_before_fc", False)),
        fc_norm=raw.get("fc_norm", False),
        norm_output=raw.get("norm_output", False),
        target_hidden_size=raw.get("target_hidden_size"),
        eagle_aux_hidden_state_layer_ids=raw.get("eagle_aux_hidden_state_layer_ids")
        or eagle.get("eagle_aux_hidden_state_layer_ids"),
    )


def _taps(named: list[int] | None, directory: Path, target: Path | None) -> list[int]:
    """The target layers that the head reads; where it names none, those that EAGLE-3 defines and vLLM takes."""
    if not named and target is None:
        raise UserError(
            f"{directory}/config.json does not say which target layers the head reads: set "
            "eagle_aux_hidden_state_layer_ids, usually [2, n // 2, n - 3] for n target layers."
        )
    layers = 0 if named or target is None else _text_size(target, "num_hidden_layers")
    taps = named or [2, layers // 2, layers - 3]
    if sorted(set(taps)) != list(taps):
        raise UserError(
            f"The head {directory} reads the target after layers {taps}, which must ascend, as vLLM hands them over: "
            "set eagle_aux_hidden_state_layer_ids to what the head was trained on."
        )
    return list(taps)


def _fit_target_width(model: Any, directory: Path, target: Path | None) -> None:
    """Rebuild what reads the target's states where they are not as wide as the head's (`target_hidden_size`)."""
    width = model.config.target_hidden_size or model.hidden_size
    if target is not None and (found := _text_size(target, "hidden_size")) != width:
        raise UserError(
            f"The head {directory} reads hidden states of size {width}, those of target {target} have size {found}: "
            "give the target that the head was made for, or copy the head again."
        )
    if width == model.hidden_size:
        return
    count, eps = len(model.target_layer_ids), model.config.transformer_layer_config.rms_norm_eps
    model.fc = torch.nn.Linear(count * width, model.hidden_size, bias=False)
    if model.input_norm is not None:
        model.input_norm = type(model.input_norm)(count * width, eps=eps)
    if model.fc_norm is not None:
        model.fc_norm = torch.nn.ModuleList([type(norm)(width, eps=eps) for norm in model.fc_norm])


def _text_size(target: Path, name: str) -> int:
    """A size that the target's config.json gives."""
    config = read_model_config(target)
    text = config.get("text_config") or config
    size = text.get(name) if isinstance(text, dict) else None
    if type(size) is not int:
        raise UserError(
            f"{target}/config.json gives {size!r} as {name}, which an EAGLE-3 head must know: copy the target again, "
            "or give another."
        )
    return size


# ---------------------------------------------------------------- tensors


def _content(checkpoint: Any, name: str) -> torch.Tensor:
    """A tensor of an open file."""
    return checkpoint.get_tensor(name)


def _header(checkpoint: Any, name: str) -> torch.Tensor:
    """Its shape alone: a tensor without memory."""
    return torch.empty(checkpoint.get_slice(name).get_shape(), device="meta")


def _fitting_tensors(
    model: Any, directory: Path, target: Path | None, read: _Read
) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors for the model, which has each of them by its exact name in its exact shape."""
    tensors = _read_tensors(directory, read)
    if model.use_draft_vocab and "d2t" in tensors:
        tensors["t2d"] = _checked_t2d(tensors, model.verifier_vocab_size, directory)
    if _EMBEDDING not in tensors and target is not None:
        shape = tuple(model.embed_tokens.weight.shape)
        tensors[_EMBEDDING] = _target_embedding(target, shape, directory, read)
        if not tensors[_EMBEDDING].is_meta:
            logger.warning(
                "The head %s has no embeddings of its own: it uses those of target %s.", directory, target
            )
    state = model.state_dict()
    expected = {name for name in state if not name.startswith("verifier_")}
    if missing := sorted(expected - set(tensors)):
        shared = missing == [_EMBEDDING]
        remedy = "name the target, whose embeddings it shares" if shared else "copy the head again"
        raise UserError(f"{directory} lacks the tensors {missing}: {remedy}, or give another head.")
    if unknown := sorted(set(tensors) - set(state)):
        raise UserError(
            f"{directory} has the tensors {unknown}, which an EAGLE-3 head with a draft vocabulary of "
            f"{model.draft_vocab_size} out of {model.verifier_vocab_size} does not: check the key names."
        )
    wrong = [
        f"{name} {list(tensor.shape)} instead of {list(state[name].shape)}"
        for name, tensor in sorted(tensors.items())
        if tensor.shape != state[name].shape
    ]
    if wrong:
        raise UserError(
            f"{directory} does not fit its own config.json, it has {', '.join(wrong)}: copy the head again."
        )
    return tensors


def _read_tensors(directory: Path, read: _Read) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by the library's names: `midlayer.` of the original format is `layers.0.`."""
    tensors: dict[str, torch.Tensor] = {}
    for file in model_weight_files(directory):
        with refused(directory, "no EAGLE-3 head", "safetensors"), safe_open(file, "pt") as checkpoint:
            content = {name: read(checkpoint, name) for name in checkpoint.keys()}  # noqa: SIM118
        for name, tensor in content.items():
            known = "layers.0." + name.removeprefix("midlayer.") if name.startswith("midlayer.") else name
            if known in tensors:
                raise UserError(
                    f"{directory} has the tensor {known} twice, as {name} too: save the head again."
                )
            tensors[known] = tensor
    return tensors


def _checked_t2d(tensors: dict[str, torch.Tensor], vocab_size: int, directory: Path) -> torch.Tensor:
    """`t2d`, bool [V], that follows from `d2t` (target id − draft id, int64 [D]); an own one must say the same."""
    d2t, own = tensors["d2t"], tensors.get("t2d")
    if d2t.is_meta:  # a header does not say what they hold
        return torch.empty(vocab_size, device="meta") if own is None else own
    ids = torch.arange(d2t.numel()) + d2t.flatten()
    fits = d2t.dtype == torch.int64 and bool(((ids >= 0) & (ids < vocab_size)).all())
    if not fits or len(ids.unique()) != len(ids):
        raise UserError(
            f"d2t of {directory} must hold int64 differences target id − draft id that lead to distinct target ids "
            f"below {vocab_size}, got {d2t.dtype} {list(d2t.shape)}: convert the head again."
        )
    t2d = torch.zeros(vocab_size, dtype=torch.bool).index_fill(0, ids, True)
    if own is not None and not t2d.equal(own.bool()):
        raise UserError(
            f"t2d and d2t of {directory} name different tokens of the target: convert the head again."
        )
    return t2d


def _target_embedding(target: Path, shape: tuple[int, ...], directory: Path, read: _Read) -> torch.Tensor:
    """The target's one tensor `….embed_tokens.weight`, [V, H], for a head without."""
    found: dict[str, torch.Tensor] = {}
    for file in model_weight_files(target):
        with refused(target, "no model", "safetensors"), safe_open(file, framework="pt") as checkpoint:
            for name in checkpoint.keys():  # noqa: SIM118 (safe_open is no mapping)
                if name == _EMBEDDING or name.endswith(f".{_EMBEDDING}"):
                    found[name] = read(checkpoint, name)
    if [tuple(tensor.shape) for tensor in found.values()] != [shape]:
        have = {name: list(tensor.shape) for name, tensor in found.items()}
        raise UserError(
            f"The head {directory} has no {_EMBEDDING} and needs one of shape {list(shape)} from its target, but "
            f"{target} has {have}: give the target that the head was made for."
        )
    return next(iter(found.values()))
