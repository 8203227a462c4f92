"""Builds the draft window policy of one engine from its finished config and the adapter's cost profile.

Called in the engine core, by the scheduler, and in the worker whose drafter trims. Left out: whether there is an
adaptive window at all (window.py), and how the policies choose (vllm_ppow/window.py, traffic_window.py,
request_window.py).
"""

from __future__ import annotations

from typing import Any

from vllm_ppow.acceptance import AcceptanceEstimate, TrimmedAcceptance
from vllm_ppow.compat import seams
from vllm_ppow.compat.usable_profile import usable_profile
from vllm_ppow.compat.window import TABLE, VERIFICATION, lengths, options_of
from vllm_ppow.config import PPOWServingError
from vllm_ppow.cost_profile import CostProfile
from vllm_ppow.request_window import RequestWindow
from vllm_ppow.step_cost import StepCost
from vllm_ppow.traffic_window import TrafficWindow
from vllm_ppow.window import DraftWindow

# What the log says of the option per_request, as `window.attach` has decided it.
_SAID = {True: " and request", False: "", None: " and, while most requests are greedy, per request"}


def build_window(vllm_config: Any) -> DraftWindow | TrafficWindow:
    """The policy of one engine, from the options in its config and the adapter's cost profile if it has one.

    Raises:
        PPOWServingError: the config is not one of method ppow with an adaptive window.
    """
    speculative = vllm_config.speculative_config
    options = options_of(speculative) if speculative is not None else None
    if options is None:
        raise PPOWServingError(
            "The scheduler of vllm-ppow serves method ppow with an adaptive window, which sets it: leave "
            "scheduler_cls out."
        )
    by_request, verifies = options["per_request"], bool(getattr(speculative, VERIFICATION, False))
    profile, unusable = usable_profile(vllm_config)
    if unusable is not None:
        seams.logger.warning("The draft window learns costs while serving: %s", unusable)
    ladder = _drafted_lengths(vllm_config, options["min_tokens"])
    window: DraftWindow | TrafficWindow
    if by_request is None:
        whole, trimmed = (_policy(ladder, profile, trims, by_request=trims) for trims in (False, True))
        window = TrafficWindow(whole, trimmed)
    else:
        window = _policy(ladder, profile, by_request or verifies, by_request)
        window.counts.layers = ("step", *(["request"] * by_request), *(["verification"] * verifies))
    seams.logger.info(
        "Adaptive draft window: %d to %d tokens, per step%s, chosen from acceptance and step times (%s).",
        ladder[0],
        ladder[-1],
        _SAID[by_request],
        _known_from(profile is not None, not (by_request or verifies), by_request is not False),
    )
    return window


def _drafted_lengths(vllm_config: Any, minimum: int) -> list[int]:
    """Draft lengths to choose from, ascending: with full CUDA graphs those that were declared, and the shortest."""
    speculative = vllm_config.speculative_config
    ladder = lengths(minimum, speculative.num_speculative_tokens)
    if not vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs():
        return ladder
    captured = {length for _, _, length in getattr(speculative, TABLE)}
    # The shortest without a graph of its own runs as prefill does: what that costs, the clock tells.
    return [length for length in ladder if length in captured or length == ladder[0]]


def _policy(ladder: list[int], profile: CostProfile | None, trims: bool, by_request: bool) -> DraftWindow:
    """The policy of one kind of drafts.

    Args:
        trims: whether drafts, or their verification, are trimmed request by request: of the ladder only the ends are
            chosen then, what lies between is left to the requests. A profile has timed drafts that are verified whole:
            what a step of trimmed ones takes the clock alone tells; what one of their tokens is worth, the profile
            tells the drafter.
        by_request: whether it is our drafter that trims.
    """
    maximum = ladder[-1]
    estimate = AcceptanceEstimate(maximum, profile.acceptance_per_position if profile is not None else ())
    if not trims:
        return DraftWindow(ladder, estimate, StepCost(profile))
    return DraftWindow(
        sorted({ladder[0], maximum}), estimate, StepCost(), TrimmedAcceptance(), by_request=by_request
    )


def _known_from(has_profile: bool, whole: bool, trims: bool) -> str:
    """Where acceptance and step times come from, for the log.

    Args:
        whole: whether there is a policy of drafts that are verified whole.
        trims: whether there is one of trimmed drafts.
    """
    if not has_profile:
        return "learned while serving"
    if not whole:
        return "acceptance and prices of the cost profile, step times learned while serving"
    return "cost profile, corrected while serving" + "; step times of trimmed drafts are learned" * trims


def build_request_window(vllm_config: Any, options: dict[str, Any]) -> RequestWindow:
    """The policy of a drafter that trims its drafts by request, from the adapter's cost profile if it has one.

    Args:
        options: of the window, as `options_of` gives them.
    """
    profile, _ = usable_profile(vllm_config)  # what is wrong with it says the scheduler's log
    return RequestWindow(
        vllm_config.speculative_config.num_speculative_tokens, options["min_tokens"], profile
    )
