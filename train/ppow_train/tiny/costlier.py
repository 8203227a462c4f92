"""A target that writes what the tiny one writes and costs more: layers and neurons that compute, and add nothing.

On the tiny pair a draft step takes nearly as long as a target step, so no drafter can pay for itself there. Real
targets are many times as costly as their drafters. Added layers end in zero projections, added neurons in zero
columns: every multiplication is done, its result is zero, and the tokens are the tiny target's. What speculation earns
can thus be shown on a CPU with real acceptance. Left out: weights that mean anything.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import torch
from torch import Tensor

from ppow_train.errors import UserError
from vllm_ppow.artifact import (
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    ModelRef,
    fingerprint_model,
    read_adapter,
    write_adapter,
)

# The projections that write to the residual stream; zero, and a layer changes nothing.
_WRITES = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
_NEURONS = {"mlp.gate_proj.weight": 0, "mlp.up_proj.weight": 0, "mlp.down_proj.weight": 1}


def make_costlier(source: Path, output: Path, num_layers: int, intermediate_size: int) -> None:
    """Write `target/` with more layers and neurons, and the drafters that fit it, beside each other.

    Args:
        source: directory of the tiny pair.
        output: directory that is made; it must not exist.
        num_layers: of the new target, at least the old one's.
        intermediate_size: neurons of each of its feed-forward layers, at least the old one's.

    Raises:
        UserError: the directory exists, there is no tiny pair, or the new target would be smaller.
    """
    if output.exists():
        raise UserError(f"{output} exists already: give another directory, or remove it.")
    if not (source / "target" / "model.safetensors").is_file():
        raise UserError(f"{source} does not hold the tiny pair: give --tiny.")
    _check_size(source / "target", num_layers, intermediate_size)
    temporary = output.with_name(f".{output.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source / "target", temporary / "target")
    _grow(temporary / "target", num_layers, intermediate_size)
    for drafter in (
        "eagle3",
        "causal_lm",
    ):  # an EAGLE head names its taps: the first layers are where they were
        shutil.copytree(source / drafter, temporary / drafter)
    temporary.rename(output)


def carry_over(adapter: Path, pair: Path) -> Path:
    """Write an adapter that was trained for the tiny target as one for the costlier: what they write is the same.

    Args:
        adapter: directory.
        pair: what `make_costlier` made; `adapter/` appears in it.

    Raises:
        ArtifactError: no adapter there.
    """
    old = read_adapter(adapter)
    target = pair / "target"
    ref = ModelRef(str(target.resolve()), fingerprint_model(target))

    def write_peft(directory: Path) -> None:
        for name in (PEFT_CONFIG, PEFT_WEIGHTS):
            shutil.copyfile(old.directory / name, directory / name)

    return write_adapter(pair / "adapter", dataclasses.replace(old.config, target=ref), write_peft).directory


def _check_size(directory: Path, num_layers: int, intermediate_size: int) -> None:
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    layers, neurons = config["num_hidden_layers"], config["intermediate_size"]
    if num_layers < layers or intermediate_size < neurons:
        raise UserError(
            f"The target has {layers} layers of {neurons} neurons, asked for are {num_layers} of {intermediate_size}: "
            "ask for at least as many."
        )


def _grow(directory: Path, num_layers: int, intermediate_size: int) -> None:
    from safetensors.torch import load_file, save_file

    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    layers = config["num_hidden_layers"]
    tensors = {
        name: _with_neurons(name, tensor, intermediate_size)
        for name, tensor in load_file(directory / "model.safetensors").items()
    }
    for layer in range(layers, num_layers):
        tensors |= _idle_layer(tensors, layer)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config |= {
        "num_hidden_layers": num_layers,
        "intermediate_size": intermediate_size,
        "layer_types": ["full_attention"] * num_layers,
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _with_neurons(name: str, tensor: Tensor, count: int) -> Tensor:
    """A projection with zero rows or columns for the neurons that were added; other tensors as they are."""
    for ending, dim in _NEURONS.items():
        if name.endswith(ending):
            shape = list(tensor.shape)
            shape[dim] = count - shape[dim]
            return torch.cat([tensor, tensor.new_zeros(shape)], dim).contiguous()
    return tensor


def _idle_layer(tensors: dict[str, Tensor], layer: int) -> dict[str, Tensor]:
    """The first layer's tensors under another number, those that write to the residual stream zero."""
    first = "model.layers.0."
    return {
        f"model.layers.{layer}.{name.removeprefix(first)}": torch.zeros_like(tensor)
        if name.endswith(_WRITES)
        else tensor.clone()
        for name, tensor in tensors.items()
        if name.startswith(first)
    }
