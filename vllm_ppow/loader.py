"""vLLM model loader of load format "ppow": streams a drafter's checkpoint with the adapter merged in.

The merge happens on full tensors, before vLLM shards them over tensor-parallel ranks and fuses q/k/v and gate/up, so
both are right by construction. Each complete merge is recorded; compat/worker.py refuses to serve without such a
record. Left out: the merge itself (merge.py) and making vLLM use this loader (config.py, compat/).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

from vllm.config.utils import replace
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from vllm_ppow import finite_logits
from vllm_ppow.artifact import read_adapter
from vllm_ppow.config import (
    ADAPTER_KEY,
    FINGERPRINT_KEY,
    HOT_SWAP_KEY,
    LOAD_FORMAT,
    TARGET_KEY,
    WINDOW_KEY,
)
from vllm_ppow.merge import MergeError, Merger, MergeReport

if TYPE_CHECKING:
    import torch
    from torch import nn
    from vllm.config import ModelConfig, VllmConfig
    from vllm.config.load import LoadConfig

logger = logging.getLogger("vllm.ppow.loader")

_OUR_KEYS = (ADAPTER_KEY, FINGERPRINT_KEY, HOT_SWAP_KEY, TARGET_KEY, WINDOW_KEY)

# Complete merges of this process, oldest first; a worker compares the length before and after loading.
completed_merges: list[MergeReport] = []


class PPOWModelLoader(DefaultModelLoader):
    """Loads safetensors as vLLM's default loader does, the adapter merged tensor by tensor.

    Args:
        load_config: `model_loader_extra_config` names the adapter directory and the fingerprint that was checked
            when the server started; its other keys are the default loader's.

    Raises:
        MergeError: the adapter is gone or another one now, or cannot be merged completely.
    """

    def __init__(self, load_config: LoadConfig) -> None:
        extra = load_config.model_loader_extra_config
        directory, fingerprint = extra.get(ADAPTER_KEY), extra.get(FINGERPRINT_KEY)
        if directory is None:
            raise MergeError(
                'Load format "ppow" is set by {"method": "ppow"} in the speculative config: use that.'
            )
        self.adapter = read_adapter(directory)
        if self.adapter.config.adapter_fingerprint != fingerprint:
            raise MergeError(
                f"Adapter {directory} was replaced while the server was starting: start it again."
            )
        super().__init__(_without_ours(load_config))

    def load_model(self, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> nn.Module:
        """The drafter, its distributions usable where drafts are drawn from them."""
        model = super().load_model(vllm_config, *args, **kwargs)
        if vllm_config.speculative_config.draft_sample_method == "probabilistic":
            finite_logits.guard(model)
        return model

    def get_all_weights(
        self, model_config: ModelConfig, model: nn.Module
    ) -> Generator[tuple[str, torch.Tensor], None, None]:
        """The drafter's (name, full tensor) pairs, merged; recorded as complete when the last one was taken."""
        merger = Merger(self.adapter)
        yield from merger.wrap(super().get_all_weights(model_config, model))
        report = merger.assert_complete()
        completed_merges.append(report)
        logger.info(
            "Merged adapter %s (%s) into drafter %s: %d tensors changed, all %d adapter tensors used.",
            self.adapter.directory,
            report.adapter_fingerprint[:19],
            model_config.model,
            report.num_merged,
            report.num_adapter_tensors,
        )


def base_weights(
    load_config: LoadConfig, model_config: ModelConfig, model: nn.Module
) -> Iterator[tuple[str, torch.Tensor]]:
    """The bare drafter's (name, full tensor) pairs, by the load config of a drafter of ours."""
    yield from DefaultModelLoader(_without_ours(load_config)).get_all_weights(model_config, model)


def _without_ours(load_config: LoadConfig) -> LoadConfig:
    """The default loader refuses keys and formats it does not know; "safetensors" also never reads a pickle."""
    extra = {
        key: value for key, value in load_config.model_loader_extra_config.items() if key not in _OUR_KEYS
    }
    return replace(load_config, load_format="safetensors", model_loader_extra_config=extra)


@functools.cache
def register_loader() -> None:
    """Make load format "ppow" known to vLLM in this process, once: vLLM warns of a second time."""
    register_model_loader(LOAD_FORMAT)(PPOWModelLoader)
