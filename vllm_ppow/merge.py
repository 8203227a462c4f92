"""LoRA deltas merged into the base drafter's tensors, streamed tensor by tensor.

`Merger(adapter).wrap(stream)` passes (name, tensor) pairs through and adds B·A·scale to the tensors that the adapter
names; `assert_complete()` then proves that every adapter tensor was used exactly once. The result equals PEFT's
`merge_and_unload()` bit for bit. Left out: where tensors come from (loader.py) and everything of vLLM; this module
needs torch and safetensors only.

Refused, because a merge could not be exact: DoRA, LoRA bias, modules_to_save, embedding LoRA, initialisations that
change the base, quantised bases, tied targets, and adapter tensors that match nothing.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from vllm_ppow.artifact import PEFT_WEIGHTS, Adapter, ArtifactError, model_weight_files, read_model_config

_PEFT_PREFIX = "base_model.model."
_LORA_NAME = re.compile(r"^(?P<module>.+)\.lora_(?P<side>[AB])\.weight$")
_MOST_WAYS = 10**9  # that a regular expression is tried in: some seconds
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_FLOAT_NAMES = ("BF16", "F16", "F32")
_TIED_MODULES = ("lm_head", "embed_tokens")
# Checkpoint tensors that stand beside a quantised weight, or in its place.
_QUANTISED_SUFFIXES = ("qweight", "qzeros", "scales", "weight_packed", "weight_scale", "weight_scale_inv")

# PEFT options under which W + scale·B·A is not the trained function, with the value that is fine.
_REFUSED_OPTIONS: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "fan_in_fan_out": (False, None),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
    "megatron_config": (None,),
    # pissa, olora, corda, loftq and lora_ga rewrite the base weights when training starts.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


class MergeError(ArtifactError):
    """An adapter that cannot be merged exactly; the message is one sentence with the remedy."""


@dataclasses.dataclass(frozen=True)
class Delta:
    """One LoRA pair.

    Attributes:
        module: canonical name of the module it belongs to.
        a: lora_A, [rank, in_features], float32.
        b: lora_B, [out_features, rank], float32.
        scale: alpha / rank, or alpha / sqrt(rank) with rsLoRA.
    """

    module: str
    a: torch.Tensor
    b: torch.Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight it is added to, [out_features, in_features]."""
        return self.b.shape[0], self.a.shape[1]

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """A new tensor of `weight`'s dtype: weight + scale·B·A, the sum rounded once, as PEFT rounds it.

        Raises:
            MergeError: a sum is no number, or too large for the dtype. Such a drafter would have no distribution, from
                which verification of sampled drafts would conclude wrongly.
        """
        merged = weight.clone()
        merged += (self.b.to(weight.device) @ self.a.to(weight.device)) * self.scale
        if not torch.stack(torch.aminmax(merged)).isfinite().all():  # NaN comes through, in one pass
            raise MergeError(
                f"The drafter's {self.module} with the adapter is not finite in {weight.dtype}: copy adapter and "
                "drafter again, or train the adapter again."
            )
        return merged


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """Proof of a complete merge.

    Attributes:
        adapter_fingerprint: of the adapter that was merged.
        num_merged: base tensors that received a delta.
        num_adapter_tensors: LoRA tensors used, two for each base tensor.
    """

    adapter_fingerprint: str
    num_merged: int
    num_adapter_tensors: int


def canonical_module(name: str) -> str:
    """Module name on which adapter and checkpoint agree: no `model.` in front, `midlayer.` as `layers.0.`."""
    name = name.removeprefix("model.")
    if name.startswith("midlayer."):
        name = "layers.0." + name.removeprefix("midlayer.")
    return name


class Merger:
    """Merges one adapter into one stream of base tensors, once.

    Args:
        adapter: a validated adapter directory.

    Raises:
        MergeError: the adapter has options or tensors that cannot be merged exactly.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        _refuse_options(adapter)
        self._deltas = _read_deltas(adapter)
        self._merged: dict[str, str] = {}

    def fresh(self) -> Merger:
        """A merger of the same adapter for another stream, without reading the adapter again."""
        other = copy.copy(self)
        other._merged = {}
        return other

    @property
    def modules(self) -> frozenset[str]:
        """Canonical names of the modules that the adapter changes."""
        return frozenset(self._deltas)

    def wrap(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Pass a checkpoint's (name, full tensor) pairs through, the adapter's targets merged.

        Tensors that are changed are new ones; the stream's own are never written to.

        Raises:
            MergeError: a target is quantised, of another shape, or appears twice.
        """
        for name, tensor in weights:
            delta = self._take(name, tuple(tensor.shape), tensor.dtype in _FLOATS, str(tensor.dtype))
            yield name, tensor if delta is None else delta.merged(tensor)

    def assert_complete(self) -> MergeReport:
        """Prove that every adapter tensor was merged exactly once.

        Raises:
            MergeError: naming the modules that the stream did not contain.
        """
        if missing := sorted(set(self._deltas) - set(self._merged)):
            raise MergeError(
                f"Adapter {self.adapter.directory} has tensors for {_some(missing)}, which the drafter's checkpoint "
                "does not contain: serve it with the drafter that it was trained on."
            )
        count = len(self._merged)
        return MergeReport(self.adapter.config.adapter_fingerprint, count, 2 * count)

    def check_base(self, directory: Path) -> None:
        """Make every refusal now, from the headers of a drafter's checkpoint, without reading its tensors.

        Raises:
            MergeError: the adapter cannot be merged completely and exactly into this drafter.
        """
        self._refuse_tied(directory)
        dry_run = self.fresh()
        for file in model_weight_files(directory):
            with safe_open(file, framework="pt") as checkpoint:
                for name in checkpoint.keys():  # noqa: SIM118 (safe_open is no mapping)
                    view = checkpoint.get_slice(name)
                    dtype = view.get_dtype()
                    dry_run._take(name, tuple(view.get_shape()), dtype in _FLOAT_NAMES, dtype)
        dry_run.assert_complete()

    def _take(self, name: str, shape: tuple[int, ...], is_float: bool, dtype: str) -> Delta | None:
        """The delta for a base tensor, marked as used; None if the adapter leaves the tensor alone."""
        if ".lora_A." in name or ".lora_B." in name:
            raise MergeError(
                f"The drafter of adapter {self.adapter.directory} holds the LoRA tensor {name} itself: keep the "
                f"drafter and the adapter ({PEFT_WEIGHTS}) in separate directories."
            )
        module, _, parameter = name.rpartition(".")
        module = canonical_module(module)
        delta = self._deltas.get(module)
        if delta is None:
            return None
        if parameter in _QUANTISED_SUFFIXES or (parameter == "weight" and not is_float):
            raise MergeError(
                f"The drafter's {name} ({dtype}) is quantised, and a LoRA cannot be merged into it exactly: name "
                'the unquantised drafter that the adapter was trained on ("ppow": {"base_drafter": …}).'
            )
        if parameter != "weight":
            return None
        if shape != delta.shape:
            raise MergeError(
                f"Adapter {self.adapter.directory} changes {module} of shape {list(delta.shape)}, the drafter's has "
                f"{list(shape)}: serve it with the drafter that it was trained on."
            )
        if module in self._merged:
            raise MergeError(
                f"The drafter's checkpoint holds {module} twice, as {self._merged[module]} and {name}: copy "
                "the drafter again, or leave one of the two out."
            )
        self._merged[module] = name
        return delta

    def _refuse_tied(self, directory: Path) -> None:
        if self.adapter.config.drafter_type != "causal_lm":
            return  # an EAGLE head inherits the key from its target's config, and no loader acts on it
        tied = bool(read_model_config(directory).get("tie_word_embeddings", False))
        if tied and (touched := sorted(set(_TIED_MODULES) & self.modules)):
            raise MergeError(
                f"Adapter {self.adapter.directory} changes {_some(touched)}, which drafter {directory} ties to its "
                "embeddings: train the adapter without lm_head and embed_tokens in target_modules."
            )


def _refuse_options(adapter: Adapter) -> None:
    config = adapter.peft_config
    if config.get("peft_type") != "LORA":
        kind = config.get("peft_type")
        raise MergeError(
            f"Adapter {adapter.directory} has peft_type {kind!r}, only LORA can be merged: train a LoRA."
        )
    for option, accepted in _REFUSED_OPTIONS.items():
        value = config.get(option)
        if value not in accepted:
            raise MergeError(
                f"Adapter {adapter.directory} was trained with {option}={value!r}, which cannot be merged exactly: "
                f"train it with {option}={accepted[0]!r}."
            )


def _read_deltas(adapter: Adapter) -> dict[str, Delta]:
    """The adapter's LoRA pairs by canonical module name."""
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in sorted(load_file(adapter.weights).items()):
        match = _LORA_NAME.match(name)
        if match is None:
            raise MergeError(
                f"Adapter {adapter.directory} holds the tensor {name}, which is no LoRA pair of a linear layer: train "
                "without embedding LoRA, and save with save_embedding_layers=False."
            )
        module = match["module"].removeprefix(_PEFT_PREFIX)
        if tensor.ndim != 2 or tensor.dtype not in _FLOATS:
            raise MergeError(
                f"Adapter tensor {name} is {tensor.dtype} {list(tensor.shape)}, a floating-point matrix is needed: "
                "train the adapter on linear layers only."
            )
        if not tensor.isfinite().all():
            raise MergeError(
                f"Adapter tensor {name} holds values that are no numbers: train the adapter again."
            )
        if match["side"] in sides.setdefault(module, {}):
            raise MergeError(f"Adapter {adapter.directory} holds {name} twice: save it again.")
        sides[module][match["side"]] = tensor.float()
    if not sides:
        raise MergeError(f"Adapter {adapter.directory} holds no LoRA tensors: train it again.")
    return _pair_up(adapter, sides)


def _pair_up(adapter: Adapter, sides: dict[str, dict[str, torch.Tensor]]) -> dict[str, Delta]:
    _check_effort(adapter, sides)
    deltas: dict[str, Delta] = {}
    for module, pair in sides.items():
        if set(pair) != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            raise MergeError(
                f"Adapter {adapter.directory} has no matching lora_A and lora_B for {module}: save it again."
            )
        name = canonical_module(module)
        if name in deltas:
            raise MergeError(
                f"Adapter {adapter.directory} names {name} twice under two aliases: save it again."
            )
        deltas[name] = Delta(name, pair["A"], pair["B"], _scale(adapter, module, pair["A"].shape[0]))
    return deltas


def _scale(adapter: Adapter, module: str, found_rank: int) -> float:
    config = adapter.peft_config
    rank = _pattern_value(config.get("rank_pattern"), module, config.get("r"))
    alpha = _pattern_value(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    is_number = isinstance(alpha, (int, float)) and math.isfinite(alpha)
    if found_rank < 1 or rank != found_rank or not is_number:
        raise MergeError(
            f"Adapter {adapter.directory} has rank {found_rank} and alpha {alpha!r} for {module}, its "
            f"adapter_config.json says rank {rank!r}: copy the directory again as a whole."
        )
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _pattern_value(patterns: Any, module: str, default: Any) -> Any:
    """PEFT's rule for rank_pattern and alpha_pattern: the first key that matches the name's end wins."""
    try:
        for key, value in dict(patterns or {}).items():
            if _ends_with(module, key):
                return value
    except (re.error, TypeError, ValueError) as error:
        raise MergeError(
            f"rank_pattern or alpha_pattern of the adapter's adapter_config.json is not readable ({error}): copy the "
            "directory again as a whole, or name modules there."
        ) from error
    return default


def _ends_with(module: str, key: str) -> bool:
    """Whether a key of a pattern, a regular expression that an adapter brings, matches the end of a module's name.

    Raises:
        ValueError: it may take longer than a server can wait: groups are tried in exponentially many ways.
    """
    if re.search(r"[()]", key) or _quantifiers(key) > 2:
        raise ValueError(f"{key[:80]!r} has groups or more than two quantifiers")
    return re.match(rf"(.*\.)?({key})$", module) is not None


def _check_effort(adapter: Adapter, modules: Iterable[str]) -> None:
    """Refuse patterns that take longer to match than a server can wait.

    With n quantifiers a key is tried on a name in as many ways as its length to the power of n + 1.

    Raises:
        MergeError: naming what to change.
    """
    patterns = (adapter.peft_config.get(name) for name in ("rank_pattern", "alpha_pattern"))
    keys = [str(key) for pattern in patterns if isinstance(pattern, dict) for key in pattern]
    power = 1 + max((min(_quantifiers(key), 2) for key in keys), default=0)
    if len(keys) * sum(len(module) ** power for module in modules) > _MOST_WAYS:
        raise MergeError(
            f"Matching the names of adapter {adapter.directory} with its {len(keys)} keys of rank_pattern and "
            "alpha_pattern could take minutes: name modules there, without .*"
        )


def _quantifiers(key: str) -> int:
    return len(re.findall(r"[*+?{]", key))


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
