"""What a worker remembers over swaps that fail and succeed, with its own methods and no engine behind them."""

from __future__ import annotations

import json
import shutil
import weakref
from types import SimpleNamespace

import pytest
from serving_pair import random_adapter

from vllm_ppow.artifact import fingerprint_model
from vllm_ppow.compat import hot_swap
from vllm_ppow.compat.hot_swap import WorkerExtension
from vllm_ppow.merge import MergeError, Merger


class Adapter(SimpleNamespace):
    """Stands for a Merger of an adapter called `name`."""

    @property
    def adapter(self):
        return SimpleNamespace(
            directory=self.name, config=SimpleNamespace(adapter_fingerprint=self.name), peft_config={}
        )

    def fresh(self):
        return self


class Worker(WorkerExtension):
    """A worker whose loads fail as often as it is told to."""

    def __init__(self):
        hot_swap._states[self] = hot_swap._State(Adapter(name="a"))
        self.failures, self.written = 0, "a"

    def stage(self, name):
        hot_swap._state(self).stage(lambda: (Adapter(name=name), [name]))

    @property
    def known(self):
        state = hot_swap._state(self)
        return state.running.name, state.previous and state.previous.name


@pytest.fixture
def worker(monkeypatch):
    def write(worker, tensors):
        if worker.failures:
            worker.failures -= 1
            raise RuntimeError("planted")
        (worker.written,) = tensors

    monkeypatch.setattr(hot_swap, "_merged", lambda worker, merger: (merger, [merger.name]))
    monkeypatch.setattr(hot_swap, "_write", write)
    return Worker()


def swapped(worker, name):
    worker.stage(name)
    assert worker.ppow_load()["ok"]
    assert worker.ppow_settle()["adapter"] == name


def test_going_back_may_fail_and_be_tried_again(worker):
    swapped(worker, "b")
    assert worker.ppow_stage_previous()["ok"]
    worker.failures = 1
    assert not worker.ppow_load()["ok"]
    assert worker.ppow_restore()["ok"]
    assert (worker.known, worker.written) == (("b", "a"), "b")
    assert worker.ppow_stage_previous()["ok"]
    assert worker.ppow_load()["ok"]
    assert (worker.known, worker.written) == (("a", "b"), "a")


def test_only_the_running_adapter_and_the_one_before_it_stay_in_memory(worker):
    """A third is held while it may have to come back, and no longer."""
    swapped(worker, "b")
    worker.stage("c")
    first = weakref.ref(hot_swap._state(worker).previous)
    assert worker.ppow_load()["ok"]
    assert first() is not None
    assert worker.ppow_settle()["ok"]
    assert first() is None
    assert worker.known == ("c", "b")


def test_a_load_that_failed_after_a_whole_swap_goes_back_no_further_than_it(worker):
    swapped(worker, "b")
    worker.stage("c")
    worker.failures = 1
    assert not worker.ppow_load()["ok"]
    assert worker.ppow_restore()["ok"]
    assert (worker.known, worker.written) == (("b", "a"), "b")


@pytest.mark.parametrize("here", [True, False])
def test_a_load_that_failed_on_one_rank_leaves_all_as_they_were(worker, here):
    """Whether it failed on this rank or on another one."""
    swapped(worker, "b")
    worker.stage("c")
    worker.failures = int(here)
    assert worker.ppow_load()["ok"] != here
    assert worker.ppow_restore()["ok"]
    assert (worker.known, worker.written) == (("b", "a"), "b")
    worker.stage("c")
    worker.failures = 1
    assert not worker.ppow_load()["ok"], "and what the last one left behind decides nothing about the next"
    assert worker.ppow_restore()["ok"]
    assert (worker.known, worker.written) == (("b", "a"), "b")


def test_an_adapter_that_start_up_would_refuse_is_refused(pair, tmp_path):
    """A drafter that ties its output layer, and an adapter that changes it: vLLM would not load the merged tensor."""
    tied = tmp_path / "tied"
    shutil.copytree(pair.causal_lm, tied)
    config = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    adapter = random_adapter(tmp_path, "causal_lm", pair, target_modules=["lm_head", "q_proj"])
    object.__setattr__(adapter.config.base_drafter, "fingerprint", fingerprint_model(tied))
    speculative = SimpleNamespace(draft_model_config=SimpleNamespace(model=str(tied)))
    worker = SimpleNamespace(vllm_config=SimpleNamespace(speculative_config=speculative))
    with pytest.raises(MergeError, match="ties to its embeddings"):
        hot_swap._merged(worker, Merger(adapter))
