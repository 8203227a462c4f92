"""Decides whether this vLLM can serve with an adaptive draft window, and attaches it: draft lengths, scheduler.

The window hooks vLLM's schedulers in subclasses that `scheduler_cls` names. If one of the methods that they override is
not there, or something else forbids draft lengths that change from step to step, serving goes on with the fixed window
and one warning. Works on every vLLM whose SchedulerOutput carries a draft length. Left out: the scheduler itself
(vllm_ppow/scheduler.py), what it chooses by (window_policy.py), and lengths that differ between requests
(draft_window.py).
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

from vllm_ppow.compat import draft_window, seams, v2_runner
from vllm_ppow.compat.capabilities import V2_RUNNER
from vllm_ppow.compat.usable_profile import usable_profile
from vllm_ppow.config import WINDOW_KEY

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
# SpeculativeConfig's switch for vLLM's own trimming of verification by request.
VERIFICATION = "enable_adaptive_verification"
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
    rest = _spread(shorter, batch_sizes - 1)[::-1]
    first = batch_sizes - len(rest)
    return [(1, first, maximum), *((first + i, first + i, length) for i, length in enumerate(rest, 1))]


def _spread(ascending: list[int], number: int) -> list[int]:
    """That many of them, the first among them, evenly spread; all if they are no more."""
    if number >= len(ascending):
        return ascending
    if number < 2:
        return ascending[:number]
    step = (len(ascending) - 1) / (number - 1)
    return [ascending[round(i * step)] for i in range(number)]


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
    if (reason := _forbidden(native, engine_args, known_fields)) is not None:
        seams.logger.warning("The draft window stays fixed at its maximum: %s", reason)
        del extra[WINDOW_KEY]
        return
    ladder = lengths(options["min_tokens"], native["num_speculative_tokens"])
    native[TABLE] = table(ladder, engine_args.max_num_seqs or _BATCH_SIZES)


def _forbidden(native: dict[str, Any], engine_args: Any, known_fields: list[str]) -> str | None:
    """Why draft lengths must not change from step to step here; None if they may."""
    if engine_args.scheduler_cls is not None:
        return "--scheduler-cls names another scheduler, and the adaptive window is one."
    if engine_args.data_parallel_size > 1:
        return "data-parallel ranks must draft alike, and each has a scheduler of its own."
    if engine_args.pipeline_parallel_size > 1:
        return "pipeline stages work on several steps at a time, so that none has a time of its own."
    if native.get("parallel_drafting"):
        return "with parallel_drafting one pass makes all tokens of a draft, however long it is to be."
    if TABLE not in known_fields:
        return f"this vLLM's speculative config has no {TABLE}."
    try:
        require()
    except seams.SeamMissingError as error:
        return str(error)
    return None


def attach(vllm_config: Any) -> None:
    """Name our scheduler in a finished VllmConfig whose speculative config asks for an adaptive window."""
    options = options_of(vllm_config.speculative_config)
    if options is None:
        return
    if vllm_config.use_v2_model_runner and not v2_runner.drafts_as_scheduled():
        seams.logger.warning(
            "The draft window stays fixed at its maximum: the V2 model runner of this vLLM drafts as many tokens in "
            "every step."
        )
        setattr(vllm_config.speculative_config, TABLE, None)
        return
    if vllm_config.use_v2_model_runner and _draft_model_stays_long(vllm_config.speculative_config):
        seams.logger.warning(
            "The V2 model runner of this vLLM lets a draft model draft as many tokens in every step: shorter drafts "
            "save their verification only. With many requests at a time compare %s=0 or a shorter fixed window.",
            V2_RUNNER,
        )
    if options["per_request"] is not False:
        reason = _no_trimming(vllm_config)
        if reason is None and options["per_request"] is None:
            reason = _not_unasked(vllm_config)
        if reason is not None:
            seams.logger.info("Drafts are of one length per step, not trimmed by request: %s", reason)
            seams.logger.info("%s", verification(vllm_config))
            options["per_request"] = False
        vllm_config.speculative_config.draft_load_config.model_loader_extra_config[WINDOW_KEY] = options
    scheduler = vllm_config.scheduler_config
    name = "PPOWAsyncScheduler" if scheduler.async_scheduling else "PPOWScheduler"
    scheduler.scheduler_cls = f"vllm_ppow.scheduler.{name}"


def _draft_model_stays_long(speculative_config: Any) -> bool:
    return speculative_config.uses_draft_model() and not v2_runner.shortens_draft_models()


def _no_trimming(vllm_config: Any) -> str | None:
    """Why drafts cannot be trimmed request by request on this runner; None if they can (draft_window.py)."""
    speculative, parallel = vllm_config.speculative_config, vllm_config.parallel_config
    reasons = {
        "it needs synchronous scheduling.": vllm_config.scheduler_config.async_scheduling,
        "it needs the V1 model runner.": vllm_config.use_v2_model_runner,
        "ranks would have to agree on lengths.": parallel.world_size > 1,
        "this drafter does not give its probabilities.": getattr(
            speculative, "use_local_argmax_reduction", False
        )
        or getattr(speculative, "use_heterogeneous_vocab", False)
        or getattr(speculative, "parallel_drafting", False)
        or getattr(speculative, "disable_padded_drafter_batch", False),
    }
    if (reason := next((reason for reason, holds in reasons.items() if holds), None)) is not None:
        return reason
    try:
        draft_window.require()
    except seams.SeamMissingError as error:
        return str(error)
    return None


def _not_unasked(vllm_config: Any) -> str | None:
    """Why drafts that can be trimmed by request are not unless asked for; None if they are.

    Without a cost profile drafts of odd lengths come first, to learn what a token costs, and a GPU would have to wait
    for probabilities at each pass.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return 'on a GPU "per_request": true asks for it.'
    profile, unusable = usable_profile(vllm_config)
    if unusable is not None:  # why says the scheduler
        return "it needs a cost profile, and the adapter's cannot be used here."
    if profile is None:
        return "it needs a cost profile, and the adapter has none; ppow profile measures one."
    return None


def verification(vllm_config: Any) -> str:
    """What the log says of vLLM's own trimming of verification by request (V2 runner, vLLM >= 0.32).

    It is not switched on unasked: on an attention backend without decode graphs of varying length it would keep the
    server from starting, and which backend that is shows in the worker only.
    """
    speculative = vllm_config.speculative_config
    enabled = getattr(speculative, VERIFICATION, None)
    if enabled:
        return "vLLM trims verification by request."
    blockers = {
        "this vLLM has none": enabled is None,
        "it needs the V2 model runner": not vllm_config.use_v2_model_runner,
        "it needs full CUDA graphs": not vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs(),
        "it does not go with LoRA": vllm_config.lora_config is not None,
        "it does not go with pipeline parallelism": vllm_config.parallel_config.pipeline_parallel_size > 1,
    }
    if (blocker := next((text for text, holds in blockers.items() if holds), None)) is not None:
        return f"vLLM's own trimming of verification is off: {blocker}."
    return f'vLLM can trim verification by request as well: "{VERIFICATION}": true in the speculative config.'


def options_of(speculative_config: Any) -> dict[str, Any] | None:
    """The window options that travel with a validated SpeculativeConfig; None: the window is fixed."""
    load_config = getattr(speculative_config, "draft_load_config", None)
    if load_config is None or getattr(speculative_config, TABLE, None) is None:
        return None
    options = (load_config.model_loader_extra_config or {}).get(WINDOW_KEY)
    return dict(options) if options is not None else None
