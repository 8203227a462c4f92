"""When the window is adaptive, what vLLM is told then, and what is said and done where it cannot be."""

from __future__ import annotations

import dataclasses
import json
import logging
from types import SimpleNamespace

import pytest
from serving_pair import K, random_adapter
from serving_profile import PROFILE

from vllm_ppow import plugin
from vllm_ppow.acceptance import MILD_PRIOR
from vllm_ppow.artifact import ArtifactError
from vllm_ppow.compat import draft_window, profiling, seams, window, window_policy
from vllm_ppow.compat.window import TABLE
from vllm_ppow.config import PPOWOptions, PPOWServingError, parse_options
from vllm_ppow.cost_profile import COST_PROFILE_FILE, write_cost_profile
from vllm_ppow.traffic_window import TrafficWindow


@pytest.fixture(scope="module")
def adapter(pair, tmp_path_factory):
    return random_adapter(tmp_path_factory.mktemp("window"), "causal_lm", pair)


@pytest.fixture
def built(pair, adapter):
    """A function from options to vLLM's finished config."""
    from vllm.engine.arg_utils import EngineArgs

    plugin.register()

    def build(ppow=None, spec=None, **options):
        spec = {"method": "ppow", "model": str(adapter.directory), **(spec or {})}
        if ppow is not None:
            spec["ppow"] = ppow
        args = EngineArgs(str(pair.target), max_model_len=64, speculative_config=spec, **options)
        return args.create_engine_config()

    return build


@pytest.fixture
def log(caplog, monkeypatch):
    # Its first config sets up vLLM's loggers, and takes from ours what the line below gives them.
    monkeypatch.setattr("vllm.engine.arg_utils.configure_logging_if_needed", lambda config: None)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.INFO, logger="vllm.ppow.compat")
    return caplog


def is_adaptive(config) -> bool:
    return window.options_of(config.speculative_config) is not None


def warnings(log) -> list[str]:
    return [
        r.getMessage()
        for r in log.records
        if r.levelno >= logging.WARNING and "draft window" in r.getMessage()
    ]


def test_adaptive_is_the_default_and_names_the_scheduler(built, log):
    config = built(max_num_seqs=8)
    assert is_adaptive(config)
    assert config.scheduler_config.scheduler_cls == "vllm_ppow.scheduler.PPOWScheduler"
    table = config.speculative_config.num_speculative_tokens_per_batch_size
    assert [row[2] for row in table] == [3, 2, 1, 0]
    assert table[-1][1] == 8
    assert not warnings(log)


@pytest.mark.parametrize("heeds", [True, False])
def test_a_v2_runner_that_drafts_alike_in_every_step_has_a_fixed_window(built, log, monkeypatch, heeds):
    monkeypatch.setattr(window.v2_runner, "drafts_as_scheduled", lambda: heeds)
    config = built()
    config.scheduler_config.scheduler_cls = None
    monkeypatch.setattr(type(config), "use_v2_model_runner", True)
    window.attach(config)
    assert is_adaptive(config) is heeds
    assert (config.scheduler_config.scheduler_cls is not None) is heeds
    assert ["drafts as many tokens in every step" in text for text in warnings(log)] == [True] * (not heeds)


@pytest.mark.parametrize(("v2", "heeds"), [(True, False), (True, True), (False, False)])
def test_a_draft_model_that_drafts_as_much_at_every_length_is_said(built, log, monkeypatch, v2, heeds):
    monkeypatch.setattr(window.v2_runner, "drafts_as_scheduled", lambda: True)
    monkeypatch.setattr(window.v2_runner, "shortens_draft_models", lambda: heeds)
    config = built()
    monkeypatch.setattr(type(config), "use_v2_model_runner", v2)
    log.clear()
    window.attach(config)
    assert is_adaptive(config)
    assert ("save their verification only" in log.text) is (v2 and not heeds)


def test_asynchronous_scheduling_gets_the_asynchronous_one(built):
    config = built()
    config.scheduler_config.async_scheduling = True  # a CPU forbids it
    window.attach(config)
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    from vllm_ppow.scheduler import PPOWAsyncScheduler

    assert config.scheduler_config.get_scheduler_cls() is PPOWAsyncScheduler
    assert issubclass(PPOWAsyncScheduler, AsyncScheduler)


def test_the_switch(built):
    config = built({"window": "fixed"})
    assert not is_adaptive(config)
    assert config.scheduler_config.scheduler_cls is None
    assert getattr(config.speculative_config, TABLE) is None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"},
            "--scheduler-cls names another scheduler",
        ),
        ({"data_parallel_size": 2}, "data-parallel ranks must draft alike"),
    ],
)
def test_what_forbids_it_is_said_once_and_the_window_is_fixed(built, log, options, reason):
    config = built(**options)
    assert not is_adaptive(config)
    assert getattr(config.speculative_config, TABLE) is None
    assert config.scheduler_config.scheduler_cls == options.get("scheduler_cls")
    (warning,) = warnings(log)
    assert reason in warning
    assert "stays fixed" in warning


def test_a_drafter_that_makes_all_tokens_in_one_pass_has_a_fixed_window(built, log):
    config = built(spec={"parallel_drafting": True})
    assert not is_adaptive(config)
    assert getattr(config.speculative_config, TABLE) is None
    (warning,) = warnings(log)
    assert "parallel_drafting" in warning


def test_a_table_of_the_users_is_followed(built, log):
    config = built(spec={TABLE: [[1, 2, 3], [3, 8, 1]]})
    assert not is_adaptive(config)
    assert config.scheduler_config.scheduler_cls is None
    assert config.speculative_config.num_speculative_tokens_per_batch_size == [(1, 2, 3), (3, 8, 1)]
    assert "follows the table" in log.text


@pytest.mark.parametrize("method", [name for name, _ in window.SCHEDULER_SEAMS])
def test_a_vllm_without_the_window_hook_serves_with_a_fixed_window_and_one_warning(
    built, log, monkeypatch, method
):
    from vllm.v1.core.sched.scheduler import Scheduler

    def renamed(self, something_else):
        """What a future vLLM may have there."""

    monkeypatch.setattr(Scheduler, method, renamed)
    config = built()
    assert not is_adaptive(config)
    assert config.scheduler_config.scheduler_cls is None
    (warning,) = warnings(log)
    assert f"Scheduler.{method} as method ppow needs it" in warning
    assert config.speculative_config.num_speculative_tokens == K


def test_a_vllm_whose_steps_carry_no_draft_length(monkeypatch):
    from dataclasses import dataclass

    from vllm.v1.core.sched import output

    @dataclass
    class SchedulerOutput:
        """Without num_spec_tokens_to_schedule."""

    monkeypatch.setattr(output, "SchedulerOutput", SchedulerOutput)
    with pytest.raises(seams.SeamMissingError, match=r"SchedulerOutput\.num_spec_tokens_to_schedule"):
        window.require()


def test_the_seams_are_there():
    window.require()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": "adaptiv"}, r"window must be one of \['auto', 'adaptive', 'fixed'\], got 'adaptiv'"),
        ({"min_tokens": -1}, "min_tokens must be an integer >= 0, got -1"),
        ({"min_tokens": True}, "min_tokens must be an integer >= 0, got True"),
        ({"min_tokens": "2"}, "min_tokens must be an integer >= 0, got '2'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ArtifactError, match=message):
        parse_options(options)


def test_min_tokens_is_at_most_the_maximum(built):
    with pytest.raises(ArtifactError, match=rf"at most num_speculative_tokens \({K}\), got 4"):
        built({"min_tokens": 4})
    config = built({"min_tokens": 2}, max_num_seqs=4)
    assert [row[2] for row in config.speculative_config.num_speculative_tokens_per_batch_size] == [3, 2]
    assert PPOWOptions().min_tokens == 0


def test_options_reach_the_policy(built):
    policy = window_policy.build_window(built({"min_tokens": 1, "per_request": False}))
    assert (policy.lengths, policy.counts.layers) == ((1, 2, 3), ("step",))
    policy = window_policy.build_window(built({"min_tokens": 1, "per_request": True}))
    assert (policy.lengths, policy.counts.layers) == ((1, 3), ("step", "request"))


@pytest.fixture
def profiled(built, adapter):
    """A function from changes to the policy, built beside a cost profile that holds here but for them."""
    file = adapter.directory / COST_PROFILE_FILE

    def build(window_options=None, **changes):
        config = built(*([] if window_options is None else [window_options]))
        trained = adapter.config
        here = {**profiling.machine(config), "adapter_fingerprint": trained.adapter_fingerprint}
        here["target_fingerprint"] = trained.target.fingerprint
        write_cost_profile(adapter.directory, dataclasses.replace(PROFILE, **{**here, **changes}))
        return window_policy.build_window(config)

    yield build
    file.unlink(missing_ok=True)


def test_costs_and_acceptance_start_from_the_profile(profiled, log):
    policy = profiled()
    assert policy.cost.step_seconds(4, 2, 256) == pytest.approx(PROFILE.step_seconds(4, 2, 64))
    assert policy.acceptance.survival()[:3] == pytest.approx([0.8, 0.6, 0.4])
    assert "cost profile, corrected while serving" in log.text
    assert not warnings(log)


def test_where_drafts_are_trimmed_costs_are_learned_and_only_acceptance_starts_from_the_profile(
    profiled, log
):
    """A profile has timed drafts that are verified whole: by it a trimmed one would hardly ever pay."""
    policy = profiled({"per_request": True})
    assert policy.cost.wanted(4, policy.lengths) == [K, 0]
    assert policy.acceptance.survival()[:3] == pytest.approx([0.8, 0.6, 0.4])
    assert "(acceptance and prices of the cost profile, step times learned while serving)" in log.text
    assert profiled({"per_request": False}).cost.wanted(4, (0, K)) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"device": "another"}, "device"),
        ({"vllm_version": "0.1"}, "vllm_version"),
        ({"full_graphs": True}, "full_graphs"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype"),
        ({"adapter_fingerprint": "sha256:" + "0" * 64}, "adapter_fingerprint"),
        ({"target_fingerprint": "sha256:" + "0" * 64}, "target_fingerprint"),
    ],
)
def test_a_profile_of_another_set_up_is_not_used(profiled, log, changes, said):
    policy = profiled(**changes)
    assert policy.acceptance.survival()[0] == pytest.approx(MILD_PRIOR)
    assert "learned while serving" in log.text
    assert "is of another set-up" in log.text
    assert f"{said} " in log.text


def test_a_broken_profile_is_said_and_not_used(built, adapter, log):
    file = adapter.directory / COST_PROFILE_FILE
    file.write_text("{")
    try:
        policy = window_policy.build_window(built())
    finally:
        file.unlink()
    assert policy.acceptance.survival()[0] == pytest.approx(MILD_PRIOR)
    assert "The draft window learns costs while serving: " in log.text


def test_the_scheduler_alone_is_refused(built):
    with pytest.raises(PPOWServingError, match="leave scheduler_cls out"):
        window_policy.build_window(built({"window": "fixed"}))


def test_with_captured_graphs_only_declared_lengths_and_the_shortest_are_drafted(built):
    from vllm.config import CUDAGraphMode

    config = built({"per_request": False}, max_num_seqs=2)
    assert window_policy.build_window(config).lengths == (0, 1, 2, 3)
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    assert window_policy.build_window(config).lengths == (0, 3)


def test_the_config_travels_to_the_engine_core(built):
    import pickle

    config = pickle.loads(pickle.dumps(built()))
    assert is_adaptive(config)
    assert config.scheduler_config.get_scheduler_cls().__name__ == "PPOWScheduler"
    options = window.options_of(config.speculative_config)
    assert json.dumps(options) == '{"min_tokens": 0, "per_request": false}'


# ---------------------------------------------------------------- lengths by request


def test_drafts_are_trimmed_by_request_on_the_synchronous_v1_runner(built):
    config = built({"per_request": True})
    options = window.options_of(config.speculative_config)
    assert options == {"min_tokens": 0, "per_request": True}
    assert window.options_of(built().speculative_config)["per_request"] is False


def test_unasked_drafts_are_trimmed_by_request_where_the_adapter_has_a_cost_profile(profiled, built, log):
    assert profiled().counts.layers == ("step",), "the config was made before the profile was measured"
    assert "it needs a cost profile, and the adapter has none; ppow profile measures one." in log.text
    policy = profiled()
    assert isinstance(policy, TrafficWindow)
    assert policy.counts.layers == ("step", "request")
    assert "per step and, while most requests are greedy, per request" in log.text
    assert "cost profile, corrected while serving; step times of trimmed drafts are learned" in log.text
    assert profiled({"per_request": False}).counts.layers == ("step",)


def test_a_profile_that_does_not_hold_trims_nothing_unasked_and_is_named_once(profiled, built, log):
    profiled(device="another")
    log.clear()
    policy = window_policy.build_window(built())
    assert policy.counts.layers == ("step",)
    assert "it needs a cost profile, and the adapter's cannot be used here." in log.text
    assert log.text.count("of another set-up (device") == 1


def test_unasked_sampled_requests_are_drafted_for_by_the_profile_and_not_trimmed(profiled):
    """At temperature 1 trimming was measured to cost more than it gains."""
    profiled()
    policy = profiled()
    policy.choose(4, 256, True, 4)
    assert not policy.by_request
    assert policy._whole.lengths == tuple(range(K + 1))
    assert policy._whole.cost.wanted(4, policy._whole.lengths) == [], "the profile has timed them"
    asked = profiled({"per_request": True})
    asked.choose(4, 256, True, 4)
    assert asked.by_request


def test_unasked_no_gpu_waits_for_probabilities(profiled, built, log, monkeypatch):
    from vllm.platforms import current_platform

    profiled()
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    config = built()
    monkeypatch.undo()
    assert window.options_of(config.speculative_config)["per_request"] is False
    assert 'on a GPU "per_request": true asks for it' in log.text


@pytest.mark.parametrize(
    ("section", "field", "value", "reason"),
    [
        ("scheduler_config", "async_scheduling", True, "needs synchronous scheduling"),
        ("parallel_config", "world_size", 2, "ranks would have to agree"),
        ("speculative_config", "use_local_argmax_reduction", True, "does not give its probabilities"),
    ],
)
def test_where_drafts_are_not_trimmed_by_request(built, log, section, field, value, reason):
    config = built({"per_request": True})
    setattr(getattr(config, section), field, value)
    window.attach(config)
    assert window.options_of(config.speculative_config)["per_request"] is False
    assert "not trimmed by request: " in log.text
    assert reason in log.text
    assert window_policy.build_window(config).counts.layers == ("step",)


@pytest.mark.parametrize("method", [name for name, _ in draft_window.SEAMS])
def test_a_runner_without_the_drafting_hook_is_served_step_by_step(built, log, monkeypatch, method):
    from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

    def renamed(self, something_else):
        """What a future vLLM may have there."""

    monkeypatch.setattr(SpecDecodeBaseProposer, method, renamed)
    config = built({"per_request": True})
    assert is_adaptive(config)
    assert window.options_of(config.speculative_config)["per_request"] is False
    assert f"SpecDecodeBaseProposer.{method} as method ppow needs it" in log.text


# ---------------------------------------------------------------- vLLM's own trimming of verification (no GPU here)


def accelerator_config(**changes):
    """What `verification` looks at, as a GPU server of the V2 runner with full graphs has it."""
    values = {"enable": False, "v2": True, "graphs": True, "lora": None, "pipeline": 1, **changes}
    mode = SimpleNamespace(has_full_cudagraphs=lambda: values["graphs"])
    return SimpleNamespace(
        speculative_config=SimpleNamespace(**{window.VERIFICATION: values["enable"]}),
        use_v2_model_runner=values["v2"],
        compilation_config=SimpleNamespace(cudagraph_mode=mode),
        lora_config=values["lora"],
        parallel_config=SimpleNamespace(pipeline_parallel_size=values["pipeline"]),
    )


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, 'as well: "enable_adaptive_verification": true'),
        ({"enable": True}, "trims verification by request"),
        ({"v2": False}, "needs the V2 model runner"),
        ({"graphs": False}, "needs full CUDA graphs"),
        ({"lora": object()}, "does not go with LoRA"),
        ({"pipeline": 2}, "does not go with pipeline parallelism"),
        ({"enable": None}, "this vLLM has none"),
    ],
)
def test_what_is_said_of_vllms_own_trimming(changes, text):
    assert text in window.verification(accelerator_config(**changes))


def test_vllm_has_the_switch_and_the_conditions_that_we_name():
    from dataclasses import fields
    from inspect import getsource

    from vllm.config import SpeculativeConfig, VllmConfig

    if window.VERIFICATION not in {field.name for field in fields(SpeculativeConfig)}:
        pytest.skip("this vLLM does not trim verification (< 0.32)")
    conditions = getsource(VllmConfig._validate_adaptive_verification)
    for name in ("lora_config", "has_full_cudagraphs()", "pipeline_parallel_size > 1"):
        assert name in conditions


def test_maxima_are_judged_by_what_they_bring_where_vllm_trims(built):
    config = built({"per_request": False})
    setattr(config.speculative_config, window.VERIFICATION, True)
    policy = window_policy.build_window(config)
    assert policy.trimmed is not None
    assert (policy.lengths, policy.counts.layers) == ((0, K), ("step", "verification"))
