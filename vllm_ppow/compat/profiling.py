"""Times the passes of a vLLM engine in this process, and sets its draft length from outside; for `ppow profile` only.

While a `StepProfiler` is open, the scheduler, the model runner of every worker and the V2 runner's speculator are
instances of subclasses of their own classes that time or steer one method each; afterwards they are what they were.
V1 runner: drafting is `propose_draft_token_ids` (run: 0.32 on a CPU, 0.26 on a GPU). V2 runner: it is
`speculator.propose` (run: 0.32 on a GPU). On an accelerator every pass is waited for, so that what
a server overlaps is not hidden in the figures. Left out: what is measured when (ppow_train/profiling.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vllm_ppow.compat import seams, v2_runner

# What a runner's passes took, and what a scheduler is told to draft; neither is hung on vLLM's objects.
_watches: weakref.WeakKeyDictionary[Any, _Watch] = weakref.WeakKeyDictionary()
_draft_lengths: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


@dataclasses.dataclass(frozen=True)
class PassTime:
    """One pass of the model runner.

    Attributes:
        batch: requests in it.
        draft_length: drafted tokens that it verified for each request; None where they differ, or where a request was
            still reading its prompt.
        next_draft_length: tokens that it was asked to draft.
        target_seconds: the target's forward pass, sampling and verification.
        draft_seconds: drafting.
    """

    batch: int
    draft_length: int | None
    next_draft_length: int
    target_seconds: float
    draft_seconds: float


@dataclasses.dataclass
class _Watch:
    """Of one runner: seconds of the pass under way, and the passes before it."""

    synchronize: Callable[[], None]
    passes: list[PassTime] = dataclasses.field(default_factory=list)
    scheduled: Any = None
    running: float = 0.0
    draft: float = 0.0

    @contextlib.contextmanager
    def running_pass(self) -> Iterator[None]:
        yield from self._timing("running")

    @contextlib.contextmanager
    def drafting(self) -> Iterator[None]:
        yield from self._timing("draft")

    def _timing(self, name: str) -> Iterator[None]:
        self.synchronize()
        began = time.perf_counter()
        yield
        self.synchronize()
        setattr(self, name, getattr(self, name) + time.perf_counter() - began)

    def begin(self, scheduled: Any) -> None:
        self.scheduled, self.running, self.draft = scheduled, 0.0, 0.0

    def finish(self) -> None:
        scheduled, self.scheduled = self.scheduled, None
        if scheduled is None or not scheduled.num_scheduled_tokens:
            return
        self.passes.append(
            PassTime(
                batch=len(scheduled.num_scheduled_tokens),
                draft_length=verified_length(scheduled),
                next_draft_length=scheduled.num_spec_tokens_to_schedule,
                target_seconds=self.running - self.draft,
                draft_seconds=self.draft,
            )
        )


def verified_length(scheduled: Any) -> int | None:
    """Drafted tokens per request in a SchedulerOutput; None if they differ or a prompt is still being read."""
    drafts = scheduled.scheduled_spec_decode_tokens
    lengths = {len(drafts.get(request, ())) for request in scheduled.num_scheduled_tokens}
    decoding = all(
        tokens == len(drafts.get(request, ())) + 1
        for request, tokens in scheduled.num_scheduled_tokens.items()
    )
    return lengths.pop() if decoding and len(lengths) == 1 else None


# ---------------------------------------------------------------- subclasses of vLLM's own classes


def _timed_runner(own: Any) -> type:
    """Of either model runner."""

    class TimedRunner(own):
        def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            watch = _watches[self]
            watch.begin(scheduler_output)
            with watch.running_pass():
                return super().execute_model(scheduler_output, *args, **kwargs)

        def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
            watch = _watches[self]
            with watch.running_pass():
                output = super().sample_tokens(*args, **kwargs)
            watch.finish()
            return output

    return TimedRunner


def _timed_v1_runner(own: Any) -> type:
    class TimedV1Runner(_timed_runner(own)):  # type: ignore[misc]
        def propose_draft_token_ids(self, *args: Any, **kwargs: Any) -> Any:
            with _watches[self].drafting():
                return super().propose_draft_token_ids(*args, **kwargs)

    return TimedV1Runner


def _timed_speculator(own: Any) -> type:
    """Of the V2 runner; its watch is the runner's."""

    class TimedSpeculator(own):
        def propose(self, *args: Any, **kwargs: Any) -> Any:
            with _watches[self].drafting():
                return super().propose(*args, **kwargs)

    return TimedSpeculator


def _steered_scheduler(own: Any) -> type:
    class SteeredScheduler(own):
        def _update_after_schedule(self, scheduler_output: Any) -> None:
            if scheduler_output.num_scheduled_tokens:
                scheduler_output.num_spec_tokens_to_schedule = _draft_lengths[self]
            super()._update_after_schedule(scheduler_output)

    return SteeredScheduler


# Object -> its own class, while it is an instance of one of the subclasses above.
_own_classes: weakref.WeakKeyDictionary[Any, type] = weakref.WeakKeyDictionary()


def _adopt(instance: Any, subclass: Callable[[Any], type], *needed: str) -> None:
    """Make it an instance of a subclass of its own class.

    Raises:
        SeamMissingError: its class lacks one of the methods that the subclass overrides.
    """
    own = type(instance)
    for method in needed:
        if not callable(getattr(own, method, None)):
            raise seams.missing(own.__module__, own.__qualname__, method, "it is not there")
    _own_classes[instance] = own
    instance.__class__ = subclass(own)


def _release(instance: Any) -> None:
    instance.__class__ = _own_classes.pop(instance)


# ---------------------------------------------------------------- in every worker


def start_timing(worker: Any) -> None:
    """Time this worker's passes from now on; called in its process.

    Raises:
        SeamMissingError: its runner is not one of those we know, or cannot be steered.
    """
    runner = worker.model_runner
    watch = _Watch(_synchronizer(runner.device))
    speculator = getattr(runner, "speculator", None)  # the V2 runner's; V1 calls it drafter
    if speculator is None:
        _adopt(runner, _timed_v1_runner, "execute_model", "sample_tokens", "propose_draft_token_ids")
    else:
        if not v2_runner.drafts_as_scheduled():
            raise seams.SeamMissingError(
                "The V2 model runner of this vLLM drafts as many tokens in every step, so that lengths cannot be "
                "measured on it: set VLLM_USE_V2_MODEL_RUNNER=0 to measure the V1 runner, or take vLLM 0.32 or newer."
            )
        _adopt(runner, _timed_runner, "execute_model", "sample_tokens")
        _adopt(speculator, _timed_speculator, "propose")
        _watches[speculator] = watch
    _watches[runner] = watch


def stop_timing(worker: Any) -> None:
    """Undo `start_timing`."""
    runner = worker.model_runner
    for timed in (runner, getattr(runner, "speculator", None)):
        if timed is not None and _watches.pop(timed, None) is not None:
            _release(timed)


def take_passes(worker: Any) -> list[PassTime]:
    """This worker's passes since they were last taken."""
    watch = _watches[worker.model_runner]
    passes, watch.passes = watch.passes, []
    return passes


def _synchronizer(device: Any) -> Callable[[], None]:
    if device.type == "cpu":
        return lambda: None
    import torch

    return torch.accelerator.synchronize


# ---------------------------------------------------------------- in the engine's process


class StepProfiler:
    """Steers and times the steps of an `LLM` whose engine core lives in this process. Use as a context manager.

    Attributes:
        draft_length: tokens to draft in the steps that follow, 0 to num_speculative_tokens.

    Raises:
        SeamMissingError: the engine lives elsewhere (start it with VLLM_ENABLE_V1_MULTIPROCESSING=0), or this vLLM
            lacks a method that is timed or steered.
    """

    def __init__(self, llm: Any, draft_length: int) -> None:
        client = llm.llm_engine.engine_core
        core: Any = getattr(client, "engine_core", None)
        if not hasattr(core, "step_fn"):
            raise seams.missing(
                type(client).__module__,
                type(client).__name__,
                "engine_core.step_fn",
                "the engine must live in this process, VLLM_ENABLE_V1_MULTIPROCESSING=0",
            )
        _check_draft_length_field()
        self._llm, self._core, self._scheduler = llm, core, core.scheduler
        self._steps: list[float] = []
        self.draft_length = draft_length

    @property
    def draft_length(self) -> int:
        """Tokens to draft in the steps that follow."""
        return _draft_lengths[self._scheduler]

    @draft_length.setter
    def draft_length(self, length: int) -> None:
        _draft_lengths[self._scheduler] = length

    def __enter__(self) -> StepProfiler:
        _adopt(self._scheduler, _steered_scheduler, "_update_after_schedule")
        self._step_fn = self._core.step_fn
        self._core.step_fn = self._timed_step
        self._llm.collective_rpc(start_timing)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._core.step_fn = self._step_fn
        _release(self._scheduler)
        del _draft_lengths[self._scheduler]
        self._llm.collective_rpc(stop_timing)

    def _timed_step(self) -> Any:
        began = time.perf_counter()
        result = self._step_fn()
        self._steps.append(time.perf_counter() - began)
        return result

    def take(self) -> tuple[list[PassTime], list[float]]:
        """What was measured since it was last taken.

        Returns:
            The runner's passes, of several workers the slowest of each, and the seconds of the engine core's steps.
        """
        by_worker = self._llm.collective_rpc(take_passes)
        steps, self._steps = self._steps, []
        return [_slowest(passes) for passes in zip(*by_worker, strict=True)], steps


def _slowest(passes: tuple[PassTime, ...]) -> PassTime:
    return dataclasses.replace(
        passes[0],
        target_seconds=max(one.target_seconds for one in passes),
        draft_seconds=max(one.draft_seconds for one in passes),
    )


def _check_draft_length_field() -> None:
    from vllm.v1.core.sched.output import SchedulerOutput

    if "num_spec_tokens_to_schedule" not in {field.name for field in dataclasses.fields(SchedulerOutput)}:
        raise seams.missing(
            SchedulerOutput.__module__, "SchedulerOutput", "num_spec_tokens_to_schedule", "no such field"
        )


def draft_length_ladder(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """A `num_speculative_tokens_per_batch_size` that names every length, so that graphs are captured for each.

    vLLM reads it up to max_num_seqs, which must not be below the number of lengths.
    """
    return [(batch, batch, length) for batch, length in enumerate(lengths, 1)]


def machine(vllm_config: Any) -> dict[str, Any]:
    """The fields of a CostProfile that say where its figures hold."""
    from vllm.version import __version__

    dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
    cache = vllm_config.cache_config.cache_dtype
    return {
        "vllm_version": __version__,
        "device": device_name(),
        "dtype": dtype,
        "kv_cache_dtype": "auto" if cache == dtype else cache,
        "full_graphs": vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs(),
        "tensor_parallel_size": vllm_config.parallel_config.tensor_parallel_size,
        "enforce_eager": vllm_config.model_config.enforce_eager,
        "quantization": vllm_config.model_config.quantization or "none",
    }


def lacks_full_graphs(vllm_config: Any) -> bool:
    """Whether the V1 model runner has CUDA graphs and none of whole steps, as where draft lengths may change."""
    mode = vllm_config.compilation_config.cudagraph_mode
    return not vllm_config.use_v2_model_runner and bool(mode) and not mode.has_full_cudagraphs()


def device_name() -> str:
    """The device that vLLM runs on, in words; of a CPU the model and the number of cores it sees."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return current_platform.get_device_name()
    return f"{_cpu_model()}, {os.cpu_count()} cores"


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
