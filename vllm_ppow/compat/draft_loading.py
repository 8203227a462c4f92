"""Makes vLLM honour `draft_load_config` where it loads a drafter with the target's load config instead.

| | V1 eagle3 | V1 draft_model | V2 eagle3 | V2 draft_model |
|---|---|---|---|---|
| 0.26 | native | shim | shim | does not exist |
| 0.31 to 0.33 | native | shim | native | shim |

Each shim hands vLLM's own method a config whose `load_config` is the drafter's; none of vLLM's code is repeated. They
can go when vLLM's draft_model proposers pass `draft_load_config` on, as its EAGLE proposers do. Which of them exist is
asked of the installed vLLM; whether they sufficed is proved after loading (worker.py).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from vllm_ppow.compat import seams
from vllm_ppow.compat.engine_args import serves_ppow

V1_DRAFT_MODEL = ("vllm.v1.spec_decode.draft_model", "DraftModelProposer", "_create_draft_vllm_config")
V2_DRAFT_MODEL = (
    "vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator",
    "StandaloneARSpeculator",
    "load_draft_model",
)
V2_PLAIN_DRAFT_MODEL = (
    "vllm.v1.worker.gpu.spec_decode.draft_model.speculator",
    "PlainDraftModelSpeculator",
    "load_draft_model",
)
V2_EAGLE = ("vllm.v1.worker.gpu.spec_decode.eagle.speculator", "EagleSpeculator", "load_draft_model")


def install() -> None:
    """Wrap the drafters' loading methods that this vLLM has.

    One that is there but is not what we expect is logged: which of them a server needs depends on its model runner, and
    the proof after loading fails where the missing one mattered.
    """
    shims = [
        (V1_DRAFT_MODEL, ("self",), _v1_draft_model),
        (V2_DRAFT_MODEL, ("self", "target_model", "target_attn_layer_names"), _v2_speculator),
        (V2_PLAIN_DRAFT_MODEL, ("self", "target_model", "target_attn_layer_names"), _v2_speculator),
        (V2_EAGLE, ("self", "target_model", "target_attn_layer_names"), _v2_speculator),
    ]
    for seam, parameters, make in shims:
        if not _exists(seam[0]):
            continue
        try:
            seams.wrap(*seam, parameters, make)
        except seams.SeamMissingError as error:
            seams.logger.warning("%s", error)


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing: 0.26 has no standalone_ar
        return False


def _v1_draft_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """V1 `DraftModelProposer` (0.26 to 0.33) builds the config it loads with here, from the target's."""

    def _create_draft_vllm_config(self: Any) -> Any:
        config = original(self)
        if not serves_ppow(self.speculative_config):
            return config
        from vllm.config.utils import replace

        return replace(config, load_config=self.speculative_config.draft_load_config)

    return _create_draft_vllm_config


def _v2_speculator(original: Callable[..., Any]) -> Callable[..., Any]:
    """V2 `StandaloneARSpeculator` (0.32, 0.33), `PlainDraftModelSpeculator` (0.31) and `EagleSpeculator` (0.26) load
    with `self.vllm_config`.
    """

    def load_draft_model(self: Any, target_model: Any, target_attn_layer_names: Any) -> Any:
        if not serves_ppow(self.speculative_config):
            return original(self, target_model, target_attn_layer_names)
        from vllm.config.utils import replace

        vllm_config = self.vllm_config
        self.vllm_config = replace(vllm_config, load_config=self.speculative_config.draft_load_config)
        try:
            return original(self, target_model, target_attn_layer_names)
        finally:
            self.vllm_config = vllm_config

    return load_draft_model
