"""The adapter directory on disk: schema, read, write, validate.

An adapter directory holds exactly what PEFT writes (`adapter_config.json`, `adapter_model.safetensors`) plus
`ppow_config.json`, which says what the adapter was trained for; what else a trainer leaves there (a log) is not read.
Left out: models and their fingerprints (model_files.py), merging (merge.py), training.

The directory is written under a temporary name and renamed into place; `ppow_config.json` carries the fingerprint
of the tensors, so that a half-copied or mixed-up directory is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from vllm_ppow.model_files import PEFT_WEIGHTS as PEFT_WEIGHTS
from vllm_ppow.model_files import SMALL_FILES as SMALL_FILES
from vllm_ppow.model_files import ArtifactError as ArtifactError
from vllm_ppow.model_files import compare_fingerprint as compare_fingerprint
from vllm_ppow.model_files import fingerprint_model as fingerprint_model
from vllm_ppow.model_files import fingerprint_safetensors as fingerprint_safetensors
from vllm_ppow.model_files import model_weight_files as model_weight_files
from vllm_ppow.model_files import read_json as read_json
from vllm_ppow.model_files import read_model_config as read_model_config
from vllm_ppow.model_files import safetensors_ranges as safetensors_ranges

SCHEMA_VERSION = 1
PPOW_CONFIG = "ppow_config.json"
PEFT_CONFIG = "adapter_config.json"

DrafterType = Literal["eagle3", "causal_lm"]
DRAFTER_TYPES: tuple[str, ...] = ("eagle3", "causal_lm")
# vLLM's own name for the speculative method of each kind.
NATIVE_METHOD = {"eagle3": "eagle3", "causal_lm": "draft_model"}
SAMPLE_METHODS: tuple[str, ...] = ("greedy", "probabilistic")

_SCALE_KEYS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")


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
        scale_fingerprint: `fingerprint_scale` of what PEFT's file says of their scale; "" in adapters without it.
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
    scale_fingerprint: str = ""
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


# ---------------------------------------------------------------- read


def fingerprint_scale(peft_config: dict[str, Any]) -> str:
    """sha256 of the keys of `adapter_config.json` that decide by how much the tensors change a drafter."""
    scale = {key: peft_config.get(key) for key in _SCALE_KEYS}
    return f"sha256:{hashlib.sha256(json.dumps(scale, sort_keys=True).encode()).hexdigest()}"


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
    config = parse_config(read_json(path / PPOW_CONFIG), source=str(path / PPOW_CONFIG))
    found = fingerprint_safetensors(path / PEFT_WEIGHTS)
    if found != config.adapter_fingerprint:
        raise ArtifactError(
            f"Adapter {path}: {PEFT_WEIGHTS} is not the file that {PPOW_CONFIG} was written for "
            f"(fingerprint {found[:19]}…, recorded {config.adapter_fingerprint[:19]}…); copy the directory again "
            "as a whole."
        )
    peft_config = read_json(path / PEFT_CONFIG)
    if not isinstance(peft_config, dict):
        raise ArtifactError(
            f"{path / PEFT_CONFIG} must hold a JSON object, got {type(peft_config).__name__}: copy the directory again "
            "as a whole."
        )
    if config.scale_fingerprint and config.scale_fingerprint != fingerprint_scale(peft_config):
        raise ArtifactError(
            f"Adapter {path}: {PEFT_CONFIG} gives another rank or alpha than {PPOW_CONFIG} was written for; copy the "
            "directory again as a whole."
        )
    return Adapter(path, config, peft_config)


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
    required = known - {"scale_fingerprint", "training", "versions", "schema_version"}
    if missing := sorted(required - set(raw)):
        raise ArtifactError(f"{source} lacks {missing}: it is half-written; copy the adapter again.")
    _require(source, raw, "drafter_type", lambda v: v in DRAFTER_TYPES, f"one of {list(DRAFTER_TYPES)}")
    _require(
        source, raw, "draft_sample_method", lambda v: v in SAMPLE_METHODS, f"one of {list(SAMPLE_METHODS)}"
    )
    _require(source, raw, "num_speculative_tokens", _is_positive_int, "a whole number of tokens >= 1")
    for key in ("draft_cost_ratio", "temperature"):
        _require(source, raw, key, _is_non_negative, "a number >= 0")
    for key in ("adapter_fingerprint", "scale_fingerprint"):
        _require(source, {key: "", **raw}, key, lambda v: isinstance(v, str), "a string")
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


# ---------------------------------------------------------------- write


def whole_place(directory: str | os.PathLike[str]) -> Path:
    """Where a directory is put as a whole under that name, by renaming: symbolic links are followed.

    Raises:
        ArtifactError: a mount point, which cannot be renamed, or "." and "..", which have no name to rename.
    """
    path = Path(directory)
    final = path.resolve() if path.is_symlink() else path
    if os.path.ismount(final):
        raise ArtifactError(f"{final} is a mount point: name a directory inside it.")
    if final.name in ("", ".."):
        raise ArtifactError(f"{final} cannot be replaced as a whole: name a directory inside it.")
    return final


def check_output(directory: str | os.PathLike[str]) -> Path:
    """Whether an adapter may be written there; asked before hours of training, and again when it is written.

    Raises:
        ArtifactError: something that is not an adapter stands there, or a mount point.
    """
    final = whole_place(directory)
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
        config: what to record; both fingerprints of the adapter are filled in here.
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
            config,
            adapter_fingerprint=fingerprint_safetensors(temporary / PEFT_WEIGHTS),
            scale_fingerprint=fingerprint_scale(read_json(temporary / PEFT_CONFIG)),
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
    shutil.rmtree(old, ignore_errors=True)  # the new one stands: what is left of the old one is no failure
