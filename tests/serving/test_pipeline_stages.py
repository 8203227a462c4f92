"""Pipeline parallelism: refused where vLLM cannot draft in stages, and the stage that drafts proves the merge.

Left out: an engine with stages, for which there is no model runner on a CPU.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
from serving_pair import random_adapter

from vllm_ppow import plugin
from vllm_ppow.compat import engine_args, window, worker
from vllm_ppow.config import PPOWServingError


@pytest.fixture(scope="module")
def spec(pair, tmp_path_factory):
    adapter = random_adapter(tmp_path_factory.mktemp("stages"), "causal_lm", pair)
    return {"method": "ppow", "model": str(adapter.directory)}


def build(pair, spec, **options):
    from vllm.engine.arg_utils import EngineArgs

    plugin.register()
    args = EngineArgs(str(pair.target), max_model_len=64, speculative_config=spec, **options)
    return args.create_engine_config()


def test_the_v1_model_runner_is_refused_with_a_sentence(pair, spec):
    options = {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}
    with pytest.raises(
        PPOWServingError, match="cannot draft in 2 pipeline stages: give --tensor-parallel-size"
    ):
        build(pair, spec, **options)
    build(pair, None, **options)  # without speculation it is vLLM's own matter


def test_the_v2_model_runner_is_not(pair, spec):
    config = SimpleNamespace(
        speculative_config=build(pair, spec).speculative_config,
        parallel_config=SimpleNamespace(pipeline_parallel_size=2),
        use_v2_model_runner=True,
    )
    engine_args._check_stages(config)
    config.use_v2_model_runner = False
    with pytest.raises(PPOWServingError):
        engine_args._check_stages(config)


def test_the_window_is_fixed_there(pair, spec, monkeypatch, caplog):
    """The time between two steps is none of either, where stages work on both."""
    monkeypatch.setattr(engine_args, "_check_stages", lambda config: None)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    config = build(pair, spec, pipeline_parallel_size=2, distributed_executor_backend="mp")
    assert window.options_of(config.speculative_config) is None
    assert "stays fixed at its maximum: pipeline stages" in caplog.text


@pytest.mark.parametrize(("stages", "last", "drafts"), [(1, False, True), (2, True, True), (2, False, False)])
def test_the_last_stage_drafts(monkeypatch, stages, last, drafts):
    import vllm.distributed

    monkeypatch.setattr(vllm.distributed, "get_pp_group", lambda: SimpleNamespace(is_last_rank=last))
    config = SimpleNamespace(parallel_config=SimpleNamespace(pipeline_parallel_size=stages))
    assert worker.drafts_here(config) is drafts
