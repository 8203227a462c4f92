"""Every seam of vLLM that serving leans on exists in the installed vLLM, with the shape we expect.

When one of these fails after an upgrade of vLLM, look at the file of vllm_ppow/compat/ that the test names.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from typing import get_args

import pytest

from vllm_ppow.compat import engine_args, seams, worker


def original(module, owner, method):
    """The method as vLLM wrote it, whether or not it is wrapped in this process."""
    wrapped = seams._installed.get((module, owner, method))
    return wrapped or seams.find(module, owner, method, ())[1]


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


# ---------------------------------------------------------------- compat/engine_args.py


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("create_speculative_config", ["self", "target_model_config", "target_parallel_config"]),
        ("create_engine_config", ["self", "usage_context", "headless"]),
        ("add_cli_args", ["parser"]),
    ],
)
def test_engine_args_methods(method, expected):
    assert parameters(original("vllm.engine.arg_utils", "EngineArgs", method)) == expected


def test_short_flags_are_fields_of_engine_args():
    from vllm.engine.arg_utils import EngineArgs

    fields = {field.name: field.default for field in dataclasses.fields(EngineArgs)}
    assert {flag: fields[flag] for flag in engine_args._FLAGS} == dict.fromkeys(engine_args._FLAGS)
    assert {"download_dir", "speculative_config", "model"} <= set(fields)


def test_the_parser_checks_spec_method_against_choices():
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_ppow.plugin import register

    register()
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    assert isinstance(parser, argparse.ArgumentParser)
    action = parser._option_string_actions["--spec-method"]
    assert {"eagle3", "draft_model", "ppow"} <= set(action.choices)


def test_speculative_config_has_the_native_fields():
    from vllm.config import SpeculativeConfig
    from vllm.config import speculative as module

    fields = {field.name for field in dataclasses.fields(SpeculativeConfig)}
    assert {"method", "model", "num_speculative_tokens", "draft_load_config", "draft_sample_method"} <= fields
    assert {
        "target_model_config",
        "target_parallel_config",
        "draft_model_config",
        "draft_parallel_config",
    } <= fields
    assert set(get_args(module.DraftSampleMethod)) == {"greedy", "probabilistic"}
    assert "ppow" not in str(module.SpeculativeMethod)


# ---------------------------------------------------------------- compat/worker.py


@pytest.mark.parametrize(("module", "owner", "method", "expected"), worker.SEAMS)
def test_worker_methods(module, owner, method, expected):
    assert parameters(original(module, owner, method)) == list(expected)


# ---------------------------------------------------------------- compat/draft_loading.py


def test_configs_are_replaced_not_changed():
    from vllm.config.utils import replace

    assert parameters(replace)[:1] == ["dataclass_instance"]


# ---------------------------------------------------------------- loader.py


def test_default_loader():
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    assert parameters(register_model_loader) == ["load_format"]
    assert parameters(DefaultModelLoader.__init__) == ["self", "load_config"]
    assert parameters(DefaultModelLoader.get_all_weights) == ["self", "model_config", "model"]
    assert "self.get_all_weights(" in inspect.getsource(DefaultModelLoader.load_weights)


def test_load_config_carries_our_keys():
    from vllm.config.load import LoadConfig

    config = LoadConfig(load_format="ppow", model_loader_extra_config={"ppow_adapter": "x"})
    assert (config.load_format, config.model_loader_extra_config) == ("ppow", {"ppow_adapter": "x"})


# ---------------------------------------------------------------- metrics.py


def test_metric_objects():
    from vllm.v1.metrics.reader import Counter, Vector

    assert [field.name for field in dataclasses.fields(Counter)] == ["name", "labels", "value"]
    assert [field.name for field in dataclasses.fields(Vector)] == ["name", "labels", "values"]
