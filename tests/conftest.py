"""Settings that tests need before vLLM is imported, and the fixtures shared by serving tests."""

from __future__ import annotations

import os

import pytest

# Engines of tests run inside the test process, on the CPU, with little memory, and never ask the network.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault(
    "VLLM_LOGGING_LEVEL", "INFO"
)  # importing TRL sets ERROR, and log lines are part of what is tested
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """A small target with an EAGLE-3 head and a causal LM drafter (serving_pair.Pair)."""
    from serving_pair import build_pair

    return build_pair(tmp_path_factory.mktemp("pair"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where torch sees no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch  # here, not above: it takes seconds, and most runs choose no GPU test

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
