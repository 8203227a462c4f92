"""Decides whether this vLLM can serve with an adaptive draft window, and attaches it: draft lengths, scheduler.

The window hooks vLLM's schedulers in subclasses that `scheduler_cls` names. If one of the methods that they override is
not there, or something else forbids draft lengths that change from step to step, serving goes on with the fixed window
and one warning. Works on every vLLM whose SchedulerOutput carries a draft length. Left out: the scheduler itself
(vllm_ppow/scheduler.py), and lengths that differ between requests (draft_window.py).
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

from vllm_ppow.acceptance import AcceptanceEstimate
from vllm_ppow.compat import seams
from vllm_ppow.config import ADAPTER_KEY, WINDOW_KEY
from vllm_ppow.step_cost import StepCost
from vllm_ppow.window import DraftWindow

SCHEDULER_SEAMS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("_update_after_schedule", ("self", "scheduler_output")),
    ("update_draft_token_ids", ("self", "draft_token_ids")),
    ("update_from_output", ("self", "scheduler_output", "model_runner_output")),
    (
        "make_spec_decoding_stats",
        (
            "spec_decoding_stats",
            "num_draft_tokens",
            "num_accepted_tokens",
            "num_invalid_spec_tokens",
            "request_id",
        ),
    ),
)
_SCHEDULER = "vllm.v1.core.sched.scheduler"
_ASYNC_SCHEDULER = "vllm.v1.core.sched.async_scheduler"
# SpeculativeConfig's table of draft lengths by batch size: declaring ours there makes vLLM capture CUDA graphs for each
# length, and keeps its scheduler from padding resumed requests with drafts that nobody made.
TABLE = "num_speculative_tokens_per_batch_size"
# A batch size that every GPU default of max_num_seqs allows; used where the user left it to vLLM.
_BATCH_SIZES = 128
# Above it only every other length, then every fourth: each costs graphs to capture.
_EVERY_LENGTH_UP_TO = 8


def require() -> None:
    """Fail if a vLLM scheduler cannot be told the draft length of a step.

    Raises:
        SeamMissingError: names what is missing.
    """
    for method, parameters in SCHEDULER_SEAMS:
        seams.find(_SCHEDULER, "Scheduler", method, parameters)
    seams.find(_ASYNC_SCHEDULER, "AsyncScheduler", "_update_after_schedule", ("self", "scheduler_output"))
    output = importlib.import_module("vllm.v1.core.sched.output").SchedulerOutput
    if "num_spec_tokens_to_schedule" not in {field.name for field in dataclasses.fields(output)}:
        raise seams.missing(
            "vllm.v1.core.sched.output", "SchedulerOutput", "num_spec_tokens_to_schedule", "no field"
        )


def lengths(minimum: int, maximum: int) -> list[int]:
    """Draft lengths to choose from: all up to 8, every other one up to 16, every fourth beyond, and the maximum."""
    chosen = [
        length
        for length in range(minimum, maximum)
        if length <= _EVERY_LENGTH_UP_TO or length % (2 if length <= 16 else 4) == 0
    ]
    return [*chosen, maximum]


def table(ladder: list[int], batch_sizes: int) -> list[tuple[int, int, int]]:
    """A table of vLLM's that holds each length of a ladder, as far as there are batch sizes to hold them.

    vLLM captures a length's graphs up to the largest batch size that the table gives to it: the maximum gets all batch
    sizes but the last few, of which each other length gets one.

    Returns:
        [(first batch size, last batch size, length), …], ascending.
    """
    *shorter, maximum = ladder
    rest = shorter[max(0, len(shorter) - batch_sizes + 1) :][::-1]
    first = batch_sizes - len(rest)
    return [(1, first, maximum), *((first + i, first + i, length) for i, length in enumerate(rest, 1))]


def prepare(native: dict[str, Any], engine_args: Any, known_fields: list[str]) -> None:
    """Make a rewritten speculative config ask for an adaptive window, or say in the log why it stays fixed.

    Args:
        native: the speculative config; changed in place.
        engine_args: vLLM's EngineArgs, before defaults are filled in.
        known_fields: fields of this vLLM's SpeculativeConfig.
    """
    extra = native["draft_load_config"]["model_loader_extra_config"]
    options = extra.get(WINDOW_KEY)
    if options is None:
        return
    if native.get(TABLE) is not None:
        seams.logger.info("The draft window follows the table %s that was given, and is not adaptive.", TABLE)
        del extra[WINDOW_KEY]
        return
    if (reason := _forbidden(engine_args, known_fields)) is not None:
        seams.logger.warning("The draft window stays fixed at its maximum: %s", reason)
        del extra[WINDOW_KEY]
        return
    maximum = native["num_speculative_tokens"]
    if not isinstance(maximum, int) or maximum < 1:
        return  # vLLM refuses it with its own words
    ladder = lengths(options["min_tokens"], maximum)
    native[TABLE] = table(ladder, engine_args.max_num_seqs or _BATCH_SIZES)


def _forbidden(engine_args: Any, known_fields: list[str]) -> str | None:
    """Why draft lengths must not change from step to step here; None if they may."""
    if engine_args.scheduler_cls is not None:
        return "--scheduler-cls names another scheduler, and the adaptive window is one."
    if engine_args.data_parallel_size > 1:
        return "data-parallel ranks must draft alike, and each has a scheduler of its own."
    if TABLE not in known_fields:
        return f"this vLLM's speculative config has no {TABLE}."
    try:
        require()
    except seams.SeamMissingError as error:
        return str(error)
    return None


def attach(vllm_config: Any) -> None:
    """Name our scheduler in a finished VllmConfig whose speculative config asks for an adaptive window."""
    if options_of(vllm_config.speculative_config) is None:
        return
    scheduler = vllm_config.scheduler_config
    name = "PPOWAsyncScheduler" if scheduler.async_scheduling else "PPOWScheduler"
    scheduler.scheduler_cls = f"vllm_ppow.scheduler.{name}"


def options_of(speculative_config: Any) -> dict[str, Any] | None:
    """The window options that travel with a validated SpeculativeConfig; None: the window is fixed."""
    load_config = getattr(speculative_config, "draft_load_config", None)
    if load_config is None or getattr(speculative_config, TABLE, None) is None:
        return None
    options = (load_config.model_loader_extra_config or {}).get(WINDOW_KEY)
    return dict(options) if options is not None else None


def build_window(vllm_config: Any) -> DraftWindow:
    """The policy of one engine, from the options in its config and the adapter's cost profile if it has one."""
    speculative = vllm_config.speculative_config
    options = options_of(speculative) or {"min_tokens": 0}
    maximum = speculative.num_speculative_tokens
    ladder = lengths(options["min_tokens"], maximum)
    if vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs():
        captured = {length for _, _, length in speculative.num_speculative_tokens_per_batch_size}
        ladder = [length for length in ladder if length in captured]
    profile = _profile(speculative.draft_load_config.model_loader_extra_config[ADAPTER_KEY])
    prior = profile.acceptance_per_position if profile is not None else ()
    window = DraftWindow(ladder, AcceptanceEstimate(maximum, prior), StepCost(profile))
    seams.logger.info(
        "Adaptive draft window: %s tokens per step, chosen from acceptance and step times (%s).",
        f"{ladder[0]} to {ladder[-1]}",
        "cost profile, corrected while serving" if profile is not None else "learned while serving",
    )
    return window


def _profile(adapter: str) -> Any:
    """The cost profile beside an adapter's files, or None; a broken one is reported and not used."""
    try:
        module = importlib.import_module("vllm_ppow.cost_profile")
    except ModuleNotFoundError:
        return None
    try:
        return module.read_cost_profile(adapter)
    except module.CostProfileError as error:
        seams.logger.warning("The draft window learns costs while serving: %s", error)
        return None
