"""Adapters, drafters and targets by Hub repo id: from the client's cache, offline, at a pinned revision."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from serving_hub import add_to_cache
from serving_pair import load_drafter, random_adapter, random_lora, save_adapter

from vllm_ppow.artifact import ArtifactError
from vllm_ppow.config import ADAPTER_KEY, rewrite
from vllm_ppow.resolve import resolve_base_drafter, resolve_directory


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty Hub cache that the client reads offline."""
    directory = tmp_path / "hub"
    directory.mkdir()
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(directory))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return directory


def record(adapter, **refs):
    """Name the adapter's target or drafter, or its revision, otherwise than it was trained."""
    path = adapter.directory / "ppow_config.json"
    config = json.loads(path.read_text())
    for role, changes in refs.items():
        config[role].update(changes)
    path.write_text(json.dumps(config))


def adapter_of_repos(directory, pair, scale):
    """An adapter that names its target and drafter by repo id."""
    model = random_lora(load_drafter("causal_lm", pair.causal_lm), scale)
    adapter = save_adapter(directory, model, "causal_lm", pair.causal_lm, pair.target)
    record(adapter, base_drafter={"name_or_path": "org/drafter"}, target={"name_or_path": "org/target"})
    return adapter


def test_adapter_drafter_and_target_from_the_cache_at_a_pinned_revision(pair, tmp_path, cache):
    add_to_cache(cache, "org/target", pair.target)
    add_to_cache(cache, "org/drafter", pair.causal_lm)
    first, second = (
        adapter_of_repos(tmp_path / name, pair, scale) for name, scale in (("1", 0.1), ("2", 0.2))
    )
    old = add_to_cache(cache, "org/adapter", first.directory, branch="v1")
    new = add_to_cache(cache, "org/adapter", second.directory)
    assert old != new
    for revision, commit in ((None, new), ("main", new), ("v1", old), (old, old)):
        spec = {"method": "ppow", "model": "org/adapter", "revision": revision}
        native = rewrite(spec, "org/target")
        used = native["draft_load_config"]["model_loader_extra_config"][ADAPTER_KEY]
        assert f"/snapshots/{commit}" in used
        assert "revision" not in native, "vLLM would look for the adapter's revision in the drafter's repo"
        assert "models--org--drafter" in native["model"]


def test_the_recorded_revision_of_the_drafter_is_used(pair, tmp_path, cache):
    pinned = add_to_cache(cache, "org/drafter", pair.causal_lm, branch="v1")
    add_to_cache(cache, "org/drafter", pair.eagle3)  # main has moved on to another drafter
    adapter = adapter_of_repos(tmp_path / "a", pair, 0.1)
    spec = {"method": "ppow", "model": str(adapter.directory)}
    with pytest.raises(ArtifactError, match="trained on another drafter than"):
        rewrite(spec, str(pair.target))
    record(adapter, base_drafter={"revision": "v1"})
    assert pinned in rewrite(spec, str(pair.target))["model"]


@pytest.mark.parametrize(("revision", "at"), [(None, ""), ("v2", " at revision v2")])
def test_offline_and_not_in_the_cache(pair, cache, revision, at):
    add_to_cache(cache, "org/cached", pair.causal_lm, branch="v1")
    name = "org/absent" if revision is None else "org/cached"
    with pytest.raises(ArtifactError) as caught:
        resolve_directory(name, revision)
    assert str(caught.value) == (
        f"{name} is not a directory here, and the Hub cache does not hold it{at} while HF_HUB_OFFLINE is set: "
        "download it first (hf download), or unset HF_HUB_OFFLINE."
    )


@pytest.mark.parametrize("name", ["org/head", "head"])
def test_an_adapter_of_the_hub_does_not_name_what_happens_to_lie_here(pair, tmp_path, monkeypatch, name):
    """A relative name is a repo's, whatever the working directory holds, and a revision is never passed over."""
    adapter = random_adapter(tmp_path, "causal_lm", pair)
    reference = dataclasses.replace(adapter.config.base_drafter, name_or_path=name, revision="0" * 40)
    adapter = dataclasses.replace(adapter, config=dataclasses.replace(adapter.config, base_drafter=reference))
    here = tmp_path / "here"
    shutil.copytree(pair.causal_lm, here / name)
    monkeypatch.chdir(here)
    assert resolve_base_drafter(adapter, from_hub=False) == Path(name)
    with pytest.raises(ArtifactError, match=r"or of this one: name the drafter yourself"):
        resolve_base_drafter(adapter, from_hub=True)
