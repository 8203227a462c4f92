"""Adapters for benchmarks, on the tiny EAGLE-3 head: a trained one, and made-up ones that need no training; prompts.

Left out: what they are benchmarked for.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click

from ppow_train.generation import load_tokenizer
from ppow_train.prompts import text_ids
from vllm_ppow.artifact import Adapter, AdapterConfig, ModelRef, fingerprint_model, write_adapter

TINY = Path(__file__).resolve().parents[1] / "tiny"
_LAYERS = ("fc", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def train_adapter(output: Path, steps: int) -> Path:
    """Train an adapter on the domain that is new to the head, with `ppow train`; one that is there already is kept."""
    if (output / "ppow_config.json").is_file():
        return output
    command = [sys.executable, "-m", "ppow_train.cli", "train", "--target", str(TINY / "target")]
    command += ["--drafter", str(TINY / "eagle3"), "--prompts", str(TINY / "prompts" / "tests_train.jsonl")]
    command += ["--max-steps", str(steps), "--output", str(output)]
    if subprocess.run(command, check=False).returncode:
        raise click.ClickException("Training the adapter failed: see above, or give one with --adapter.")
    return output


def prompt_ids(name: str, num_prompts: int) -> list[list[int]]:
    """Token ids of the first prompts of one of the tiny pair's files, such as "tests_held_out"."""
    lines = (TINY / "prompts" / f"{name}.jsonl").read_text().splitlines()[:num_prompts]
    return text_ids([json.loads(line)["prompt"] for line in lines], load_tokenizer(TINY / "target"))


def make_adapter(
    output: Path,
    scale: float,
    rank: int = 32,
    seed: int = 0,
    num_speculative_tokens: int = 8,
    draft_sample_method: str = "greedy",
) -> Adapter:
    """An adapter whose deltas are noise.

    Args:
        output: its directory.
        scale: standard deviation of every delta over that of the weights it is added to; 0 leaves the drafter as it
            is, merged all the same.
        rank: of the deltas.
        seed: of the noise.
        num_speculative_tokens: as recorded.
        draft_sample_method: as recorded; an engine swaps only among adapters that draft as it does.
    """
    import torch
    from peft import LoraConfig
    from safetensors.torch import load_file, save_file

    drafter = TINY / "eagle3"
    torch.manual_seed(seed)
    tensors = {}
    for name, weight in load_file(drafter / "model.safetensors").items():
        layer = name.removesuffix(".weight")
        if layer.rsplit(".", 1)[-1] in _LAYERS:
            rows, columns = weight.shape
            spread = scale * float(weight.float().std()) / rank**0.5
            tensors[f"base_model.model.{layer}.lora_A.weight"] = torch.randn(rank, columns)
            tensors[f"base_model.model.{layer}.lora_B.weight"] = torch.randn(rows, rank) * spread

    def write_peft(directory: Path) -> None:
        LoraConfig(r=rank, lora_alpha=rank, target_modules=list(_LAYERS)).save_pretrained(str(directory))
        save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})

    target = TINY / "target"
    config = AdapterConfig(
        drafter_type="eagle3",
        base_drafter=ModelRef(str(drafter), fingerprint_model(drafter)),
        target=ModelRef(str(target), fingerprint_model(target)),
        num_speculative_tokens=num_speculative_tokens,
        draft_cost_ratio=0.12,
        draft_sample_method=draft_sample_method,
        temperature=0.0 if draft_sample_method == "greedy" else 1.0,
    )
    return write_adapter(output, config, write_peft)
