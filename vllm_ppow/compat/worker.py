"""vLLM's WorkerWrapperBase: prepares the drafter's loading, and proves afterwards that the adapter was merged.

Works on 0.26, 0.32 and 0.33, for both model runners and every executor, since all of them drive workers through this
wrapper. The proof stays for good: it is what makes a future vLLM that ignores `draft_load_config` fail instead of
serving the bare drafter. Left out: which class loads the drafter (draft_loading.py).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from vllm_ppow.compat import cpu_sampling, draft_loading, draft_lora, draft_room, seams
from vllm_ppow.compat.engine_args import serves_ppow
from vllm_ppow.config import FINGERPRINT_KEY
from vllm_ppow.merge import MergeError

_MODULE, _CLASS = "vllm.v1.worker.worker_base", "WorkerWrapperBase"
_SEAMS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("init_device", ("self",)),
    ("initialize_from_config", ("self", "kv_cache_configs")),
)

# Worker -> number of complete merges in this process before it loaded its models.
_merges_before: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def install() -> None:
    """Wrap the worker's first step before loading, and its first step after it.

    Raises:
        SeamMissingError: this vLLM lacks one of them.
    """
    for (method, parameters), make in zip(_SEAMS, (_preparing, _proving), strict=True):
        seams.wrap(_MODULE, _CLASS, method, parameters, make)


def require() -> None:
    """Fail now if workers of this vLLM could not be hooked.

    Raises:
        SeamMissingError: a worker seam is missing; the message says what to install.
    """
    install()


def _preparing(original: Callable[..., Any]) -> Callable[..., Any]:
    """`init_device` builds the model runner and the drafter, and loads nothing yet."""

    def init_device(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.vllm_config.speculative_config is not None:
            cpu_sampling.install()  # whatever the method: the sampler is the same, and so is its fault
        if serves_ppow(self.vllm_config.speculative_config):
            from vllm_ppow import loader

            loader.register_loader()
            draft_loading.install()
            draft_room.install()
            if self.vllm_config.lora_config is not None:
                draft_lora.install()
            _merges_before[self] = len(loader.completed_merges)
        return original(self, *args, **kwargs)

    return init_device


def _proving(original: Callable[..., Any]) -> Callable[..., Any]:
    """`initialize_from_config` allocates the KV cache, after loading and before the first request."""

    def initialize_from_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        if serves_ppow(self.vllm_config.speculative_config):
            assert_merged(self)
        return original(self, *args, **kwargs)

    return initialize_from_config


def assert_merged(worker: Any) -> None:
    """Prove that this worker's drafter was loaded with its adapter merged completely.

    Raises:
        MergeError: it was not; nothing is served.
    """
    from vllm_ppow import loader

    draft_load_config = worker.vllm_config.speculative_config.draft_load_config
    fingerprint = draft_load_config.model_loader_extra_config[FINGERPRINT_KEY]
    since = loader.completed_merges[_merges_before.get(worker, len(loader.completed_merges)) :]
    if not any(report.adapter_fingerprint == fingerprint and report.num_merged for report in since):
        raise MergeError(
            f"The drafter was loaded without adapter {fingerprint[:19]}…, since this vLLM did not use the loader that "
            "merges it: install a tested version, pip install 'vllm-ppow[cpu]' or 'vllm-ppow[gpu]'."
        )
