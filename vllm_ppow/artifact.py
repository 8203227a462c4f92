"""The adapter directory on disk: schema, read, write, validate, fingerprint.

An adapter directory holds exactly what PEFT writes (`adapter_config.json`, `adapter_model.safetensors`) plus
`ppow_config.json`, which says what the adapter was trained for; what else a trainer leaves there (a log) is not read.
Left out: merging (merge.py), training.

The directory is written under a temporary name and renamed into place; `ppow_config.json` carries the fingerprint
of the tensors, so that a half-copied or mixed-up directory is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

SCHEMA_VERSION = 1
PPOW_CONFIG = "ppow_config.json"
PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"

DrafterType = Literal["eagle3", "causal_lm"]
DRAFTER_TYPES: tuple[str, ...] = ("eagle3", "causal_lm")
# vLLM's own name for the speculative method of each kind.
NATIVE_METHOD = {"eagle3": "eagle3", "causal_lm": "draft_model"}
SAMPLE_METHODS: tuple[str, ...] = ("greedy", "probabilistic")

# What belongs to a model besides its weights; nothing that could be executed.
SMALL_FILES: tuple[str, ...] = ("*.json", "*.txt", "*.model", "*.jinja")

_SAMPLED_BYTES = 4096  # per tensor and place; enough to notice any fine-tuning, cheap for a 70B target


class ArtifactError(ValueError):
    """An adapter or model directory that cannot be used; the message is one sentence with the remedy."""


@dataclasses.dataclass(frozen=True)
class ModelRef:
    """Which model an adapter belongs to.

    Attributes:
        name_or_path: Hub repo id or directory, as the user named it.
        revision: Hub revision, or None.
        fingerprint: `fingerprint_model` of its weights.
    """

    name_or_path: str
    fingerprint: str
    revision: str | None = None


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Contents of `ppow_config.json`.

    Attributes:
        drafter_type: what kind of drafter the LoRA belongs to.
        base_drafter: the drafter that the LoRA deltas are added to.
        target: the target that the drafter was trained against.
        num_speculative_tokens: K the windows had in training, in tokens.
        draft_cost_ratio: γ of the reward, time of one draft step / one target step.
        draft_sample_method: how drafts are sampled in the serving mode it was trained for.
        temperature: sampling temperature it was trained for (0 = greedy).
        adapter_fingerprint: `fingerprint_safetensors` of the LoRA tensors.
        training: objective, seed, steps, data and measurements; free-form, for people and model cards.
        versions: package name -> version at training time.
        schema_version: version of this schema.
    """

    drafter_type: DrafterType
    base_drafter: ModelRef
    target: ModelRef
    num_speculative_tokens: int
    draft_cost_ratio: float
    draft_sample_method: Literal["greedy", "probabilistic"]
    temperature: float
    adapter_fingerprint: str = ""
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A validated adapter directory."""

    directory: Path
    config: AdapterConfig
    peft_config: dict[str, Any]

    @property
    def weights(self) -> Path:
        """Path of the LoRA tensors."""
        return self.directory / PEFT_WEIGHTS


# ---------------------------------------------------------------- fingerprints


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


def model_weight_files(directory: str | os.PathLike[str]) -> list[Path]:
    """The safetensors files of a model directory, adapters excluded, in name order."""
    files = sorted(p for p in Path(directory).glob("*.safetensors") if p.name != PEFT_WEIGHTS)
    if not files:
        raise ArtifactError(
            f"{directory} holds no *.safetensors weights: convert the checkpoint with save_pretrained() "
            "(pickled weights are not read)."
        )
    return files


def read_model_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The parsed `config.json` of a model directory.

    Raises:
        ArtifactError: missing, unreadable or not a JSON object.
    """
    path = Path(directory) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} is not readable JSON ({error}): copy the model again.") from error
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
        ArtifactError: the file is missing, truncated or not safetensors.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            header_size = struct.unpack("<Q", stream.read(8))[0]
            if header_size > size - 8:
                raise ArtifactError(f"{file} is truncated: copy or download it again.")
            header = json.loads(stream.read(header_size))
        header.pop("__metadata__", None)
        ranges = {}
        for name, entry in header.items():
            begin, end = (8 + header_size + offset for offset in entry["data_offsets"])
            if end > size:
                raise ArtifactError(f"{file} is truncated: copy or download it again.")
            ranges[name] = (f"{entry['dtype']}{entry['shape']}", begin, end)
        return ranges
    except FileNotFoundError:
        raise ArtifactError(f"{file} does not exist: check the path, or train the adapter again.") from None
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(
            f"{file} is not a readable safetensors file: copy or download it again."
        ) from error


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


# ---------------------------------------------------------------- read


def read_adapter(directory: str | os.PathLike[str]) -> Adapter:
    """Read and validate an adapter directory.

    Raises:
        ArtifactError: missing or half-written directory, unknown schema or keys, tensors that do not match their
            recorded fingerprint.
    """
    path = Path(directory)
    if not path.is_dir():
        raise ArtifactError(f"Adapter {path} is not a directory: give the directory that `ppow train` wrote.")
    missing = [name for name in (PPOW_CONFIG, PEFT_CONFIG, PEFT_WEIGHTS) if not (path / name).is_file()]
    if PPOW_CONFIG in missing and (path / "config.json").is_file():
        raise ArtifactError(
            f"{path} is a whole model without {PPOW_CONFIG}, not a PPOW adapter: serve it with vLLM's own method "
            '("eagle3" or "draft_model"), or give the directory that `ppow train` wrote.'
        )
    if missing:
        raise ArtifactError(
            f"Adapter {path} lacks {', '.join(missing)}: it is half-written or not a PPOW adapter; "
            "copy it again or run `ppow train`."
        )
    config = parse_config(_read_json(path / PPOW_CONFIG), source=str(path / PPOW_CONFIG))
    found = fingerprint_safetensors(path / PEFT_WEIGHTS)
    if found != config.adapter_fingerprint:
        raise ArtifactError(
            f"Adapter {path}: {PEFT_WEIGHTS} is not the file that {PPOW_CONFIG} was written for "
            f"(fingerprint {found[:19]}…, recorded {config.adapter_fingerprint[:19]}…); copy the directory again "
            "as a whole."
        )
    return Adapter(path, config, _read_json(path / PEFT_CONFIG))


def parse_config(raw: Any, source: str = PPOW_CONFIG) -> AdapterConfig:
    """Validate the parsed JSON of `ppow_config.json`.

    Raises:
        ArtifactError: naming the key, the value received and what is accepted.
    """
    if not isinstance(raw, dict):
        raise ArtifactError(f"{source} must hold a JSON object, got {type(raw).__name__}.")
    if raw.get("schema_version") != SCHEMA_VERSION:
        raise ArtifactError(
            f"{source} has schema_version {raw.get('schema_version')!r}, this version reads {SCHEMA_VERSION}: "
            "install the vllm-ppow that wrote the adapter, or train it again."
        )
    known = {field.name for field in dataclasses.fields(AdapterConfig)}
    if unknown := sorted(set(raw) - known):
        raise ArtifactError(f"{source} has unknown keys {unknown}: known are {sorted(known)}.")
    required = known - {"training", "versions", "schema_version"}
    if missing := sorted(required - set(raw)):
        raise ArtifactError(f"{source} lacks {missing}: it is half-written; copy the adapter again.")
    _require(source, raw, "drafter_type", lambda v: v in DRAFTER_TYPES, f"one of {list(DRAFTER_TYPES)}")
    _require(
        source, raw, "draft_sample_method", lambda v: v in SAMPLE_METHODS, f"one of {list(SAMPLE_METHODS)}"
    )
    _require(source, raw, "num_speculative_tokens", _is_positive_int, "a whole number of tokens >= 1")
    for key in ("draft_cost_ratio", "temperature"):
        _require(source, raw, key, _is_non_negative, "a number >= 0")
    _require(source, raw, "adapter_fingerprint", lambda v: isinstance(v, str), "a string")
    refs = {key: _parse_ref(raw[key], f"{source}: {key}") for key in ("base_drafter", "target")}
    return AdapterConfig(**{**raw, **refs})


def _parse_ref(raw: Any, source: str) -> ModelRef:
    known = {field.name for field in dataclasses.fields(ModelRef)}
    if not isinstance(raw, dict) or not set(raw) <= known or not {"name_or_path", "fingerprint"} <= set(raw):
        raise ArtifactError(f"{source} must be an object with the keys {sorted(known)}, got {raw!r}.")
    if not all(isinstance(raw[key], str) and raw[key] for key in ("name_or_path", "fingerprint")):
        raise ArtifactError(f"{source} needs a name_or_path and a fingerprint, got {raw!r}.")
    return ModelRef(**raw)


def _require(source: str, raw: dict[str, Any], key: str, accepts: Callable[[Any], bool], wanted: str) -> None:
    if not accepts(raw[key]):
        raise ArtifactError(f"{source}: {key} must be {wanted}, got {raw[key]!r}.")


def _is_positive_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_non_negative(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} is not readable JSON ({error}): copy the adapter again.") from error


# ---------------------------------------------------------------- write


def check_output(directory: str | os.PathLike[str]) -> Path:
    """Whether an adapter may be written there; asked before hours of training, and again when it is written.

    Raises:
        ArtifactError: something that is not an adapter stands there.
    """
    final = Path(directory)
    empty = final.is_dir() and not any(final.iterdir())
    if final.exists() and not empty and not (final / PPOW_CONFIG).is_file():
        raise ArtifactError(f"{final} exists and is not a PPOW adapter: name another output directory.")
    return final


def write_adapter(
    directory: str | os.PathLike[str], config: AdapterConfig, write_peft: Callable[[Path], None]
) -> Adapter:
    """Write an adapter directory as a whole or not at all.

    Args:
        directory: where it ends up; an existing adapter there is replaced.
        config: what to record; `adapter_fingerprint` is filled in here.
        write_peft: writes PEFT's two files into the directory it is given.

    Returns:
        The adapter, read back and validated.

    Raises:
        ArtifactError: `directory` exists and is not an adapter (nothing of it is touched).
        OSError: no room or no permission; the old directory is left as it was.
    """
    final = check_output(directory)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    try:
        write_peft(temporary)
        filled = dataclasses.replace(
            config, adapter_fingerprint=fingerprint_safetensors(temporary / PEFT_WEIGHTS)
        )
        text = json.dumps(dataclasses.asdict(filled), indent=2, sort_keys=True)
        (temporary / PPOW_CONFIG).write_text(text + "\n", encoding="utf-8")
        read_adapter(temporary)
        temporary.chmod(0o755)
        _swap_in(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return read_adapter(final)


def _swap_in(temporary: Path, final: Path) -> None:
    """Put `temporary` in `final`'s place; the old directory is gone only after the new one stands."""
    if not final.exists():
        temporary.rename(final)
        return
    old = final.with_name(f".{final.name}.old-{os.getpid()}")
    final.rename(old)
    try:
        temporary.rename(final)
    except OSError:
        old.rename(final)
        raise
    shutil.rmtree(old)
