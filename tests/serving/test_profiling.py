"""Timing and steering on stand-ins for vLLM's objects, both runners; on vLLM itself in tests/e2e/test_profile.py."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from vllm_ppow.compat import profiling, seams, v2_runner
from vllm_ppow.compat.profiling import StepProfiler, verified_length

CPU = torch.device("cpu")
TARGET, SAMPLE, DRAFT = 0.02, 0.01, 0.03  # seconds


class V1Runner:
    device = CPU

    def execute_model(self, scheduler_output, intermediate_tensors=None):
        time.sleep(TARGET)

    def sample_tokens(self, grammar_output):
        time.sleep(SAMPLE)
        self.propose_draft_token_ids()
        return "output"

    def propose_draft_token_ids(self):
        time.sleep(DRAFT)


class Speculator:
    def propose(self):
        time.sleep(DRAFT)


class V2Runner:
    device = CPU

    def __init__(self):
        self.speculator = Speculator()

    execute_model = V1Runner.execute_model

    def sample_tokens(self, grammar_output):
        time.sleep(SAMPLE)
        self.speculator.propose()
        return "output"


class Scheduler:
    def _update_after_schedule(self, scheduler_output):
        self.seen = scheduler_output.num_spec_tokens_to_schedule


def scheduled(tokens, drafts, length=2):
    return SimpleNamespace(
        num_scheduled_tokens=tokens, scheduled_spec_decode_tokens=drafts, num_spec_tokens_to_schedule=length
    )


DECODING = scheduled({"a": 3, "b": 3}, {"a": [1, 2], "b": [3, 4]})


@pytest.mark.parametrize("make", [V1Runner, V2Runner])
def test_drafting_is_told_from_the_target(make, monkeypatch):
    monkeypatch.setattr(v2_runner, "drafts_as_scheduled", lambda: True)
    worker = SimpleNamespace(model_runner=make())
    profiling.start_timing(worker)
    for _ in range(2):
        worker.model_runner.execute_model(DECODING)
        assert worker.model_runner.sample_tokens(None) == "output"
    passes = profiling.take_passes(worker)
    assert profiling.take_passes(worker) == []
    assert [(one.batch, one.draft_length, one.next_draft_length) for one in passes] == [(2, 2, 2)] * 2
    for one in passes:
        assert one.draft_seconds >= DRAFT
        assert one.target_seconds >= TARGET + SAMPLE
    profiling.stop_timing(worker)
    assert type(worker.model_runner) is make
    assert type(getattr(worker.model_runner, "speculator", Speculator())) is Speculator


def test_a_v2_runner_that_drafts_alike_in_every_step_is_not_measured(monkeypatch):
    monkeypatch.setattr(v2_runner, "drafts_as_scheduled", lambda: False)
    worker = SimpleNamespace(model_runner=V2Runner())
    with pytest.raises(
        seams.SeamMissingError, match=r"as many tokens in every step.*set VLLM_USE_V2_MODEL_RUNNER=0"
    ):
        profiling.start_timing(worker)
    assert type(worker.model_runner) is V2Runner


def test_which_steps_decode():
    assert verified_length(DECODING) == 2
    assert verified_length(scheduled({"a": 1}, {})) == 0
    assert verified_length(scheduled({"a": 3, "b": 1}, {"a": [1, 2]})) is None  # lengths differ
    assert verified_length(scheduled({"a": 3, "b": 8}, {"a": [1, 2]})) is None  # b reads its prompt


def test_a_runner_that_drafts_elsewhere_is_refused():
    class Other:
        device = CPU
        execute_model, sample_tokens = V1Runner.execute_model, V1Runner.sample_tokens

    with pytest.raises(seams.SeamMissingError, match=r"has no .*propose_draft_token_ids"):
        profiling.start_timing(SimpleNamespace(model_runner=Other()))


class FakeLLM:
    """One engine core in this process, two workers."""

    def __init__(self, engine_core):
        self.workers = [SimpleNamespace(model_runner=V1Runner()) for _ in range(2)]
        self.llm_engine = SimpleNamespace(engine_core=engine_core)

    def collective_rpc(self, method):
        return [method(worker) for worker in self.workers]


def test_an_engine_is_steered_timed_and_left_as_it_was():
    core = SimpleNamespace(scheduler=Scheduler())
    llm = FakeLLM(SimpleNamespace(engine_core=core))

    def step():
        core.scheduler._update_after_schedule(DECODING)
        for worker in llm.workers:
            worker.model_runner.execute_model(DECODING)
            worker.model_runner.sample_tokens(None)
        return "outputs", True

    core.step_fn = step
    with StepProfiler(llm, 5) as profiler:
        assert core.step_fn() == ("outputs", True)
        assert core.scheduler.seen == 5
        profiler.draft_length = 1
        core.step_fn()
        assert core.scheduler.seen == 1
        passes, steps = profiler.take()
        assert [one.next_draft_length for one in passes] == [5, 1]
        assert len(steps) == 2
        assert min(steps) >= 2 * (TARGET + SAMPLE + DRAFT)
        core.scheduler._update_after_schedule(scheduled({}, {}, 7))
        assert core.scheduler.seen == 7  # a step without requests is nobody's business
    assert (core.step_fn, type(core.scheduler)) == (step, Scheduler)
    assert {type(worker.model_runner) for worker in llm.workers} == {V1Runner}


def test_of_several_workers_the_slowest_counts():
    fast, slow = (profiling.PassTime(1, 2, 2, *seconds) for seconds in ((1.0, 4.0), (3.0, 2.0)))
    assert profiling._slowest((fast, slow)) == profiling.PassTime(1, 2, 2, 3.0, 4.0)


def test_an_engine_in_another_process_is_refused():
    with pytest.raises(seams.SeamMissingError, match="VLLM_ENABLE_V1_MULTIPROCESSING=0"):
        StepProfiler(FakeLLM(SimpleNamespace()), 1)
