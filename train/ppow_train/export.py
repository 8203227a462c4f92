"""The merged drafter as a checkpoint of its own, which vLLM's native method serves without this package.

Every safetensors file of the base drafter is copied as it is, then the tensors that the adapter changes are written
over, one at a time: names, shards, dtypes and format stay the base's (speculators, original EAGLE or Hugging Face), and
memory holds one tensor. The merge is the one that serving makes (vllm_ppow/merge.py). Left out: other formats.
"""

from __future__ import annotations

import errno
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ppow_train.errors import UserError
from vllm_ppow.artifact import (
    NATIVE_METHOD,
    PEFT_CONFIG,
    PPOW_CONFIG,
    SMALL_FILES,
    Adapter,
    model_weight_files,
    safetensors_ranges,
    whole_place,
)
from vllm_ppow.merge import Merger

CARD = "README.md"


def export_drafter(adapter: Adapter, base: Path, output: Path) -> dict[str, Any]:
    """Write the base drafter with the adapter merged, as a whole or not at all.

    Args:
        adapter: a validated adapter.
        base: directory of its drafter, fingerprint already checked.
        output: where the checkpoint ends up; must not exist, or be an empty directory.

    Returns:
        The speculative config that serves it.

    Raises:
        UserError: `output` holds something already.
        ArtifactError: the adapter cannot be merged completely and exactly, or `output` is a mount point; nothing is
            written.
        OSError: no room or no permission; nothing is left behind.
    """
    output = whole_place(output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"{output} exists and is not an empty directory: name another output.")
    merger = Merger(adapter)
    merger.check_base(base)
    output.parent.mkdir(parents=True, exist_ok=True)
    weights = model_weight_files(base)
    _require_room(output.parent, sum(file.stat().st_size for file in weights))
    temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        for file in weights:
            _write_merged(merger, file, temporary / file.name)
        merger.assert_complete()
        for file in _small_files(base):
            shutil.copyfile(file, temporary / file.name)
        config = _served_as(adapter, output)
        (temporary / CARD).write_text(_card(adapter, config), encoding="utf-8")
        temporary.chmod(0o755)
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return config


def _require_room(directory: Path, needed: int) -> None:
    """Ask before minutes of copying, with the error that a full disk gives."""
    if shutil.disk_usage(directory).free < needed:
        raise OSError(
            errno.ENOSPC, f"No space left on device, {needed / 2**30:.2f} GiB are needed", str(directory)
        )


def _write_merged(merger: Merger, source: Path, copy: Path) -> None:
    """Copy one file of the checkpoint and write the merged tensors over the base's, byte by byte in their place."""
    import torch
    from safetensors import safe_open

    shutil.copyfile(source, copy)
    ranges = safetensors_ranges(source)
    read: dict[str, torch.Tensor] = {}

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        with safe_open(source, framework="pt") as checkpoint:
            for name in ranges:
                read[name] = checkpoint.get_tensor(name)
                yield name, read[name]

    with copy.open("r+b") as target:
        for name, tensor in merger.wrap(stream()):
            if tensor is not read.pop(name):
                _, begin, end = ranges[name]
                data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                if len(data) != end - begin:
                    raise UserError(
                        f"{source}: {name} has {end - begin} bytes, merged {len(data)}: please report it."
                    )
                target.seek(begin)
                target.write(data)


def _small_files(base: Path) -> list[Path]:
    """Configuration and tokenizer of the drafter; not an adapter's own files, should it lie in the same directory."""
    found = {file for pattern in SMALL_FILES for file in base.glob(pattern)}
    return sorted(file for file in found if file.name not in (PPOW_CONFIG, PEFT_CONFIG))


def _served_as(adapter: Adapter, output: Path) -> dict[str, Any]:
    config = adapter.config
    return {
        "method": NATIVE_METHOD[config.drafter_type],
        "model": str(output),
        "num_speculative_tokens": config.num_speculative_tokens,
        "draft_sample_method": config.draft_sample_method,
    }


def _card(adapter: Adapter, served_as: dict[str, Any]) -> str:
    """The model card; local models go by their last name, since no path of this machine is told to others."""
    config = adapter.config
    names = {}
    for role, ref in (("target", config.target), ("drafter", config.base_drafter)):
        path = Path(ref.name_or_path)
        names[role] = path.name if path.is_absolute() else ref.name_or_path
    kind = {"eagle3": "EAGLE-3 head", "causal_lm": "causal LM"}[config.drafter_type]
    base_model = (
        "" if Path(config.base_drafter.name_or_path).is_absolute() else f"base_model: {names['drafter']}\n"
    )
    spec = json.dumps({**served_as, "model": "DIRECTORY"})
    return (
        f"---\n{base_model}tags:\n- speculative-decoding\n- vllm\n- ppow\n---\n\n"
        f"# Drafter for {names['target']}\n\n"
        f"The speculative-decoding drafter `{names['drafter']}` ({kind}) with a LoRA adapter of vllm-ppow merged in, "
        f"trained for the target `{names['target']}`, drafts of {config.num_speculative_tokens} tokens, "
        f"{config.draft_sample_method} at temperature {config.temperature:g}. vLLM serves it without vllm-ppow:\n\n"
        f"```\nvllm serve {names['target']} --speculative-config '{spec}'\n```\n\n"
        f"Merged from adapter `{config.adapter_fingerprint}`, drafter `{config.base_drafter.fingerprint}`, for target "
        f"`{config.target.fingerprint}`.\n"
    )
