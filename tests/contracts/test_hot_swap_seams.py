"""What swapping adapters relies on in the installed vLLM: layerwise reload, worker extension, endpoint plugins."""

from __future__ import annotations

import dataclasses
import importlib
import inspect

import pytest

from vllm_ppow.compat import endpoints, hot_swap, seams


@pytest.mark.parametrize(("name", "expected"), hot_swap.RELOAD_FUNCTIONS)
def test_layerwise_reload(name, expected):
    module = seams.find_function(hot_swap.RELOAD, name, expected)
    assert list(inspect.signature(getattr(module, name)).parameters) == list(expected)


def test_a_vllm_without_it_says_so(monkeypatch):
    hot_swap.require()
    monkeypatch.delattr(importlib.import_module(hot_swap.RELOAD), "initialize_layerwise_reload")
    with pytest.raises(seams.SeamMissingError, match=r"has no vllm.*initialize_layerwise_reload"):
        hot_swap.require()


def test_every_model_is_recorded_for_reloading_when_it_is_built():
    from vllm.model_executor.model_loader import utils

    assert "record_metadata_for_reloading(" in inspect.getsource(utils.initialize_model)


def test_reloading_copies_into_the_running_storage():
    source = inspect.getsource(importlib.import_module(hot_swap.RELOAD)._copy_and_restore_kernel_tensors)
    assert "param.data.copy_(" in source


@pytest.mark.parametrize(
    ("module", "owner"),
    [
        ("vllm.v1.worker.gpu_worker", "Worker"),
        ("vllm.v1.worker.cpu_worker", "CPUWorker"),
        ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner"),
        ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner"),
    ],
)
def test_workers_and_both_runners_hand_out_the_drafter(module, owner):
    cls = getattr(importlib.import_module(module), owner)
    for name in ("get_model", "get_draft_model"):
        assert list(inspect.signature(getattr(cls, name)).parameters) == ["self"]


def test_worker_extension():
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.worker.cpu_worker import CPUWorker

    fields = {field.name: field.default for field in dataclasses.fields(EngineArgs)}
    assert fields["worker_extension_cls"] == ""
    assert resolve_obj_by_qualname(hot_swap.EXTENSION) is hot_swap.WorkerExtension
    ours = {name for name in vars(hot_swap.WorkerExtension) if not name.startswith("__")}
    assert all(name.startswith("ppow_") for name in ours), "vLLM refuses names that its worker has"
    inherited = [base for base in CPUWorker.__mro__ if base is not hot_swap.WorkerExtension]
    assert not ours & {name for base in inherited for name in vars(base)}


# ---------------------------------------------------------------- compat/endpoints.py


def test_endpoint_plugins():
    from vllm.plugins import ENDPOINT_PLUGINS_GROUP
    from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

    assert ENDPOINT_PLUGINS_GROUP == "vllm.endpoint_plugins"
    assert isinstance(endpoints.EndpointPlugin(), EndpointPlugin)
    assert list(inspect.signature(EndpointPlugin.init_state).parameters) == [
        "self",
        "engine_client",
        "state",
        "args",
    ]


def test_endpoint_plugins_are_loaded_only_where_they_are_named(monkeypatch):
    from vllm import plugins

    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert plugins.load_endpoint_plugins(("generate",)) == []


def test_the_api_key_guards_our_path():
    """Where the guard lies: vLLM < 0.31 keeps it among the server's utilities."""
    newer, older = (
        "vllm.entrypoints.serve.middleware.authenticate",
        "vllm.entrypoints.serve.utils.server_utils",
    )
    try:
        guard = importlib.import_module(newer)
    except ModuleNotFoundError:
        guard = importlib.import_module(older)
    assert endpoints.PATH.startswith(tuple(guard.GUARDED_PREFIX))


def test_collective_rpc_takes_a_method_by_name():
    from vllm import LLM
    from vllm.v1.engine.async_llm import AsyncLLM

    for owner in (LLM, AsyncLLM):
        assert list(inspect.signature(owner.collective_rpc).parameters)[1:4] == ["method", "timeout", "args"]
