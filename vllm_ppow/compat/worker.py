"""vLLM's WorkerWrapperBase: prepares the drafter's loading, and proves afterwards that the adapter was merged.

Works on 0.26 to 0.33, for both model runners and every executor, since all of them drive workers through this
wrapper. The proof stays for good: it is what makes a future vLLM that ignores `draft_load_config` fail instead of
serving the bare drafter. Left out: which class loads the drafter (draft_loading.py).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from vllm_ppow.compat import (
    cpu_sampling,
    decode_graphs,
    draft_loading,
    draft_lora,
    draft_room,
    hot_swap,
    seams,
    v2_runner,
)
from vllm_ppow.compat.engine_args import serves_ppow
from vllm_ppow.config import FINGERPRINT_KEY
from vllm_ppow.merge import MergeError

_MODULE, _CLASS = "vllm.v1.worker.worker_base", "WorkerWrapperBase"
# Module, class, method and parameters of what is wrapped here.
SEAMS: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    (_MODULE, _CLASS, "init_device", ("self",)),
    (_MODULE, _CLASS, "initialize_from_config", ("self", "kv_cache_configs")),
)

# Worker -> number of complete merges in this process before it loaded its models.
_merges_before: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def install() -> None:
    """Wrap the worker's first step before loading, and its first step after it.

    Raises:
        SeamMissingError: this vLLM lacks one of them.
    """
    for seam, make in zip(SEAMS, (_preparing, _proving), strict=True):
        seams.wrap(*seam, make)


def require() -> None:
    """Fail now if workers of this vLLM could not be hooked.

    Raises:
        SeamMissingError: a worker seam is missing; the message says what to install.
    """
    install()


def _mend_sampling(ours: bool) -> None:
    """Whatever the method: the sampler is the same, and so is its fault. Another method starts without the mend, too.

    Raises:
        SeamMissingError: method ppow cannot be served with the fault in place.
    """
    try:
        cpu_sampling.install()
    except seams.SeamMissingError as error:
        if ours:
            raise
        seams.logger.warning("A fault of CPU sampling under speculation was not looked for: %s", error)


def _preparing(original: Callable[..., Any]) -> Callable[..., Any]:
    """`init_device` builds the model runner and the drafter, and loads nothing yet."""

    def init_device(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.vllm_config.speculative_config is not None:
            _mend_sampling(ours=serves_ppow(self.vllm_config.speculative_config))
        if serves_ppow(self.vllm_config.speculative_config):
            from vllm_ppow import loader

            loader.register_loader()
            draft_loading.install()
            draft_room.install()
            if self.vllm_config.use_v2_model_runner and v2_runner.drafts_as_scheduled():
                decode_graphs.install()
            if self.vllm_config.lora_config is not None:
                draft_lora.install()
            _merges_before[self] = len(loader.completed_merges)
        result = original(self, *args, **kwargs)
        adopt_drafter(self)
        return result

    return init_device


def _proving(original: Callable[..., Any]) -> Callable[..., Any]:
    """`initialize_from_config` allocates the KV cache, after loading and before the first request."""

    def initialize_from_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        if serves_ppow(self.vllm_config.speculative_config) and drafts_here(self.vllm_config):
            assert_merged(self)
            if hot_swap.allowed(self.vllm_config) is not None:
                hot_swap.remember(self.worker)
        return original(self, *args, **kwargs)

    return initialize_from_config


def drafts_here(vllm_config: Any) -> bool:
    """Whether this worker holds a drafter: with pipeline parallelism, the last stage does."""
    if vllm_config.parallel_config.pipeline_parallel_size == 1:
        return True
    from vllm.distributed import get_pp_group

    return get_pp_group().is_last_rank


def adopt_drafter(worker: Any) -> None:
    """Let the freshly built drafter trim its drafts by request, where the server's config says so or lets it."""
    from vllm_ppow.compat import draft_window, window, window_policy

    speculative = worker.vllm_config.speculative_config
    options = window.options_of(speculative)
    if options is not None and options["per_request"] is not False:
        draft_window.adopt(
            worker.worker.model_runner.drafter,
            window_policy.build_request_window(worker.vllm_config, options),
        )


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
            "merges it: install a tested version, pip install '.[cpu]' or '.[gpu]' in vllm-ppow's checkout."
        )
