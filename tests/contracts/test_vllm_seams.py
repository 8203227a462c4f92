"""Every seam of vLLM that serving leans on exists in the installed vLLM, with the shape we expect.

When one of these fails after an upgrade of vLLM, look at the file of vllm_ppow/compat/ that the test names.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from typing import get_args

import pytest
import torch

from vllm_ppow.compat import draft_lora, draft_room, engine_args, seams, worker


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


# ---------------------------------------------------------------- compat/draft_room.py


def test_the_v1_runner_asks_once_per_step_whether_drafts_fit():
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    function = original(*draft_room._RUNNER)
    assert parameters(function) == ["self", "common_attn_metadata"]
    source = inspect.getsource(function)
    assert "common_attn_metadata.max_seq_len" in source
    assert "self.effective_drafter_max_model_len" in source
    assert inspect.getsource(GPUModelRunner.sample_tokens).count("self._input_fits_in_drafter(") == 1


def test_draft_steps_past_the_maximum_length_are_clamped():
    from vllm.platforms import current_platform

    if current_platform.is_cpu():  # as a worker does at its start
        current_platform.register_triton_kernel_overrides()
    device = torch.device("cpu" if current_platform.is_cpu() else "cuda")
    assert draft_room.clamps(device)


def test_unclamped_draft_steps_are_found_out(monkeypatch):
    from vllm.v1.spec_decode import utils

    def unclamped(
        positions_1d,
        block_table_tensor,
        seq_lens,
        block_size,
        max_model_len,
        out_clamped_positions,
        out_slot_mapping,
        input_batch_size=None,
    ):
        out_clamped_positions.copy_(positions_1d + 1)
        out_slot_mapping.copy_(torch.tensor([8, 20]))
        seq_lens += 1

    monkeypatch.setattr(utils, "eagle_step_update_slot_mapping_and_metadata", unclamped)
    assert not draft_room.clamps.__wrapped__(torch.device("cpu"))


def test_the_scheduler_cuts_drafts_to_the_room_of_each_request():
    from vllm.v1.core.sched.scheduler import Scheduler

    source = inspect.getsource(Scheduler.schedule)
    assert "self.max_model_len\n                - request.num_computed_tokens" in source


# ---------------------------------------------------------------- compat/draft_lora.py


def test_v1_drafters_share_layers_of_the_target_while_they_load():
    function = original(*draft_lora.PROPOSER)
    assert parameters(function) == ["self", "target_model"]
    assert "self._maybe_share_embeddings(" in inspect.getsource(function)


def test_layers_wrapped_for_lora_are_unwrapped():
    from vllm.lora.layers import BaseLayerWithLoRA

    wrapped = BaseLayerWithLoRA()
    wrapped.base_layer = torch.nn.Linear(1, 1)
    drafter = torch.nn.Sequential(torch.nn.Sequential(wrapped, torch.nn.ReLU()))
    assert draft_lora.unwrap(drafter) == 1
    assert drafter[0][0] is wrapped.base_layer
    assert draft_lora.unwrap(drafter) == 0


def test_on_a_cpu_requests_without_lora_get_that_of_their_neighbours():
    """A fault of vLLM itself (vllm_ppow/README.md, Works with). When this fails, mix the cases."""
    from vllm.lora.ops.torch_ops import bgmv_expand

    output = torch.zeros(1, 2)
    no_lora = torch.tensor([-1])
    bgmv_expand(torch.ones(1, 1), torch.ones(1, 1, 2, 1), output, no_lora, add_inputs=True)
    assert output.tolist() != [[0.0, 0.0]]


# ------------------------------------ options that speculation refuses (vllm_ppow/README.md, Works with)


def test_custom_logits_processors_are_refused_at_start_up():
    from types import SimpleNamespace

    from vllm.v1.sample.logits_processor import build_logitsprocs

    config = SimpleNamespace(speculative_config=object())
    with pytest.raises(ValueError, match="speculative decoding"):
        build_logitsprocs(config, torch.device("cpu"), False, False, ["some.Processor"])
