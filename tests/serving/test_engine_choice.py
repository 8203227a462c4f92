"""What is decided on vLLM's finished config: where sampled drafts are right, and windows that cost full graphs."""

from __future__ import annotations

import logging
import os
from types import SimpleNamespace

import pytest
from serving_pair import random_adapter

from vllm_ppow import plugin
from vllm_ppow.compat import engine_choice, profiling, v2_runner, window
from vllm_ppow.compat.capabilities import V2_RUNNER
from vllm_ppow.config import WINDOW_KEY, PPOWServingError


class Mode:
    """vLLM's CUDAGraphMode, as far as it is looked at."""

    def __init__(self, name):
        self.name = name

    def __bool__(self):
        return self.name != "NONE"

    def has_full_cudagraphs(self):
        return "FULL" in self.name


def config(*, v2=False, method="greedy", mode="FULL_AND_PIECEWISE", adaptive=True):
    """A finished VllmConfig; with a window that adapts the V1 runner has no full graphs, as vLLM has it."""
    if adaptive and not v2 and mode == "FULL_AND_PIECEWISE":
        mode = "PIECEWISE"
    extra = {WINDOW_KEY: {"min_tokens": 0, "per_request": False}} if adaptive else {}
    speculative = SimpleNamespace(
        draft_sample_method=method,
        draft_load_config=SimpleNamespace(model_loader_extra_config=extra),
        **{window.TABLE: [(1, 1, 1)] if adaptive else None},
    )
    return SimpleNamespace(
        use_v2_model_runner=v2,
        speculative_config=speculative,
        compilation_config=SimpleNamespace(cudagraph_mode=Mode(mode)),
    )


class Builder:
    """Stands in for vLLM: notes what it was asked for, and builds for the runner that the environment names."""

    def __init__(self, **facts):
        self.facts, self.asked = facts, []

    def __call__(self, changes):
        self.asked.append(changes)
        facts = dict(self.facts)
        if os.environ.get(V2_RUNNER) == "0":
            facts["v2"] = False
        return config(**facts, adaptive=changes.get("window") != "fixed")


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    """The environment variable is not set, and is as it was afterwards."""
    monkeypatch.setenv(V2_RUNNER, "")  # so that what the test leaves is undone
    del os.environ[V2_RUNNER]


@pytest.fixture
def biased(monkeypatch):
    monkeypatch.setattr(v2_runner, "draws_independently", lambda: False)


@pytest.fixture
def log(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    caplog.set_level(logging.INFO, logger="vllm.ppow.compat")
    return caplog


# ---------------------------------------------------------------- sampled drafts


def test_sampled_drafts_go_to_the_v1_runner_where_v2_would_change_the_output(biased, log):
    build = Builder(v2=True, method="probabilistic")
    settled = engine_choice.settle(build({}), "adaptive", build)
    assert not settled.use_v2_model_runner
    assert os.environ[V2_RUNNER] == "0"
    assert "#54282" in log.text


def test_a_runner_that_the_user_chose_is_not_overruled(biased, monkeypatch):
    monkeypatch.setenv(V2_RUNNER, "1")
    build = Builder(v2=True, method="probabilistic")
    with pytest.raises(PPOWServingError, match=r"=1 cannot serve sampled drafts.*without it, or give"):
        engine_choice.settle(build({}), "adaptive", build)


@pytest.mark.parametrize(
    "facts", [{"v2": True, "method": "greedy"}, {"v2": False, "method": "probabilistic"}]
)
def test_greedy_drafts_and_the_v1_runner_are_left_alone(biased, facts, log):
    build = Builder(**facts)
    first = build({})
    assert engine_choice.settle(first, "adaptive", build) is first
    assert V2_RUNNER not in os.environ
    assert not log.records


def test_a_v2_runner_that_draws_independently_serves_sampled_drafts(monkeypatch):
    monkeypatch.setattr(v2_runner, "draws_independently", lambda: True)
    build = Builder(v2=True, method="probabilistic")
    first = build({})
    assert engine_choice.settle(first, "auto", build) is first


# ---------------------------------------------------------------- full graphs


def test_a_window_that_costs_full_graphs_stays_fixed_unless_asked_for(log):
    build = Builder(v2=False)
    settled = engine_choice.settle(build({}), "auto", build)
    assert window.options_of(settled.speculative_config) is None
    assert settled.compilation_config.cudagraph_mode.has_full_cudagraphs()
    assert "would give up full CUDA graphs" in log.text

    build = Builder(v2=False)
    settled = engine_choice.settle(build({}), "adaptive", build)
    assert window.options_of(settled.speculative_config) is not None
    assert build.asked == [{}]


def test_both_at_once(biased):
    """0.26 with an adapter for sampled drafts: V1, and there a fixed window, for which full graphs are never lost."""
    build = Builder(v2=True, method="probabilistic")
    settled = engine_choice.settle(build({}), "auto", build)
    assert (settled.use_v2_model_runner, window.options_of(settled.speculative_config)) == (False, None)
    assert build.asked == [{}, {"window": "fixed"}]


@pytest.mark.parametrize("facts", [{"v2": True}, {"v2": False, "mode": "NONE"}])
def test_where_nothing_is_given_up_the_window_adapts_and_nothing_is_built_again(facts):
    build = Builder(**facts)
    first = build({})
    assert engine_choice.settle(first, "auto", build) is first
    assert build.asked == [{}]


def test_graphs_that_the_user_gave_up_are_no_reason(log):
    """PIECEWISE with either window: the last config built is the adaptive one."""
    build = Builder(v2=False, mode="PIECEWISE")
    settled = engine_choice.settle(build({}), "auto", build)
    assert window.options_of(settled.speculative_config) is not None
    assert build.asked == [{}, {"window": "fixed"}, {}]
    assert not log.records


def test_the_profile_knows_graphs_that_were_given_up():
    assert [profiling.lacks_full_graphs(config(adaptive=adaptive)) for adaptive in (True, False)] == [
        True,
        False,
    ]
    assert not profiling.lacks_full_graphs(config(v2=True))
    assert not profiling.lacks_full_graphs(config(mode="NONE"))


# ---------------------------------------------------------------- through vLLM's own EngineArgs


@pytest.fixture(scope="module")
def adapter(pair, tmp_path_factory):
    return random_adapter(tmp_path_factory.mktemp("choice"), "causal_lm", pair)


@pytest.fixture
def args(pair, adapter):
    """vLLM's arguments for method ppow, asked for by flags."""
    from vllm.engine.arg_utils import EngineArgs

    plugin.register()
    return EngineArgs(
        str(pair.target),
        max_model_len=64,
        spec_method="ppow",
        spec_model=str(adapter.directory),
        spec_tokens=2,
    )


def test_a_config_built_again_is_what_the_arguments_say_from_then_on(args, monkeypatch):
    seen = []

    def settle(config, option, build):
        seen.append((option, window.options_of(config.speculative_config) is not None))
        return build({"window": "fixed"})

    monkeypatch.setattr(engine_choice, "settle", settle)
    config = args.create_engine_config()
    assert seen == [("auto", True)]
    assert config.speculative_config.num_speculative_tokens == 2
    assert window.options_of(config.speculative_config) is None
    assert config.scheduler_config.scheduler_cls is None
    again = args.create_engine_config()  # as vLLM does for a second engine
    assert window.options_of(again.speculative_config) is None
    assert seen == [("auto", True)]


def test_a_second_config_of_the_same_arguments_has_the_window_too(args):
    assert window.options_of(args.create_engine_config().speculative_config) is not None
    again = args.create_engine_config()
    assert again.scheduler_config.scheduler_cls == "vllm_ppow.scheduler.PPOWScheduler"


def test_a_second_config_of_the_same_arguments_keeps_sampled_drafts_from_a_runner_that_changes_the_output(
    args, monkeypatch
):
    monkeypatch.setenv(V2_RUNNER, "")  # so that it is as it was at the end
    monkeypatch.delenv(V2_RUNNER)
    monkeypatch.setattr(engine_choice, "_changes_output", lambda config: os.environ.get(V2_RUNNER) != "0")
    for _ in range(3):
        config = args.create_engine_config()
        assert os.environ[V2_RUNNER] == "0"
        assert config.scheduler_config.scheduler_cls == "vllm_ppow.scheduler.PPOWScheduler"
    engine_choice.forget()
    assert V2_RUNNER not in os.environ


def test_the_environment_is_put_right_before_every_engine(args, monkeypatch):
    monkeypatch.setattr(engine_choice, "_chosen_here", True)
    monkeypatch.setenv(V2_RUNNER, "0")
    args.create_engine_config()
    assert V2_RUNNER not in os.environ
