"""Targets and causal-LM drafters as transformers loads them, without ever running code of theirs.

Unset, `trust_remote_code` has transformers ask on the terminal whether to run it. Models that are broken, or that it
does not know, are refused in a sentence; tensors that its model has and the checkpoint lacks are so too, which it would
fill with random numbers. Left out: EAGLE-3 heads (drafters/eagle3_checkpoint.py), and engines, which have vLLM's own
switch.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppow_train.errors import UserError
from vllm_ppow.artifact import read_json, read_model_config

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Broken ones are passed over, or fail in many ways.
_OPTIONAL_FILES = ("generation_config.json", "tokenizer_config.json")


def read_config(directory: Path) -> PretrainedConfig:
    """The configuration of a model.

    Raises:
        UserError, ArtifactError: it is broken, or this transformers does not know such models.
    """
    from transformers import AutoConfig

    with refused(directory, "no model", "transformers"):
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)


def load_causal_lm(directory: Path, dtype: str | torch.dtype, device: Any) -> PreTrainedModel:
    """A causal LM from safetensors; `dtype` as in transformers, "auto" is the checkpoint's own.

    Raises:
        UserError, ArtifactError: it is broken, or none that this transformers loads.
    """
    model = _fitting_model(directory, dtype)
    model = model.to(device)
    check_finite(directory, model.named_parameters())
    return model


def check_causal_lm(directory: Path) -> None:
    """Make the refusals of `load_causal_lm` that the headers of the files allow: on the meta device no tensor is read.

    Raises:
        UserError, ArtifactError: as `load_causal_lm`, but for numbers that are not finite.
        ModuleNotFoundError: accelerate, through which transformers takes a device, is not installed.
    """
    import accelerate  # noqa: F401  (without it transformers would blame the model)

    _fitting_model(directory, "auto", device_map="meta")


def _fitting_model(directory: Path, dtype: str | torch.dtype, **options: Any) -> PreTrainedModel:
    """A model with each of its tensors from the checkpoint, in its shape."""
    from transformers import AutoModelForCausalLM

    with refused(directory, "no causal LM", "transformers"), _without_report():
        model, found = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, with their shapes
            **options,
        )
    _check_tensors(directory, model, found)
    return model


def _check_tensors(directory: Path, model: PreTrainedModel, found: dict[str, Any]) -> None:
    """Refuse a checkpoint whose tensors are not those of its model.

    Raises:
        UserError: some have other shapes, or are missing.
    """
    wrong = [
        f"{name} {list(own)} instead of {list(wanted)}"
        for name, own, wanted in sorted(found["mismatched_keys"])
    ]
    # What a quantised checkpoint holds in their place is the quantiser's own affair.
    is_quantised = getattr(model, "hf_quantizer", None) is not None
    wrong += [] if is_quantised else [f"no {name}" for name in sorted(found["missing_keys"])]
    if wrong:
        raise UserError(
            f"{directory} does not fit its own config.json, it has {_some(wrong)}: copy the model again, or give "
            "another."
        )
    if found["unexpected_keys"]:
        logger.warning(
            "%s has tensors that its model does not, which are not read: %s.",
            directory,
            _some(sorted(found["unexpected_keys"])),
        )


def check_finite(directory: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Refuse weights that are NaN or infinite, which kernels may hide: some make zeros of attention to NaN.

    Args:
        tensors: (name, tensor) of each; those of whole numbers or of 8 bits and less are a quantiser's own affair.

    Raises:
        UserError: names the first.
    """
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.element_size() > 1 and not bool(tensor.isfinite().all()):
            raise UserError(
                f"{directory} has weights that are no numbers in {name}: copy it again, or give another."
            )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@contextlib.contextmanager
def _without_report() -> Iterator[None]:
    """Without the table that transformers prints of tensors that do not fit: `_check_tensors` tells of them."""
    printer = logging.getLogger("transformers.modeling_utils")

    def passes(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    printer.addFilter(passes)
    try:
        yield
    finally:
        printer.removeFilter(passes)


def read_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """A model's tokenizer.

    Raises:
        UserError, ArtifactError: it is broken, or none that this transformers loads.
    """
    from transformers import AutoTokenizer

    with refused(directory, "no tokenizer", "transformers"):
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)


@contextlib.contextmanager
def refused(directory: Path, what: str, library: str) -> Iterator[None]:
    """Nothing but a library's own reading of a model directory belongs in here: what fails then is the directory's.

    Args:
        what: the directory holds if the library fails, such as "no tokenizer".
        library: name of the distribution.

    Raises:
        UserError, ArtifactError: its files are broken, or the library does not know such models.
    """
    from importlib.metadata import version

    import torch
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    read_model_config(directory)
    for file in (directory / name for name in _OPTIONAL_FILES):
        if file.exists() and not isinstance(read_json(file), dict):
            raise UserError(f"{file} must hold a JSON object: copy the model again.")
    told_alone = (ValueError, ImportError, OSError, StrictDataclassError, SafetensorError)
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (
        *told_alone,
        # What sizes and names that cannot be run into, deep inside.
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        AssertionError,
        RuntimeError,
    ) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk, not of what is on it
        why = " ".join(str(error).split())[:300].rstrip(".")
        if not isinstance(error, told_alone):
            why = f"{type(error).__name__}: {why}"
        remedy = "copy it again, or give another"
        if "trust_remote_code" in str(error):
            why, remedy = "it needs code of its own, which is not run here", "give another"
        raise UserError(
            f"{directory} holds {what} that {library} {version(library)} loads ({why}): {remedy}."
        ) from error
