"""What a target's config.json adds to its weights in what it computes: part of the name of all that is kept of it."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# They tell where the model came from, or are kept beside it: the dtype that it was loaded in.
_VOLATILE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")


def config_digest(config: PreTrainedConfig) -> str:
    """SHA-256 of a model's configuration, in hexadecimal; the same for copies of one model, in whatever dtype."""
    text = json.dumps(_lasting(config.to_diff_dict()), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _lasting(value: Any) -> Any:
    """Without the volatile keys, in nested configurations too."""
    if not isinstance(value, dict):
        return value
    return {str(key): _lasting(inner) for key, inner in value.items() if key not in _VOLATILE}
