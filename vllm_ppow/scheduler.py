"""vLLM's schedulers with the draft window policy: each step's draft length is chosen here, and its outcome observed.

vLLM carries a draft length with every step already (`num_spec_tokens_to_schedule`, for its own table of batch sizes);
we set it, and nothing in the workers needs a patch. The choice is made once, in the engine core, and travels in the
SchedulerOutput that every worker is sent, so tensor-parallel ranks cannot disagree. A length of 0 leaves the drafter's
KV cache fresh: vLLM still runs the drafter's first pass over the new tokens (on the V2 model runner all passes of a
draft model, v2_runner.py), and the time of a step at K = 0 includes it. Left out: the policy (window.py), and when
these classes are used at all (compat/window.py).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_ppow.compat import draft_room
from vllm_ppow.compat.draft_window import GREEDY_BELOW, TrimmedLength
from vllm_ppow.compat.window_policy import build_window
from vllm_ppow.traffic_window import TrafficWindow
from vllm_ppow.window import DraftWindow, WindowCounts
from vllm_ppow.window_report import ReportWriter

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import DraftTokenIds, SchedulerOutput

logger = logging.getLogger("vllm.ppow.window")

LOG_SECONDS = 10.0


class AdaptiveWindow:
    """Mixed in before a vLLM scheduler: asks a DraftWindow for each step's draft length, tells it the outcome."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        scheduler: Any = self
        self.ppow_window: DraftWindow | TrafficWindow = build_window(scheduler.vllm_config)
        self._longest_drafted: int | None = draft_room.longest_drafted(scheduler.vllm_config)
        self._policy_failed = False
        self._updated_at = 0.0
        self._last_length = -1  # drafted in the step that was processed last; -1: none of known length
        self._last_decoded = False  # whether that step only decoded
        self._drafts_late = bool(scheduler.vllm_config.use_v2_model_runner)
        # Of drafts that a grammar has cut: tokens (kept, refused).
        self._refused: dict[str, tuple[int, int]] = {}
        self._last_scheduled = -1
        self._logged_at = time.monotonic()
        self._logged: WindowCounts = self.ppow_window.counts.copy()
        self._report = ReportWriter(scheduler.vllm_config)

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        scheduled = scheduler_output.num_scheduled_tokens
        if scheduled:
            chosen = self._guarded(self._choose, scheduler_output)
            length = self.num_spec_tokens if chosen is None else chosen  # type: ignore[attr-defined]
            self._last_scheduled = length
            trims = chosen is not None and self.ppow_window.by_request
            scheduler_output.num_spec_tokens_to_schedule = TrimmedLength(length) if trims else length
        super()._update_after_schedule(scheduler_output)  # type: ignore[misc]

    def _guarded(self, act: Callable[..., Any], *arguments: Any) -> Any:
        """What the policy answers; None after an error in it, of which no engine should die: output needs no policy."""
        if self._policy_failed:
            return None
        try:
            return act(*arguments)
        except Exception:
            self._policy_failed = True
            logger.exception(
                "The draft window failed and is fixed at its maximum from now on; serving goes on."
            )
            counts = self.ppow_window.counts
            counts.layers = tuple(layer for layer in counts.layers if layer == "verification")
            self._report.write(counts, at_once=True)  # /metrics says so from now on
            return None

    def _choose(self, scheduler_output: SchedulerOutput) -> int:
        requests, scheduled = self.requests, scheduler_output.num_scheduled_tokens  # type: ignore[attr-defined]
        longest = context = sampled = 0
        for req_id, count in scheduled.items():
            request = requests[req_id]
            length = request.num_computed_tokens + count
            context += length
            sampled += request.sampling_params.temperature >= GREEDY_BELOW
            longest = max(longest, length)
        if self._longest_drafted is not None and longest > self._longest_drafted:
            return 0  # no draft would be made, and zeros verified in place of one
        return self.ppow_window.choose(len(scheduled), context, _only_decodes(scheduler_output), sampled)

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Synchronous scheduling: keep no more tokens than were asked for (a drafter without room returns zeros)."""
        for tokens in draft_token_ids.draft_token_ids:
            del tokens[self._last_scheduled :]
        drafted = dict(zip(draft_token_ids.req_ids, map(len, draft_token_ids.draft_token_ids), strict=True))
        super().update_draft_token_ids(draft_token_ids)  # type: ignore[misc]
        self._guarded(self._observe_refusals, drafted)

    def _observe_refusals(self, drafted: dict[str, int]) -> None:
        """Synchronous scheduling drops what a grammar refuses before it is verified: remembered until it is.

        Args:
            drafted: tokens of each request's draft.
        """
        self._refused = {}
        for req_id, length in drafted.items():
            request = self.requests.get(req_id)  # type: ignore[attr-defined]
            if request is None or request.is_finished() or request.is_prefill_chunk:
                continue
            kept = len(request.spec_token_ids)
            if 0 < kept < length:
                self._refused[req_id] = kept, length - kept
            elif kept < length:
                self.ppow_window.observe_draft(length, 0, length)  # nothing is left that vLLM would count

    def make_spec_decoding_stats(
        self,
        spec_decoding_stats: Any,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        num_invalid_spec_tokens: dict[str, int] | None,
        request_id: str,
    ) -> Any:
        """vLLM counts each request's verified draft here, whether or not statistics are kept: so do we."""
        refused = num_invalid_spec_tokens.get(request_id, 0) if num_invalid_spec_tokens else 0
        kept, dropped = self._refused.get(request_id, (0, 0))
        if num_draft_tokens == kept:  # else it was cut again, for room, and never came to them
            num_refused, num_drafted = refused + dropped, num_draft_tokens + dropped
        else:
            num_refused, num_drafted = refused, num_draft_tokens
        self._guarded(self.ppow_window.observe_draft, num_drafted, num_accepted_tokens, num_refused)
        return super().make_spec_decoding_stats(  # type: ignore[misc]
            spec_decoding_stats,
            num_draft_tokens=num_draft_tokens,
            num_accepted_tokens=num_accepted_tokens,
            num_invalid_spec_tokens=num_invalid_spec_tokens,
            request_id=request_id,
        )

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: Any) -> Any:
        now = time.perf_counter()
        seconds, self._updated_at = now - self._updated_at, now
        accepted = self.ppow_window.counts.accepted
        context = self._guarded(self._context, scheduler_output)  # of requests that may end here, too
        result = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        accepted = self.ppow_window.counts.accepted - accepted
        self._guarded(self._observe_step, scheduler_output, seconds, context, accepted)
        self._guarded(self._report.write, self.ppow_window.counts)
        if time.monotonic() - self._logged_at >= LOG_SECONDS:
            self._guarded(self._log)
        return result

    def shutdown(self) -> None:
        self._report.close()
        super().shutdown()  # type: ignore[misc]

    def _context(self, scheduler_output: SchedulerOutput) -> int:
        """Tokens that a step's requests have behind them, all together."""
        requests = self.requests  # type: ignore[attr-defined]
        scheduled = scheduler_output.num_scheduled_tokens
        return sum(requests[req_id].num_computed_tokens for req_id in scheduled if req_id in requests)

    def _observe_step(
        self, scheduler_output: SchedulerOutput, seconds: float, context: int, accepted: int
    ) -> None:
        """The time since the step before is this step's, if both had work and it only decoded.

        The V2 model runner answers before it drafts: there that time holds the drafting of the step before, which must
        only have decoded as well (else its draft began with a prefill).
        """
        scheduled = scheduler_output.num_scheduled_tokens
        length = scheduler_output.num_spec_tokens_to_schedule if scheduled else -1
        before, self._last_length = self._last_length, length
        decodes = bool(scheduled) and _only_decodes(scheduler_output)
        decoded, self._last_decoded = self._last_decoded, decodes
        if not decodes or before < 0 or (self._drafts_late and not decoded):
            return
        if before != length:
            self.ppow_window.observe_change(seconds, len(scheduled), max(before, length))
            return
        self.ppow_window.observe_step(seconds, len(scheduled), length, context, accepted)

    def _log(self) -> None:
        self._logged_at = time.monotonic()
        counts = self.ppow_window.counts
        new, self._logged = counts - self._logged, counts.copy()
        steps = sum(new.chosen)
        if not steps:
            return
        mean = sum(length * times for length, times in enumerate(new.chosen)) / steps
        logger.info(
            "Draft window: mean %.1f tokens over %d steps (%s), accepted %d of %d drafted (expected %.0f), estimated "
            "speedup %.2f, a change of length costs %.1f steps, layers: %s.",
            mean,
            steps,
            ", ".join(f"{length}: {times}" for length, times in enumerate(new.chosen) if times),
            new.accepted,
            new.drafted,
            new.predicted,
            new.speedup / steps,
            self.ppow_window.changing.steps,
            ", ".join(counts.layers),
        )


def _only_decodes(scheduler_output: SchedulerOutput) -> bool:
    """Whether every request of a step has one token and its draft in it, and none is being prefilled."""
    verified = sum(map(len, scheduler_output.scheduled_spec_decode_tokens.values()))
    return (
        scheduler_output.total_num_scheduled_tokens == len(scheduler_output.num_scheduled_tokens) + verified
    )


class PPOWScheduler(AdaptiveWindow, Scheduler):
    """Synchronous scheduling, each step's draft length chosen by the window policy."""


class PPOWAsyncScheduler(AdaptiveWindow, AsyncScheduler):
    """Asynchronous scheduling: the length chosen is also that of the placeholders reserved for the next step."""
