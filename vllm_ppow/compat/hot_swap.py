"""What a worker does when the adapter is swapped: stage, load, restore, with vLLM's layerwise reload.

vLLM's draft-weight update endpoints (0.32) transfer weights from a trainer over NCCL or IPC, in developer mode only; an
adapter on disk needs neither. The layerwise reload beneath them is used here: it runs each layer's own weight loaders
(shards, fused projections) and post-processing, then copies the result into the storage that CUDA graphs know. The
methods reach workers as vLLM's `worker_extension_cls`. Run on 0.32, on the V1 runner on CPUs and the V2 runner on a
GPU, both eager. Left out: order of the steps and what happens on failure (vllm_ppow/hot_swap.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_ppow.artifact import ArtifactError, fingerprint_model, fingerprint_scale, read_adapter
from vllm_ppow.compat import seams
from vllm_ppow.config import ADAPTER_KEY, FINGERPRINT_KEY, HOT_SWAP_KEY, PPOWServingError
from vllm_ppow.hot_swap import NOT_ON, SwapError, check_successor
from vllm_ppow.merge import Merger, canonical_module

if TYPE_CHECKING:
    import torch
    from torch import nn

EXTENSION = f"{__name__}.WorkerExtension"
RELOAD = "vllm.model_executor.model_loader.reload.layerwise"
RELOAD_FUNCTIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("initialize_layerwise_reload", ("model",)),
    ("finalize_layerwise_processing", ("model", "model_config")),
)


def require() -> None:
    """Fail now if this vLLM cannot reload its drafter in place.

    Raises:
        SeamMissingError: a function is missing.
    """
    for name, parameters in RELOAD_FUNCTIONS:
        seams.find_function(RELOAD, name, parameters)
    seams.find("vllm.v1.worker.gpu_worker", "Worker", "get_draft_model", ("self",))  # the CPU's inherits it


def prepare(engine_args: Any) -> None:
    """Have vLLM give its workers our methods.

    Raises:
        SeamMissingError: this vLLM cannot reload a model in place.
        PPOWServingError: the user needs the worker extension for something else.
    """
    require()
    if engine_args.worker_extension_cls not in ("", EXTENSION):
        raise PPOWServingError(
            f'"ppow": {{"hot_swap": true}} needs the worker extension, which is set to '
            f"{engine_args.worker_extension_cls}: leave one of them out."
        )
    engine_args.worker_extension_cls = EXTENSION


def check_engine(vllm_config: Any) -> None:
    """Refuse an engine in which a swap would not reach every place that holds weights.

    Raises:
        PPOWServingError: naming what to change.
    """
    from vllm.config import CompilationMode
    from vllm.platforms import current_platform

    if current_platform.is_cpu() and vllm_config.compilation_config.mode != CompilationMode.NONE:
        raise PPOWServingError(
            '"ppow": {"hot_swap": true} on a CPU needs --enforce-eager: compiled code keeps the packed weights that '
            "it was compiled with."
        )
    if vllm_config.parallel_config.data_parallel_size > 1:
        raise PPOWServingError(
            '"ppow": {"hot_swap": true} does not reach the engines of other data-parallel ranks: serve with '
            "--data-parallel-size 1, or without it."
        )
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise PPOWServingError(
            '"ppow": {"hot_swap": true} does not go with pipeline parallelism, where one stage alone has the drafter: '
            "serve with --pipeline-parallel-size 1, or without it."
        )


@dataclasses.dataclass
class _State:
    """Adapters of one worker, their LoRA tensors in memory.

    Attributes:
        running: what its drafter was merged with.
        previous: what can be gone back to, mostly what it was merged with before the last swap.
        staged: the next one, and the drafter's tensors with it merged.
        before: `running` and `previous` as they were before the last load, if it succeeded here; None since all workers
            are known to have loaded, and since staging.
    """

    running: Merger
    previous: Merger | None = None
    staged: tuple[Merger, list[tuple[str, torch.Tensor]]] | None = None
    before: tuple[Merger, Merger | None] | None = None

    def stage(self, merged: Callable[[], tuple[Merger, list[tuple[str, torch.Tensor]]]]) -> None:
        """Make the next one ready."""
        self.staged = self.before = None  # free the memory of an earlier attempt first
        self.staged = merged()


_states: weakref.WeakKeyDictionary[Any, _State] = weakref.WeakKeyDictionary()


class WorkerExtension:
    """Methods that vLLM mixes into its worker class. Each answers {"ok": bool, "error": str, …} and never raises."""

    def ppow_adapter(self) -> dict[str, Any]:
        """The adapter that this worker's drafter is merged with."""
        return _answer(lambda: {})(self)

    def ppow_stage(self, directory: str, fingerprint: str) -> dict[str, Any]:
        """Check an adapter and merge it into the base drafter's tensors, beside the running ones."""

        def stage() -> dict[str, Any]:
            state = _state(self)
            candidate = read_adapter(directory)
            if candidate.config.adapter_fingerprint != fingerprint:
                raise SwapError(
                    f"Adapter {directory} was replaced while it was being swapped in: swap again."
                )
            method = _speculative_config(self).draft_sample_method
            check_successor(state.running.adapter, candidate, method)
            state.stage(lambda: _merged(self, Merger(candidate)))
            return {}

        return _answer(stage)(self)

    def ppow_stage_previous(self) -> dict[str, Any]:
        """Stage the adapter before the last swap, from memory."""

        def stage() -> dict[str, Any]:
            state = _state(self)
            previous = state.previous
            if previous is None:
                raise SwapError(
                    "No adapter was swapped in yet, so there is none to go back to: swap to one first."
                )
            state.stage(lambda: _merged(self, previous.fresh()))
            return {}

        return _answer(stage)(self)

    def ppow_load(self, keep_previous: bool = False) -> dict[str, Any]:
        """Write the staged tensors over the running ones.

        Args:
            keep_previous: what can be gone back to stays, if there is something; so it does if the adapter is the one
                that is running, as where a client asks twice: it would go back to itself.
        """

        def load() -> dict[str, Any]:
            state = _state(self)
            if state.staged is None:
                raise SwapError("No adapter was staged on this worker: swap again.")
            begin = time.perf_counter()
            merger, tensors = state.staged
            _write(self, tensors)
            # Only now: after a failure above, `running` is what restoring goes back to.
            state.before = state.running, state.previous
            changed = not _alike(merger, state.running)
            if changed and not (keep_previous and state.previous):
                state.previous = state.running
            state.running, state.staged = merger, None
            return {"seconds": time.perf_counter() - begin, "changed": changed}

        return _answer(load)(self)

    def ppow_settle(self) -> dict[str, Any]:
        """All workers have loaded: forget what restoring would go back to, an adapter that nothing else needs."""

        def settle() -> dict[str, Any]:
            _state(self).before = None
            return {}

        return _answer(settle)(self)

    def ppow_restore(self) -> dict[str, Any]:
        """Undo a load that failed on this worker, or that succeeded here and failed on another."""

        def restore() -> dict[str, Any]:
            state = _state(self)
            running, previous = state.before or (state.running, state.previous)
            fresh, tensors = _merged(self, running.fresh())
            _write(self, tensors)
            # With the one before: going back to it may be tried again.
            state.running, state.previous, state.staged, state.before = fresh, previous, None, None
            return {}

        return _answer(restore)(self)

    def ppow_discard(self) -> dict[str, Any]:
        """Forget what was staged."""

        def discard() -> dict[str, Any]:
            _state(self).staged = None
            return {}

        return _answer(discard)(self)


def _alike(one: Merger, other: Merger) -> bool:
    """Whether two adapters change a drafter alike, wherever their files lie."""

    def identity(merger: Merger) -> tuple[str, str]:
        adapter = merger.adapter
        return adapter.config.adapter_fingerprint, fingerprint_scale(adapter.peft_config)

    return identity(one) == identity(other)


def _answer(step: Callable[[], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """A step's answer, with the adapter that is running after it."""

    def answer(worker: Any) -> dict[str, Any]:
        try:
            result = step()
            state = _state(worker)
        except Exception as error:
            if not isinstance(error, ArtifactError):
                seams.logger.exception("A step of a hot swap failed")
            return {"ok": False, "error": str(error) or type(error).__name__}
        running, previous = state.running.adapter, state.previous and state.previous.adapter
        return {
            "ok": True,
            "error": "",
            "adapter": str(running.directory),
            "fingerprint": running.config.adapter_fingerprint,
            "previous": str(previous.directory) if previous else None,
            **result,
        }

    return answer


def _speculative_config(worker: Any) -> Any:
    return worker.vllm_config.speculative_config


def remember(worker: Any) -> None:
    """Hold the adapter that a worker started with, so that a swap can go back to it whatever becomes of its files.

    Raises:
        ArtifactError: it was replaced while the worker started.
    """
    extra = _speculative_config(worker).draft_load_config.model_loader_extra_config
    running = read_adapter(extra[ADAPTER_KEY])
    if running.config.adapter_fingerprint != extra[FINGERPRINT_KEY]:
        raise SwapError(
            f"Adapter {running.directory} was replaced while the server was starting: start it again."
        )
    _states[worker] = _State(Merger(running))


def _state(worker: Any) -> _State:
    state = _states.get(worker)
    if state is None:
        raise SwapError(NOT_ON)
    return state


def _merged(worker: Any, merger: Merger) -> tuple[Merger, list[tuple[str, torch.Tensor]]]:
    """The base drafter's tensors with an adapter merged, complete, in host memory.

    Only merged tensors are new; the others are views of the checkpoint's files where vLLM maps them.

    Raises:
        ArtifactError: the drafter's files are not the ones it was loaded from, the merge is incomplete, or it would
            write to tensors that the drafter shares with the target.
    """
    from vllm_ppow.loader import base_weights

    speculative = _speculative_config(worker)
    base = Path(speculative.draft_model_config.model)
    wanted = merger.adapter.config.base_drafter.fingerprint
    if fingerprint_model(base) != wanted:
        raise SwapError(
            f"The drafter {base} was replaced on disk since the server started: put it back, or restart."
        )
    merger.check_base(base)
    draft = worker.get_draft_model()
    shared = {name.rpartition(".")[2] for name in _shared_modules(worker)}
    changed = merger.modules | _state(worker).running.modules
    if touched := sorted(shared & {name.rpartition(".")[2] for name in changed}):
        raise SwapError(
            f"Adapter {merger.adapter.directory}, or the one it would follow, changes {touched[0]}, which the running "
            "drafter shares with the target, and the target is never written to: start a server with it."
        )
    stream = base_weights(speculative.draft_load_config, speculative.draft_model_config, draft)
    tensors = [
        (name, tensor)
        for name, tensor in merger.wrap(stream)
        if canonical_module(name.rpartition(".")[0]).rpartition(".")[2] not in shared
    ]
    merger.assert_complete()
    return merger, tensors


def _shared_modules(worker: Any) -> list[str]:
    """Names of the drafter's modules that are the target's own: embeddings, an output layer, rotary tables."""
    targets = {id(module) for module in worker.get_model().modules()}
    found: list[str] = []
    for name, module in worker.get_draft_model().named_modules(remove_duplicate=False):
        if id(module) in targets and not any(name.startswith(f"{above}.") for above in found):
            found.append(name)
    return found


def _write(worker: Any, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write a checkpoint's full tensors into the running drafter, whose parameters keep their storage."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import layerwise

    draft = worker.get_draft_model()
    model_config = _speculative_config(worker).draft_model_config
    with set_current_vllm_config(worker.vllm_config), _without(draft, _shared_modules(worker)):
        layerwise.initialize_layerwise_reload(draft)
        try:
            draft.load_weights(iter(tensors))
        finally:  # puts the running tensors back wherever nothing was loaded
            layerwise.finalize_layerwise_processing(draft, model_config)


@contextlib.contextmanager
def _without(model: nn.Module, names: list[str]) -> Iterator[None]:
    """Take modules out of a model for a while, so that reloading it cannot touch them."""
    before = []
    for name in names:
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name) if parent_name else model
        before.append((parent, dict(parent._modules)))
        parent._modules.pop(child, None)
    try:
        yield
    finally:
        for parent, modules in reversed(before):
            parent._modules.clear()
            parent._modules.update(modules)


def allowed(vllm_config: Any) -> dict[str, Any] | None:
    """What the operator allowed to swap to (see `vllm_ppow.hot_swap.Allowed`); None if swapping is off."""
    speculative = vllm_config.speculative_config
    load_config = speculative.draft_load_config if speculative is not None else None
    if load_config is None:
        return None
    return load_config.model_loader_extra_config.get(HOT_SWAP_KEY)
