"""The shims that hand vLLM's drafter classes the drafter's load config, on stand-ins for classes that need a GPU."""

from __future__ import annotations

import dataclasses
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_ppow.compat import draft_loading, seams


@dataclasses.dataclass
class Config:
    """A stand-in for VllmConfig, replaced by dataclass rules as vLLM's is."""

    load_config: Any
    other: int = 7


OURS = SimpleNamespace(load_format="ppow")
TARGETS = SimpleNamespace(load_format="auto")


def speculative(draft_load_config):
    return SimpleNamespace(draft_load_config=draft_load_config)


class V2Speculator:
    """Loads with `self.vllm_config`, as StandaloneARSpeculator and 0.26's EagleSpeculator do."""

    def __init__(self, draft_load_config, error=None):
        self.vllm_config = Config(TARGETS)
        self.speculative_config = speculative(draft_load_config)
        self.error = error

    def load_draft_model(self, target_model, target_attn_layer_names):
        if self.error:
            raise self.error
        return target_model, target_attn_layer_names, self.vllm_config


@pytest.mark.parametrize(("draft_load_config", "used"), [(OURS, OURS), (TARGETS, TARGETS), (None, TARGETS)])
def test_v2_loads_with_the_drafters_load_config(draft_load_config, used):
    speculator = V2Speculator(draft_load_config)
    before = speculator.vllm_config
    model, names, config = draft_loading._v2_speculator(V2Speculator.load_draft_model)(
        speculator, "target", {"layer"}
    )
    assert (model, names) == ("target", {"layer"})
    assert config == Config(used)
    assert speculator.vllm_config is before


def test_v2_config_is_put_back_when_loading_fails():
    speculator = V2Speculator(OURS, RuntimeError("out of memory"))
    before = speculator.vllm_config
    with pytest.raises(RuntimeError, match="out of memory"):
        draft_loading._v2_speculator(V2Speculator.load_draft_model)(speculator, "target", set())
    assert speculator.vllm_config is before


@pytest.mark.parametrize(("draft_load_config", "used"), [(OURS, OURS), (TARGETS, TARGETS), (None, TARGETS)])
def test_v1_creates_a_config_with_the_drafters_load_config(draft_load_config, used):
    proposer = SimpleNamespace(speculative_config=speculative(draft_load_config))
    assert draft_loading._v1_draft_model(lambda self: Config(TARGETS))(proposer) == Config(used)


def test_absent_classes_are_no_fault_and_changed_ones_are_logged(monkeypatch):
    records: list[logging.LogRecord] = []
    handler = logging.Handler()  # of its own: whether vLLM's logger propagates depends on what ran before
    monkeypatch.setattr(handler, "emit", records.append)
    monkeypatch.setattr(seams.logger, "handlers", [handler])
    monkeypatch.setattr(seams, "_installed", {})
    monkeypatch.setattr(
        draft_loading, "V1_DRAFT_MODEL", (__name__, "V2Speculator", "_create_draft_vllm_config")
    )
    monkeypatch.setattr(draft_loading, "V2_DRAFT_MODEL", ("vllm.not.here", "Any", "load_draft_model"))
    monkeypatch.setattr(draft_loading, "V2_PLAIN_DRAFT_MODEL", ("vllm.not.here", "Any", "load_draft_model"))
    monkeypatch.setattr(draft_loading, "V2_EAGLE", ("vllm.v1.not_here", "Any", "load_draft_model"))
    draft_loading.install()
    assert seams.installed() == frozenset()
    assert [record.levelname for record in records] == ["WARNING"]
    message = records[0].getMessage()
    assert "has no test_draft_loading.V2Speculator._create_draft_vllm_config" in message
