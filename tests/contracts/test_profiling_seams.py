"""What compat/profiling.py times and steers exists in the installed vLLM, with the shape we expect."""

from __future__ import annotations

import dataclasses
import importlib
import inspect

import pytest

from vllm_ppow.compat import seams, v2_runner


def source(module, owner, method, *parameters):
    return inspect.getsource(seams.find(module, owner, method, ("self", *parameters))[1])


V1 = ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner")
V2 = ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner")


@pytest.mark.parametrize("runner", [V1, V2])
def test_runners_execute_and_sample(runner):
    source(*runner, "execute_model", "scheduler_output")
    source(*runner, "sample_tokens", "grammar_output")


def test_v1_drafts_in_one_method_while_it_samples():
    assert "self.propose_draft_token_ids(" in source(*V1, "sample_tokens")
    text = source(*V1, "propose_draft_token_ids", "scheduler_output")
    assert "scheduler_output.num_spec_tokens_to_schedule" in text
    assert "speculator" not in inspect.getsource(
        seams.find(*V1, "__init__", ())[0]
    )  # how the runners are told apart


def test_v2_drafts_in_its_speculator_while_it_samples():
    """As many tokens as the scheduler says, or as many in every step: then the window is fixed (compat/window.py)."""
    text = source(*V2, "sample_tokens")
    assert text.count("self.speculator.propose(") == 1
    assert ("num_speculative_tokens=num_spec_tokens" in text) == v2_runner.drafts_as_scheduled()
    assert "self.speculator" in source(*V2, "__init__")


def test_whether_draft_models_heed_the_draft_length_is_read_from_their_code():
    """An EAGLE head's passes follow it; a draft model's do not yet: then the log says so (compat/window.py)."""
    if not v2_runner.drafts_as_scheduled():
        assert not v2_runner.shortens_draft_models()
        return
    speculators = "vllm.v1.worker.gpu.spec_decode"
    standalone = importlib.import_module(f"{speculators}.standalone_ar.speculator")
    dependent = importlib.import_module(f"{speculators}.target_dependent_ar.speculator")
    assert v2_runner.reads_draft_length(dependent.TargetDependentARSpeculator.propose)
    text = inspect.getsource(standalone.StandaloneARSpeculator.propose)
    assert v2_runner.shortens_draft_models() == (
        text.count("num_speculative_tokens") > 1
    )  # beside its parameter


def test_a_scheduler_output_carries_the_draft_length_before_it_is_used():
    from vllm.v1.core.sched.output import SchedulerOutput

    names = {field.name for field in dataclasses.fields(SchedulerOutput)}
    assert {
        "num_spec_tokens_to_schedule",
        "num_scheduled_tokens",
        "scheduled_spec_decode_tokens",
    } <= names
    for module, owner in (("scheduler", "Scheduler"), ("async_scheduler", "AsyncScheduler")):
        source(f"vllm.v1.core.sched.{module}", owner, "_update_after_schedule", "scheduler_output")
    text = source("vllm.v1.core.sched.scheduler", "Scheduler", "schedule")
    assert text.index("num_spec_tokens_to_schedule=") < text.index("self._update_after_schedule(")


def test_the_engine_core_steps_through_one_attribute():
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.core_client import InprocClient

    assert "self.step_fn = " in inspect.getsource(EngineCore.__init__)
    assert "self.engine_core.step_fn()" in inspect.getsource(InprocClient.get_output)


def test_lengths_of_a_ladder_are_all_read():
    from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

    from vllm_ppow.compat.profiling import draft_length_ladder

    lengths = (0, 1, 2, 4, 8)
    lookup = build_dynamic_sd_schedule_lookup(
        draft_length_ladder(lengths), vllm_max_batch_size=len(lengths), vllm_num_speculative_tokens=8
    )
    assert lookup[1:] == list(lengths)
