"""Settings that tests need before vLLM is imported, and the fixtures shared by serving tests."""

from __future__ import annotations

import os

import pytest

# Engines of tests run inside the test process, on the CPU, with little memory, and never ask the network.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """A small target with an EAGLE-3 head and a causal LM drafter (serving_pair.Pair)."""
    from serving_pair import build_pair

    return build_pair(tmp_path_factory.mktemp("pair"))
