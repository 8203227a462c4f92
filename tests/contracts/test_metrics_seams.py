"""What our metrics lean on exists in the installed vLLM: see vllm_ppow/metrics_logger.py and window_report.py."""

from __future__ import annotations

import dataclasses
import inspect

import pytest


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_stat_loggers_are_made_and_called_as_ours_is():
    from vllm.v1.metrics.loggers import AggregateStatLoggerBase, StatLoggerBase, StatLoggerManager

    from vllm_ppow.metrics_logger import PPOWStatLogger

    assert parameters(AggregateStatLoggerBase.__init__) == ["self", "vllm_config", "engine_indexes"]
    record = parameters(StatLoggerBase.record)
    assert record == ["self", "scheduler_stats", "iteration_stats", "mm_cache_stats", "engine_idx"]
    assert parameters(PPOWStatLogger.record)[: len(record)] == record
    assert not PPOWStatLogger.__abstractmethods__
    source = inspect.getsource(StatLoggerManager.__init__)
    assert "vllm_config=vllm_config" in source
    assert "engine_indexes=self.engine_indexes" in source


def test_an_error_of_a_stat_logger_would_stop_vllm():
    """Why ours swallows its own; when this fails, vLLM has learned to."""
    from vllm.v1.metrics.loggers import StatLoggerManager

    assert "except" not in inspect.getsource(StatLoggerManager)


def test_plugins_of_any_group_are_filtered_by_name_and_may_fail_to_load():
    from vllm.plugins import STAT_LOGGER_PLUGINS_GROUP, load_plugins_by_group

    assert STAT_LOGGER_PLUGINS_GROUP == "vllm.stat_logger_plugins"
    source = inspect.getsource(load_plugins_by_group)
    assert "plugin.name in allowed_plugins" in source
    assert "except Exception" in source


def test_a_step_says_how_many_drafts_reached_each_position():
    from vllm.v1.metrics.stats import SchedulerStats
    from vllm.v1.spec_decode.metrics import SpecDecodingStats

    assert "spec_decoding_stats" in {field.name for field in dataclasses.fields(SchedulerStats)}
    stats = SpecDecodingStats.new(3)
    stats.observe_draft(2, 1)
    stats.observe_draft(3, 0)
    assert (stats.num_drafts, stats.num_draft_tokens_per_pos) == (2, [2, 2, 1])


def test_messages_drop_fields_that_vllm_does_not_know():
    """Why the window's counts take a way of their own."""
    import msgspec
    from vllm.v1.metrics.stats import SchedulerStats

    encoded = msgspec.msgpack.encode({"num_running_reqs": 2, "ppow": [1]})
    decoded = msgspec.msgpack.decode(encoded, type=SchedulerStats)
    assert decoded.num_running_reqs == 2
    assert not hasattr(decoded, "ppow")


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ("VllmConfig", {"instance_id"}),
        ("ParallelConfig", {"data_parallel_index", "_api_process_rank", "_api_process_count"}),
        ("ModelConfig", {"served_model_name"}),
    ],
)
def test_configs_tell_servers_and_engines_apart(config, names):
    import vllm.config

    assert names <= {field.name for field in dataclasses.fields(getattr(vllm.config, config))}


def test_sockets_lie_where_the_environment_says():
    import vllm.envs

    assert "VLLM_RPC_BASE_PATH" in vllm.envs.environment_variables


def test_several_api_servers_share_a_directory_with_the_engines():
    from vllm.entrypoints.cli import serve

    source = inspect.getsource(serve.run_multi_api_server)
    assert source.index("setup_multiprocess_prometheus()") < source.index("launch_core_engines(")


def test_engines_shut_their_scheduler_down():
    from vllm.v1.engine.core import EngineCore

    assert "self.scheduler.shutdown()" in inspect.getsource(EngineCore.shutdown)
