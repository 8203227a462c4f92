"""What the adapter records of models from the Hub: the commit that was trained on, though the branch moves on."""

from __future__ import annotations

from pathlib import Path

import pytest
from serving_hub import add_to_cache

from ppow_train.pair import load_pair
from ppow_train.preflight import find_target
from vllm_ppow.artifact import Adapter, AdapterConfig, ArtifactError, fingerprint_model
from vllm_ppow.resolve import resolve_base_drafter, resolve_directory


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty Hub cache that the client reads offline."""
    from huggingface_hub import constants

    directory = tmp_path / "hub"
    directory.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(directory))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return directory


def test_a_model_of_the_hub_is_recorded_by_its_commit(cache, directories, tmp_path):
    target = add_to_cache(cache, "org/target", directories.target)
    drafter = add_to_cache(cache, "org/drafter", directories.drafter["causal_lm"])
    pair = load_pair("org/target", "org/drafter")
    assert (pair.target_ref.name_or_path, pair.target_ref.revision) == ("org/target", target)
    assert (pair.drafter_ref.name_or_path, pair.drafter_ref.revision) == ("org/drafter", drafter)

    # The owner uploads other weights.
    assert add_to_cache(cache, "org/target", directories.drafter["causal_lm"]) != target
    assert add_to_cache(cache, "org/drafter", directories.target) != drafter
    moved = resolve_directory("org/drafter")[0]
    assert fingerprint_model(moved) != pair.drafter_ref.fingerprint
    config = AdapterConfig("causal_lm", pair.drafter_ref, pair.target_ref, 4, 0.1, "greedy", 0.0)
    adapter = Adapter(tmp_path / "adapter", config, {})
    assert resolve_base_drafter(adapter, from_hub=True).name == drafter
    assert find_target(adapter, None, allow_mismatch=False)[0].name == target
    with pytest.raises(ArtifactError, match="trained on another drafter"):
        resolve_base_drafter(adapter, from_hub=True, override="org/drafter")


def test_a_directory_has_no_commit(directories):
    pair = load_pair(str(directories.target), str(directories.drafter["causal_lm"]))
    assert pair.target_ref.name_or_path == str(directories.target.resolve())
    assert pair.target_ref.revision is pair.drafter_ref.revision is None
