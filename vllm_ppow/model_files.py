"""The files of a model directory: which of them are its weights, what tensors they hold, a fingerprint of these.

Safetensors only. Left out: adapters (artifact.py), which are such files too.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PEFT_WEIGHTS = "adapter_model.safetensors"

# What belongs to a model besides its weights; nothing that could be executed.
SMALL_FILES: tuple[str, ...] = ("*.json", "*.txt", "*.model", "*.jinja")

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_INDEX = "model.safetensors.index.json"
_CONSOLIDATED = "consolidated"  # how files in a model maker's own format begin, beside those of transformers

# Of one element, by the names that safetensors gives dtypes.
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}

_SAMPLED_BYTES = 4096  # per tensor and place; enough to notice any fine-tuning, cheap for a 70B target


class ArtifactError(ValueError):
    """An adapter or model directory that cannot be used; the message is one sentence with the remedy."""


def fingerprint_safetensors(*files: Path) -> str:
    """Fingerprint of the tensors in one or more safetensors files, however they are sharded.

    sha256 over every tensor's name, dtype, shape and the first, middle and last 4 KiB of its bytes, in name order.

    Raises:
        ArtifactError: a file is missing, truncated or not safetensors.
    """
    tensors = sorted(entry for file in files for entry in _tensor_samples(Path(file)))
    digest = hashlib.sha256()
    for name, meta, sample in tensors:
        digest.update(f"{name}\0{meta}\0".encode())
        digest.update(sample)
    return f"sha256:{digest.hexdigest()}"


def fingerprint_model(directory: str | os.PathLike[str]) -> str:
    """Fingerprint of a model directory's `*.safetensors` (see `fingerprint_safetensors`).

    Raises:
        ArtifactError: no safetensors in the directory.
    """
    files = model_weight_files(directory)
    return fingerprint_safetensors(*files)


def compare_fingerprint(directory: str | os.PathLike[str], recorded: str) -> tuple[str | None, str]:
    """A model's fingerprint, and how it differs from one that was recorded, for a message.

    Returns:
        None where no fingerprint can be taken, as of weights that are no safetensors; "" where they are the same.
    """
    try:
        found = fingerprint_model(directory)
    except ArtifactError as error:
        return None, f"its fingerprint cannot be taken: {str(error).rstrip('.')}"
    return (
        found,
        "" if found == recorded else f"its fingerprint is {found[:19]}…, recorded is {recorded[:19]}…",
    )


def model_weight_files(directory: str | os.PathLike[str]) -> list[Path]:
    """The safetensors files that a model is loaded from, in name order: those its index names, where it has one.

    As transformers and vLLM do: other files beside them hold the same weights again, or an adapter's.

    Raises:
        ArtifactError: there is none, or one that the index names is missing.
    """
    path = Path(directory)
    files = sorted(p for p in path.glob("*.safetensors") if p.name != PEFT_WEIGHTS)
    if (path / _INDEX).is_file():
        named = _indexed_files(path / _INDEX)
        if missing := sorted(named - {p.name for p in files}):
            raise ArtifactError(
                f"{directory} lacks {missing[0]}, which {_INDEX} names: copy the model again."
            )
        files = [p for p in files if p.name in named]
    elif others := [p for p in files if not p.name.startswith(_CONSOLIDATED)]:
        files = others
    if not files:
        raise ArtifactError(_without_weights(path))
    return files


def _without_weights(directory: Path) -> str:
    """What is told of a directory without safetensors; no class has a save_pretrained() that would convert a head."""
    pickled = sorted(file.name for pattern in _PICKLED for file in directory.glob(pattern))
    if pickled:
        return (
            f"{directory} holds no *.safetensors weights, and {pickled[0]} is not read, as pickled weights can run "
            'code: convert it, see "pickled weights" under "When something is in the way" in the README.'
        )
    return f"{directory} holds no *.safetensors weights: give the directory of a model, or copy it again as a whole."


def _indexed_files(index: Path) -> set[str]:
    """Names of the files that hold a model's tensors, by its index."""
    content = read_json(index)
    files = content.get("weight_map") or {} if isinstance(content, dict) else None
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise ArtifactError(f"{index} must map tensors to files in weight_map: copy the model again.")
    return set(files.values())


def read_model_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The parsed `config.json` of a model directory.

    Raises:
        ArtifactError: missing, unreadable or not a JSON object.
    """
    path = Path(directory) / "config.json"
    config = read_json(path)
    if not isinstance(config, dict):
        raise ArtifactError(
            f"{path} must hold a JSON object, got {type(config).__name__}: copy the model again."
        )
    return config


def safetensors_ranges(file: Path) -> dict[str, tuple[str, int, int]]:
    """Where each tensor of a safetensors file lies.

    Returns:
        name -> (dtype and shape as text, first byte, byte after the last), offsets from the beginning of the file.

    Raises:
        ArtifactError: the file is missing, truncated or not what the safetensors library reads.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            header_size = struct.unpack("<Q", stream.read(8))[0]
            if header_size > size - 8:
                raise ArtifactError(f"{file} is truncated: copy or download it again.")
            header = json.loads(stream.read(header_size))
        metadata = header.pop("__metadata__", None)
        if metadata is not None and not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata must be texts")
        begin, ranges = 8 + header_size, {}
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            end = begin + _num_bytes(entry, begin - 8 - header_size)
            if end > size:
                raise ArtifactError(f"{file} is truncated: copy or download it again.")
            ranges[name] = (f"{entry['dtype']}{entry['shape']}", begin, end)
            begin = end
        if begin != size:
            raise ValueError("bytes that belong to no tensor")
        return {name: ranges[name] for name in header}
    except FileNotFoundError:
        raise ArtifactError(f"{file} does not exist: check the path, or train the adapter again.") from None
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(
            f"{file} is not a readable safetensors file: copy or download it again."
        ) from error


def _num_bytes(entry: dict[str, Any], begin: int) -> int:
    """Size of a tensor by its entry in a header, which must begin where the one before it ended.

    Raises:
        ValueError, KeyError, TypeError: the entry contradicts itself or the one before it.
    """
    first, after = entry["data_offsets"]
    dtype, sizes = entry["dtype"], entry["shape"]
    if not (isinstance(dtype, str) and isinstance(sizes, list) and first == begin):
        raise ValueError("a tensor without a dtype, a shape or a place")
    if not all(type(number) is int and number >= 0 for number in (first, after, *sizes)):
        raise ValueError("a place or a shape of no whole numbers")
    bits = _BITS.get(dtype)  # one that is not known here is left to the library
    if after < first or (bits is not None and 8 * (after - first) != bits * math.prod(sizes)):
        raise ValueError("a tensor of another size than its shape's")
    return after - first


def _tensor_samples(file: Path) -> Iterator[tuple[str, str, bytes]]:
    ranges = safetensors_ranges(file)
    with file.open("rb") as stream:
        for name, (meta, begin, end) in ranges.items():
            middle = max(begin, (begin + end - _SAMPLED_BYTES) // 2)
            sample = b""
            for start in (begin, middle, max(begin, end - _SAMPLED_BYTES)):
                stream.seek(start)
                sample += stream.read(min(_SAMPLED_BYTES, end - start))
            yield name, meta, sample


def read_json(path: Path) -> Any:
    """A parsed JSON file.

    Raises:
        ArtifactError: missing or unreadable.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # RecursionError: lists in lists in lists
        raise ArtifactError(f"{path} is not readable JSON ({error}): copy the directory again.") from error
