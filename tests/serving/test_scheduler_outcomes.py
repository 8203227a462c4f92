"""What the window learns of each step from a scheduler: refused tokens are rejections, a step's time is its own.

vLLM's part is a stand-in that does what its schedulers do with drafts, so that both kinds of scheduling and both model
runners can be asked here; tests/e2e has the real ones.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from simulated_serving import new_window

from vllm_ppow import scheduler as scheduler_module
from vllm_ppow.scheduler import AdaptiveWindow

K = 4


class Grammar:
    """Stands for vLLM's scheduler: drafts lose what comes from the first token on that the grammar refuses."""

    def __init__(self) -> None:
        self.vllm_config = SimpleNamespace(use_v2_model_runner=False)
        self.num_spec_tokens = K
        self.requests = {}
        self.valid = K  # tokens of every draft that the grammar lets through

    def _update_after_schedule(self, scheduler_output) -> None:
        pass

    def update_draft_token_ids(self, draft_token_ids) -> None:
        for req_id, tokens in zip(draft_token_ids.req_ids, draft_token_ids.draft_token_ids, strict=True):
            self.requests[req_id].spec_token_ids = tokens[: self.valid]

    def make_spec_decoding_stats(self, spec_decoding_stats, **counts):
        return counts

    def update_from_output(self, scheduler_output, model_runner_output) -> None:
        for req_id in model_runner_output:  # requests that end
            del self.requests[req_id]


class Scheduler(AdaptiveWindow, Grammar):
    pass


@pytest.fixture
def scheduler(monkeypatch):
    window = new_window(K)
    monkeypatch.setattr(scheduler_module, "build_window", lambda config: window)
    monkeypatch.setattr(scheduler_module.draft_room, "longest_drafted", lambda config: None)
    monkeypatch.setattr(
        scheduler_module,
        "ReportWriter",
        lambda config: SimpleNamespace(write=lambda counts: None, close=lambda: None),
    )
    made = Scheduler()
    made.requests = {"r": request()}
    return made


def request(**more) -> SimpleNamespace:
    values = {"num_computed_tokens": 100, "is_prefill_chunk": False, "spec_token_ids": [], **more}
    return SimpleNamespace(is_finished=lambda: False, **values)


def drafts(length: int) -> SimpleNamespace:
    return SimpleNamespace(req_ids=["r"], draft_token_ids=[[7] * length])


def verify(scheduler, drafted: int, accepted: int, invalid: dict | None = None) -> None:
    scheduler.make_spec_decoding_stats(None, drafted, accepted, invalid, "r")


def step(scheduler, length: int, verified: int, prefill: int = 0, ended=()) -> None:
    """One step that verifies `verified` tokens a request and drafts `length`."""
    scheduled = dict.fromkeys(scheduler.requests, 1 + verified)
    output = SimpleNamespace(
        num_scheduled_tokens=scheduled,
        num_spec_tokens_to_schedule=length,
        scheduled_spec_decode_tokens={req_id: [7] * verified for req_id in scheduled},
        total_num_scheduled_tokens=sum(scheduled.values()) + prefill,
    )
    scheduler.update_from_output(output, ended)


def first_acceptance(scheduler) -> float:
    scheduler.ppow_window.choose(1)  # learns from the step's outcomes
    return scheduler.ppow_window.acceptance.conditional()[0]


# ---------------------------------------------------------------- what a grammar refuses


def test_asynchronous_scheduling_whole_drafts_that_a_grammar_refuses_are_rejections(scheduler):
    for _ in range(200):
        verify(scheduler, K, 0, {"r": K})
    assert first_acceptance(scheduler) < 0.05
    counts = scheduler.ppow_window.counts
    assert (counts.drafts, counts.drafted, counts.accepted) == (200, 0, 0), "as vLLM counts"


def test_asynchronous_scheduling_a_draft_that_is_cut_is_rejected_there(scheduler):
    for _ in range(300):
        verify(scheduler, K, 2, {"r": 2})
    first_acceptance(scheduler)
    conditional = scheduler.ppow_window.acceptance.conditional()
    assert conditional[0] > 0.9
    assert conditional[1] > 0.9
    assert conditional[2] < 0.1
    assert scheduler.ppow_window.counts.drafted == 600


@pytest.mark.parametrize("valid", [0, 2])
def test_synchronous_scheduling_counts_them_as_well(scheduler, valid):
    scheduler._last_scheduled = K
    scheduler.valid = valid
    for _ in range(300):
        scheduler.update_draft_token_ids(drafts(K))
        if valid:
            verify(scheduler, valid, valid)  # what is left is accepted, always
    first_acceptance(scheduler)
    conditional = scheduler.ppow_window.acceptance.conditional()
    assert conditional[valid] < 0.1
    assert all(share > 0.9 for share in conditional[:valid])
    assert scheduler.ppow_window.counts.drafted == 300 * valid


def test_a_draft_cut_again_for_room_never_came_to_the_refused_token(scheduler):
    scheduler._last_scheduled = K
    scheduler.valid = 2
    for _ in range(300):
        scheduler.update_draft_token_ids(drafts(K))
        verify(scheduler, 1, 1)
    first_acceptance(scheduler)
    assert scheduler.ppow_window.acceptance.conditional()[2] > 0.5, "nothing is known of it"


def test_drafts_that_vllm_throws_away_are_no_outcome(scheduler):
    scheduler._last_scheduled, scheduler.valid = K, 0
    for given in (request(is_prefill_chunk=True), None):
        scheduler.requests = {"r": given} if given else {"r": request()}
        if given is None:
            scheduler.requests["r"].is_finished = lambda: True
        scheduler.update_draft_token_ids(drafts(K))
    assert scheduler.ppow_window.counts.drafts == 0


# ---------------------------------------------------------------- whose time a step's time is


@pytest.fixture
def timed(scheduler, monkeypatch):
    """What the window is told of steps: (batch, draft length, context)."""
    told = []
    monkeypatch.setattr(
        scheduler.ppow_window,
        "observe_step",
        lambda seconds, batch, length, context, accepted: told.append((batch, length, context)),
    )
    return told


@pytest.mark.parametrize(("drafts_late", "expected"), [(False, 2), (True, 1)])
def test_after_a_prefill_the_v2_runners_next_step_holds_its_drafting(scheduler, timed, drafts_late, expected):
    scheduler._drafts_late = drafts_late
    step(scheduler, K, K, prefill=1000)
    step(scheduler, K, K)
    step(scheduler, K, K)
    assert len(timed) == expected


def test_the_context_is_that_of_requests_that_end_in_the_step_too(scheduler, timed):
    step(scheduler, K, K)
    step(scheduler, K, K, ended=["r"])
    assert timed == [(1, K, 100)]
