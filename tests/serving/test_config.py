"""What stands under method ppow, its native translation, and every sentence with which it is refused."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from serving_pair import K, random_adapter

from vllm_ppow import resolve
from vllm_ppow.artifact import ArtifactError, ModelRef, fingerprint_model, write_adapter
from vllm_ppow.config import PPOWOptions, PPOWServingError, parse_options, rewrite

FIELDS = [
    "method",
    "model",
    "num_speculative_tokens",
    "draft_sample_method",
    "draft_load_config",
    "revision",
    "quantization",
]


@pytest.fixture(scope="module", params=["eagle3", "causal_lm"])
def adapter(pair, tmp_path_factory, request):
    return random_adapter(tmp_path_factory.mktemp("config"), request.param, pair)


@pytest.fixture(scope="module")
def causal_adapter(pair, tmp_path_factory):
    return random_adapter(tmp_path_factory.mktemp("config"), "causal_lm", pair)


@pytest.fixture(scope="module")
def eagle_adapter(pair, tmp_path_factory):
    return random_adapter(tmp_path_factory.mktemp("config"), "eagle3", pair)


def with_config(adapter, directory, **changes):
    """A copy of an adapter whose ppow_config.json says something else."""

    def copy(path):
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(adapter.directory / name, path)

    return write_adapter(directory, replace(adapter.config, **changes), copy)


def spec_of(adapter, **more):
    return {"method": "ppow", "model": str(adapter.directory), **more}


def assert_sentence(error: BaseException) -> None:
    """One line, ending as a sentence, short enough to be read."""
    text = str(error)
    assert "\n" not in text
    assert text.endswith(".")
    assert len(text) < 900


def refusal(spec, target, **options) -> str:
    with pytest.raises(ArtifactError) as caught:
        rewrite(spec, str(target), **options)
    assert_sentence(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- the rewrite


def test_rewrite_gives_native_fields(pair, adapter):
    kind = adapter.config.drafter_type
    native = rewrite(spec_of(adapter), str(pair.target), known_fields=FIELDS)
    assert native == {
        "method": {"eagle3": "eagle3", "causal_lm": "draft_model"}[kind],
        "model": str(pair.drafter(kind)),
        "num_speculative_tokens": K,
        "draft_sample_method": "greedy",
        "draft_load_config": {
            "load_format": "ppow",
            "model_loader_extra_config": {
                "ppow_adapter": str(adapter.directory),
                "ppow_fingerprint": adapter.config.adapter_fingerprint,
                "ppow_target": adapter.config.target.fingerprint,
                "ppow_window": {"min_tokens": 0, "per_request": None},
            },
        },
    }


def test_rewrite_is_idempotent_and_leaves_its_argument_alone(pair, adapter):
    spec = spec_of(adapter, ppow={"allow_target_mismatch": False})
    before = json.dumps(spec)
    native = rewrite(spec, str(pair.target))
    assert json.dumps(spec) == before
    assert rewrite(native, str(pair.target)) == native


@pytest.mark.parametrize(
    "spec", [{"method": "ngram", "num_speculative_tokens": 2}, {"model": "org/drafter"}, {}]
)
def test_other_methods_come_back_as_they_are(spec):
    assert rewrite(spec, "anything") is spec


def test_the_users_values_win(pair, adapter):
    spec = spec_of(
        adapter, **{"num-speculative-tokens": 1, "draft_sample_method": "probabilistic", "quantization": None}
    )
    native = rewrite(spec, str(pair.target), known_fields=FIELDS)
    assert (native["num_speculative_tokens"], native["draft_sample_method"]) == (1, "probabilistic")
    assert "quantization" not in native


@pytest.mark.parametrize("length", ["8", 8.0, True, 0, -1])
def test_a_draft_length_that_is_none(pair, adapter, length):
    """vLLM would take the first two for 8, and the adaptive window would be off without a word."""
    with pytest.raises(PPOWServingError, match=r"num_speculative_tokens must be an integer >= 1, got"):
        rewrite(spec_of(adapter, num_speculative_tokens=length), str(pair.target))


def test_the_users_load_options_are_kept(pair, adapter):
    given = {
        "load_format": "safetensors",
        "model_loader_extra_config": {"num_threads": 2},
        "use_tqdm_on_load": False,
    }
    load_config = rewrite(spec_of(adapter, draft_load_config=given), str(pair.target))["draft_load_config"]
    assert load_config["load_format"] == "ppow"
    assert load_config["use_tqdm_on_load"] is False
    assert load_config["model_loader_extra_config"]["num_threads"] == 2


def test_relative_paths_become_absolute(pair, causal_adapter, monkeypatch):
    monkeypatch.chdir(causal_adapter.directory.parent)
    native = rewrite({"method": "ppow", "model": f"./{causal_adapter.directory.name}"}, str(pair.target))
    assert Path(native["draft_load_config"]["model_loader_extra_config"]["ppow_adapter"]).is_absolute()


@pytest.mark.parametrize("offline", [True, False])
def test_adapter_and_its_revision_come_from_the_hub(pair, causal_adapter, tmp_path, monkeypatch, offline):
    import huggingface_hub

    inside = tmp_path / "snapshot"
    shutil.copytree(causal_adapter.directory, inside)
    shutil.copytree(pair.causal_lm, inside / "drafter")
    raw = json.loads((inside / "ppow_config.json").read_text())
    raw["base_drafter"]["name_or_path"] = "drafter"
    (inside / "ppow_config.json").write_text(json.dumps(raw))
    asked = []

    def snapshot_download(repo, revision, cache_dir, local_files_only, allow_patterns, ignore_patterns):
        asked.append((repo, revision, local_files_only))
        assert "original/*" in ignore_patterns
        assert not any(pattern.endswith((".py", ".bin", "*")) for pattern in allow_patterns)
        return str(inside)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(resolve, "is_offline", lambda: offline)
    native = rewrite({"method": "ppow", "model": "org/adapter", "revision": "v2"}, str(pair.target))
    assert asked == [("org/adapter", "v2", offline)], (
        "offline some versions would ask for a pinned commit's files"
    )
    assert native["model"] == str(inside / "drafter")
    assert "revision" not in native

    raw["base_drafter"]["name_or_path"] = str(pair.causal_lm)
    (inside / "ppow_config.json").write_text(json.dumps(raw))
    message = refusal({"method": "ppow", "model": "org/adapter"}, pair.target)
    assert "came from the Hub and names the drafter" in message


# ---------------------------------------------------------------- options


def test_options():
    assert parse_options(None) == PPOWOptions()
    assert parse_options({"allow-target-mismatch": True}) == PPOWOptions(allow_target_mismatch=True)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            {"windw": 3},
            r"unknown keys \['windw'\]: known are \['base_drafter', 'allow_target_mismatch', 'window'",
        ),
        (["base_drafter"], "must hold an object"),
        ({"base_drafter": 3}, "base_drafter must be a directory or Hub repo id, got 3"),
        ({"base_drafter": ""}, "base_drafter must be"),
        ({"allow_target_mismatch": "yes"}, "allow_target_mismatch must be true or false, got 'yes'"),
    ],
)
def test_options_refused(raw, message):
    with pytest.raises(PPOWServingError, match=message) as caught:
        parse_options(raw)
    assert_sentence(caught.value)


# Names of which some systems ask no file: a home that is not there, too long, a null byte.
UNUSABLE = ["~nobody-of-that-name/x", "x" * 300, "/a\0b"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, 'needs "model", the directory or Hub repo id of an adapter, got None'),
        ({"model": "/nowhere"}, "/nowhere does not exist"),
        ({"ppow": {"typo": 1}}, "unknown keys ['typo']"),
        ({"typo": 1}, "keys ['typo'] that this vLLM does not know: known are \"ppow\" and"),
        ({"base_drafter": "x"}, "['base_drafter'] belong under the key \"ppow\""),
        ({"draft_load_config": {"load_format": "dummy"}}, "load_format auto or safetensors, got"),
        ({"draft_load_config": "auto"}, "must be an object"),
        ({"ppow": {"base_drafter": "/nowhere"}}, "/nowhere does not exist"),
        (
            {"draft_load_config": {"model_loader_extra_config": "x"}},
            "model_loader_extra_config must be an object",
        ),
        *(({"model": name}, "does not exist: check the path") for name in UNUSABLE),
        *(({"ppow": {"base_drafter": name}}, "does not exist: check the path") for name in UNUSABLE),
        *(
            ({"ppow": {"hot_swap": True, "hot_swap_directory": name}}, "must be an existing directory")
            for name in UNUSABLE
        ),
    ],
)
def test_bad_specs(pair, causal_adapter, change, message):
    assert message in refusal(spec_of(causal_adapter) | change, pair.target, known_fields=FIELDS)


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_unusable_name_recorded_by_an_adapter(pair, causal_adapter, tmp_path, name):
    copy = shutil.copytree(causal_adapter.directory, tmp_path / "copy")
    config = json.loads((copy / "ppow_config.json").read_text("utf-8"))
    config["base_drafter"]["name_or_path"] = name
    (copy / "ppow_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert "Name it yourself" in refusal({"method": "ppow", "model": str(copy)}, pair.target)


def test_our_key_without_our_method(pair):
    assert '"ppow" needs "method": "ppow", got method \'eagle3\'' in refusal(
        {"method": "eagle3", "ppow": {}}, pair.target
    )


# ---------------------------------------------------------------- adapters


def test_a_bare_drafter_is_no_adapter(pair):
    message = refusal({"method": "ppow", "model": str(pair.causal_lm)}, pair.target)
    assert (
        "is a whole model without ppow_config.json, not a PPOW adapter: serve it with vLLM's own method"
        in message
    )


@pytest.mark.parametrize("name", ["ppow_config.json", "adapter_config.json", "adapter_model.safetensors"])
def test_half_an_adapter(pair, causal_adapter, tmp_path, name):
    shutil.copytree(causal_adapter.directory, tmp_path / "half")
    (tmp_path / "half" / name).unlink()
    message = refusal({"method": "ppow", "model": str(tmp_path / "half")}, pair.target)
    assert f"lacks {name}: it is half-written" in message


def test_a_truncated_adapter(pair, causal_adapter, tmp_path):
    shutil.copytree(causal_adapter.directory, tmp_path / "half")
    weights = tmp_path / "half" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "is truncated: copy or download it again" in refusal(
        {"method": "ppow", "model": str(tmp_path / "half")}, pair.target
    )


def test_tensors_of_another_adapter(pair, causal_adapter, eagle_adapter, tmp_path):
    shutil.copytree(causal_adapter.directory, tmp_path / "mixed")
    shutil.copy(eagle_adapter.weights, tmp_path / "mixed")
    assert "is not the file that ppow_config.json was written for" in refusal(
        {"method": "ppow", "model": str(tmp_path / "mixed")}, pair.target
    )


def test_an_adapter_for_another_drafter(pair, causal_adapter):
    message = refusal(spec_of(causal_adapter, ppow={"base_drafter": str(pair.eagle3)}), pair.target)
    assert f"was trained on another drafter than {pair.eagle3}" in message


def test_an_adapter_whose_drafter_is_gone(pair, causal_adapter, tmp_path):
    gone = with_config(
        causal_adapter,
        tmp_path / "a",
        base_drafter=replace(causal_adapter.config.base_drafter, name_or_path="/gone"),
    )
    message = refusal(spec_of(gone), pair.target)
    assert "recorded as '/gone', cannot be found" in message
    native = rewrite(spec_of(gone, ppow={"base_drafter": str(pair.causal_lm)}), str(pair.target))
    assert native["model"] == str(pair.causal_lm)


def test_an_adapter_tensor_that_matches_nothing(pair, causal_adapter, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(pair.causal_lm, other)
    tensors = load_file(other / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, other / "model.safetensors")
    wrong = with_config(
        causal_adapter, tmp_path / "a", base_drafter=ModelRef(str(other), fingerprint_model(other))
    )
    message = refusal(spec_of(wrong), pair.target)
    assert (
        "has tensors for layers.0.self_attn.q_proj, which the drafter's checkpoint does not contain"
        in message
    )


# ---------------------------------------------------------------- targets


@pytest.fixture(scope="module")
def other_target(pair, tmp_path_factory):
    """The target after some fine-tuning."""
    directory = tmp_path_factory.mktemp("other") / "target"
    shutil.copytree(pair.target, directory)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"] += torch.ones_like(tensors["model.norm.weight"])
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_an_adapter_for_another_target(pair, adapter, other_target, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    message = refusal(spec_of(adapter), other_target)
    assert (
        f"was trained for target {pair.target}, not for {other_target} (its fingerprint is sha256:" in message
    )
    assert '"ppow": {"allow_target_mismatch": true}' in message
    with caplog.at_level(logging.WARNING, logger="vllm.ppow.config"):
        rewrite(spec_of(adapter, ppow={"allow_target_mismatch": True}), str(other_target))
    assert "serving" in caplog.text
    assert "acceptance may drop" in caplog.text


def test_a_target_without_fingerprint(adapter, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 8}))
    assert "its fingerprint cannot be taken" in refusal(spec_of(adapter), tmp_path)


def shallow(pair, directory, layers):
    """The target with another number of layers in its config; its weights, and so its fingerprint, are the same."""
    shutil.copytree(pair.target, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    return directory


def head_with_taps(pair, directory, taps):
    """The EAGLE-3 head, reading the hidden states it is told to; None for vLLM's default."""
    shutil.copytree(pair.eagle3, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "eagle_aux_hidden_state_layer_ids": taps}))
    return directory


@pytest.mark.parametrize(
    ("layers", "taps"), [(1, None), (4, None), (6, None), (4, [2, 4, 5]), (8, [2, 4, 4])]
)
def test_too_few_layers_for_eagle3(pair, eagle_adapter, tmp_path, layers, taps):
    head = head_with_taps(pair, tmp_path / "head", taps)
    spec = spec_of(eagle_adapter, ppow={"base_drafter": str(head)})
    message = refusal(spec, shallow(pair, tmp_path / "target", layers))
    assert f"has {layers} layers, of which EAGLE-3 cannot read the hidden states" in message
    assert "set eagle_aux_hidden_state_layer_ids" in message


@pytest.mark.parametrize(("layers", "taps"), [(7, None), (8, None), (4, [1, 2, 3]), (36, [2, 18, 33])])
def test_enough_layers_for_eagle3(pair, eagle_adapter, tmp_path, layers, taps):
    head = head_with_taps(pair, tmp_path / "head", taps)
    spec = spec_of(eagle_adapter, ppow={"base_drafter": str(head)})
    assert rewrite(spec, str(shallow(pair, tmp_path / "target", layers)))["model"] == str(head)


def test_a_causal_lm_drafter_needs_no_hidden_states(pair, causal_adapter, tmp_path):
    assert (
        rewrite(spec_of(causal_adapter), str(shallow(pair, tmp_path / "target", 2)))["method"]
        == "draft_model"
    )


@pytest.mark.parametrize("part", ["eagle-", "eagle3", "dflash", "dspark"])
def test_a_path_that_vllm_takes_for_another_method(
    pair, causal_adapter, eagle_adapter, tmp_path_factory, part
):
    root = tmp_path_factory.mktemp("paths")  # tmp_path would carry the parameter's name
    unlucky = root / f"My-{part.upper()}x" / "drafter"
    shutil.copytree(pair.causal_lm, unlucky)
    message = refusal(spec_of(causal_adapter, ppow={"base_drafter": str(unlucky)}), pair.target)
    assert f"{unlucky} contains {part!r}, which vLLM takes for another speculative method" in message
    link = root / "link"
    link.symlink_to(unlucky)
    native = rewrite(spec_of(causal_adapter, ppow={"base_drafter": str(link)}), str(pair.target))
    assert native["model"] == str(link)

    lucky = root / f"{part}-head"  # an EAGLE head may be called what it is
    shutil.copytree(pair.eagle3, lucky)
    assert (
        rewrite(spec_of(eagle_adapter, ppow={"base_drafter": str(lucky)}), str(pair.target))["method"]
        == "eagle3"
    )
