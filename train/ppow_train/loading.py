"""Targets and causal-LM drafters as transformers loads them, without ever running code of theirs.

Unset, `trust_remote_code` has transformers ask on the terminal whether to run it. Left out: EAGLE-3 heads
(drafters/eagle3_checkpoint.py), and engines, which have vLLM's own switch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppow_train.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def read_config(directory: Path) -> PretrainedConfig:
    """The configuration of a model.

    Raises:
        UserError: this transformers does not know such models.
    """
    from transformers import AutoConfig

    with _told(directory, "no model"):
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)


def load_causal_lm(directory: Path, dtype: str | torch.dtype, device: Any) -> PreTrainedModel:
    """A causal LM from safetensors; `dtype` as in transformers, "auto" is the checkpoint's own.

    Raises:
        UserError: it is none that this transformers loads.
    """
    from transformers import AutoModelForCausalLM

    with _told(directory, "no causal LM"):
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    return model.to(device)


def read_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """A model's tokenizer.

    Raises:
        UserError: it is none that this transformers loads.
    """
    from transformers import AutoTokenizer

    with _told(directory, "no tokenizer"):
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)


@contextlib.contextmanager
def _told(directory: Path, what: str) -> Iterator[None]:
    import transformers

    try:
        yield
    except (ValueError, KeyError, ImportError) as error:
        if "trust_remote_code" in str(error):
            why = "it needs code of its own, which is not run here"
        else:
            why = " ".join(str(error).split())[:300].rstrip(".")
        raise UserError(
            f"{directory} holds {what} that transformers {transformers.__version__} loads ({why}): give another."
        ) from error
