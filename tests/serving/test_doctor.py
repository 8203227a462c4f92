"""`ppow doctor`: every fault it promises to find, planted; and what it says where all is well."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from serving_hub import add_to_cache
from serving_pair import K, random_adapter
from serving_profile import PROFILE

from ppow_train import cli, doctor
from ppow_train.doctor import Question, examine
from vllm_ppow.compat import capabilities
from vllm_ppow.config import rewrite
from vllm_ppow.cost_profile import write_cost_profile


@pytest.fixture(scope="module", params=["eagle3", "causal_lm", "original"])
def adapter(pair, tmp_path_factory, request):
    return random_adapter(tmp_path_factory.mktemp("doctor"), request.param, pair)


@pytest.fixture(scope="module")
def causal_adapter(pair, tmp_path_factory):
    return random_adapter(tmp_path_factory.mktemp("doctor"), "causal_lm", pair)


def question(pair, trained, **changes):
    return Question(**{"target": str(pair.target), "adapter": str(trained.directory), **changes})


def found(diagnosis, status):
    return {
        check.name: f"{check.detail} → {check.remedy}" for check in diagnosis.checks if check.status == status
    }


def test_all_is_well(pair, adapter):
    diagnosis = examine(question(pair, adapter))
    assert not found(diagnosis, "fail")
    assert not found(diagnosis, "warn")
    assert diagnosis.serves
    assert diagnosis.native == rewrite({"method": "ppow", "model": str(adapter.directory)}, str(pair.target))
    assert {
        "Python",
        "torch",
        "vLLM",
        "plugin",
        "adapter",
        "drafter",
        "drafter sizes",
        "target",
        "vocabulary",
        "context",
    } <= set(found(diagnosis, "ok"))
    assert {"adaptive window", "hot swap", "hot swap over HTTP"} <= set(found(diagnosis, "ok"))
    assert "Hub" not in found(diagnosis, "ok"), "no Hub repo was named"


def test_command_line_and_json(pair, adapter, capsys):
    options = ["--target", str(pair.target), "--adapter", str(adapter.directory), "-K", str(K + 1)]
    assert cli.run(["doctor", *options, "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["serves"] is True
    assert value["speculative_config"]["num_speculative_tokens"] == K + 1
    (warned,) = [check for check in value["checks"] if check["status"] == "warn"]
    assert (warned["name"], warned["remedy"]) == (
        "draft length",
        f"-K {K}: later positions were not trained.",
    )
    assert cli.run(["doctor", *options[:3], str(pair.target)]) == 1
    shown = capsys.readouterr().out
    assert "fail  adapter" in shown
    assert shown.endswith("It would not be served.\n")


def test_what_was_found_stands_in_one_column(monkeypatch, capsys):
    diagnosis = doctor.Diagnosis()
    diagnosis.add("vLLM", "ok", "FOUND")
    diagnosis.add("adaptive window on the V2 model runner", "warn", "FOUND", "REMEDY")
    monkeypatch.setattr(doctor, "examine", lambda question: diagnosis)
    assert cli.run(["doctor", "--target", "t", "--adapter", "a"]) == 0
    first, second, remedy, _ = capsys.readouterr().out.splitlines()
    assert first.index("FOUND") == second.index("FOUND") == remedy.index("→")


def test_the_cost_profile_is_looked_at(pair, causal_adapter, tmp_path):
    copied = tmp_path / "adapter"
    shutil.copytree(causal_adapter.directory, copied)
    asked = Question(str(pair.target), str(copied))
    said = found(examine(asked), "ok")["cost profile"]
    assert "learned while serving" in said
    assert "has a CPU trim the drafts of greedy requests" in said
    same = dataclasses.replace(
        PROFILE,
        vllm_version=capabilities.installed_distribution()[1],
        adapter_fingerprint=causal_adapter.config.adapter_fingerprint,
        target_fingerprint=causal_adapter.config.target.fingerprint,
    )
    write_cost_profile(copied, same)
    told = found(examine(asked), "ok")["cost profile"]
    assert "of a CPU: bfloat16, quantization none, KV cache auto, compiled, TP 1" in told
    write_cost_profile(copied, dataclasses.replace(same, adapter_fingerprint="sha256:" + "2" * 64))
    told = found(examine(asked), "warn")["cost profile"]
    assert "adapter_fingerprint" in told
    assert "measure again with ppow profile" in told
    (copied / "cost_profile.json").write_text("{")
    assert "not readable JSON" in found(examine(asked), "warn")["cost profile"]


def test_another_target(pair, adapter, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(pair.target, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, other / "model.safetensors")
    refused = examine(question(pair, adapter, target=str(other)))
    assert set(found(refused, "fail")) == {"target", "config"}
    assert "not the target that the adapter was trained for" in found(refused, "fail")["target"]
    assert refused.native is None
    allowed = examine(question(pair, adapter, target=str(other), allow_target_mismatch=True))
    assert allowed.serves


def test_another_drafter(pair, adapter):
    wrong = pair.causal_lm if adapter.config.drafter_type == "eagle3" else pair.eagle3
    diagnosis = examine(question(pair, adapter, base_drafter=str(wrong)))
    assert "trained on another drafter" in found(diagnosis, "fail")["drafter"]
    assert not diagnosis.serves


def copy_of_drafter(pair, kind, directory):
    """A drafter that can be spoiled without changing its weights."""
    shutil.copytree(pair.drafter(kind), directory)
    return json.loads((directory / "config.json").read_text()), directory / "config.json"


def test_vocabularies_that_do_not_fit(pair, causal_adapter, tmp_path):
    config, path = copy_of_drafter(pair, "causal_lm", tmp_path / "d")
    path.write_text(json.dumps({**config, "vocab_size": 100}))
    diagnosis = examine(question(pair, causal_adapter, base_drafter=str(tmp_path / "d")))
    assert found(diagnosis, "fail")["vocabulary"].startswith("100 tokens of the drafter, 320 of the target")


def test_a_reduced_vocabulary_needs_its_map(pair, tmp_path):
    config, path = copy_of_drafter(pair, "original", tmp_path / "d")
    adapter = random_adapter(tmp_path, "original", pair)
    fine = examine(question(pair, adapter, base_drafter=str(tmp_path / "d")))
    assert "mapped by d2t" in found(fine, "ok")["vocabulary"]
    path.write_text(json.dumps({**config, "draft_vocab_size": 17}))
    diagnosis = examine(question(pair, adapter, base_drafter=str(tmp_path / "d")))
    assert "drafts 17 of the target's 320 tokens, its d2t is I64" in found(diagnosis, "fail")["vocabulary"]


@pytest.mark.parametrize("taps", ["x", 5, ["a"], [2.5, 3, 4]])
def test_a_head_whose_taps_are_no_layers(pair, tmp_path, taps):
    config, path = copy_of_drafter(pair, "original", tmp_path / "d")
    adapter = random_adapter(tmp_path, "original", pair)
    path.write_text(json.dumps({**config, "eagle_aux_hidden_state_layer_ids": taps}))
    diagnosis = examine(question(pair, adapter, base_drafter=str(tmp_path / "d")))
    assert "must be a list of whole numbers, got" in found(diagnosis, "fail")["config"]


def test_configs_whose_parts_are_no_objects(pair, tmp_path):
    """What they would have said is then not said; vLLM fails at such a head."""
    config, path = copy_of_drafter(pair, "original", tmp_path / "d")
    adapter = random_adapter(tmp_path, "original", pair)
    path.write_text(json.dumps({**config, "eagle_config": "x"}))
    shutil.copytree(pair.target, tmp_path / "target")
    own = json.loads((pair.target / "config.json").read_text())
    (tmp_path / "target" / "config.json").write_text(json.dumps({**own, "text_config": "x"}))
    asked = question(pair, adapter, base_drafter=str(tmp_path / "d"), target=str(tmp_path / "target"))
    failed = found(examine(asked), "fail")
    assert set(failed) == {"drafter sizes"}
    assert "eagle_config x: only Llama layers" in failed["drafter sizes"]


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("eagle3", {"hidden_size": 128}, "reads hidden states of size 128, those of target"),
        ("eagle3", {"num_attention_heads": 8}, "q_proj.weight [128, 128] instead of [256, 128]"),
        ("original", {"intermediate_size": 96}, "down_proj.weight [64, 128] instead of [64, 96]"),
        ("original", {"draft_vocab_size": 17}, "lm_head.weight [213, 64] instead of [17, 64]"),
        ("original", {"vocab_size": 100}, "needs one of shape [100, 64] from its target"),
        ("causal_lm", {"num_key_value_heads": 4}, "k_proj.weight [64, 64] instead of [128, 64]"),
        ("causal_lm", {"vocab_size": 100}, "lm_head.weight [320, 64] instead of [100, 64]"),
        ("causal_lm", {"attention_bias": True}, "no model.layers.0.self_attn.k_proj.bias"),
    ],
)
def test_a_config_that_does_not_fit_the_weights(kind, change, says, pair, tmp_path):
    config, path = copy_of_drafter(pair, kind, tmp_path / "d")
    adapter = random_adapter(tmp_path, kind, pair)
    config.get("transformer_layer_config", config).update(change)
    path.write_text(json.dumps(config))
    diagnosis = examine(question(pair, adapter, base_drafter=str(tmp_path / "d")))
    told = found(diagnosis, "fail")["drafter sizes"]
    assert says in told
    assert "copy the " in told or "give the target that the head was made for" in told, "the remedy"
    assert not diagnosis.serves


def test_sizes_are_not_compared_without_what_training_brings(pair, causal_adapter, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    diagnosis = examine(question(pair, causal_adapter))
    assert "accelerate is not installed" in found(diagnosis, "ok")["drafter sizes"]
    assert diagnosis.serves


@pytest.mark.parametrize("content", ["[]", '{"weight_map": {"a": 5}}'])
def test_an_index_that_names_no_files(pair, causal_adapter, tmp_path, content):
    shutil.copytree(pair.target, tmp_path / "target")
    (tmp_path / "target" / "model.safetensors.index.json").write_text(content)
    diagnosis = examine(question(pair, causal_adapter, target=str(tmp_path / "target")))
    assert "must map tensors to files in weight_map" in found(diagnosis, "fail")["target"]


def test_a_shorter_context_is_a_warning(pair, causal_adapter, tmp_path):
    config, path = copy_of_drafter(pair, "causal_lm", tmp_path / "d")
    path.write_text(json.dumps({**config, "max_position_embeddings": 64}))
    diagnosis = examine(question(pair, causal_adapter, base_drafter=str(tmp_path / "d")))
    assert (
        "takes 64 tokens, the target 256: longer requests are served without drafts"
        in found(diagnosis, "warn")["context"]
    )
    assert diagnosis.serves


@pytest.mark.parametrize(("value", "fails"), [("other", True), ("other,ppow", False)])
def test_a_plugin_that_is_kept_out(pair, causal_adapter, monkeypatch, value, fails):
    monkeypatch.setenv("VLLM_PLUGINS", value)
    assert ("plugin" in found(examine(question(pair, causal_adapter)), "fail")) is fails


def test_a_plugin_that_is_not_installed(pair, causal_adapter, monkeypatch):
    monkeypatch.setattr(capabilities.importlib.metadata, "entry_points", lambda group: [])
    assert "does not find the entry point" in found(examine(question(pair, causal_adapter)), "fail")["plugin"]


def test_an_untested_vllm_and_one_without_a_hook(pair, causal_adapter, monkeypatch):
    monkeypatch.setattr(capabilities, "TESTED", {})
    assert "the tests did not run on it" in found(examine(question(pair, causal_adapter)), "warn")["vLLM"]
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    monkeypatch.delattr(WorkerWrapperBase, "init_device")
    diagnosis = examine(question(pair, causal_adapter))
    assert (
        "has no vllm.v1.worker.worker_base.WorkerWrapperBase.init_device" in found(diagnosis, "fail")["vLLM"]
    )


def test_hub_repos_offline(pair, causal_adapter, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit = add_to_cache(tmp_path / "hub", "org/adapter", causal_adapter.directory)
    diagnosis = examine(question(pair, causal_adapter, adapter="org/adapter"))
    assert "org/adapter: offline" in found(diagnosis, "ok")["Hub"]
    assert commit in found(diagnosis, "ok")["adapter"]
    # A drafter outside the adapter, recorded by a path, is not taken from an adapter of the Hub.
    assert "a path of the machine it was trained on" in found(diagnosis, "fail")["drafter"]
    absent = examine(question(pair, causal_adapter, adapter="org/absent"))
    assert "HF_HUB_OFFLINE" in found(absent, "fail")["adapter"]


@pytest.mark.parametrize("absent", [["vllm"], ["vllm", "torch", "safetensors"]])
def test_where_vllm_is_not_installed(pair, causal_adapter, absent):
    """In a process whose imports do not find them, as in an environment for serving's command line alone."""
    code = f"""
import importlib.abc, importlib.util, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in {absent!r} else find(name, *rest)
from ppow_train.cli import run
sys.exit(run(["doctor", "--target", {str(pair.target)!r}, "--adapter", {str(causal_adapter.directory)!r}, "--json"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks["vLLM"]["status"] == "fail"
    assert "not installed" in checks["vLLM"]["detail"]
    assert checks["adapter"]["status"] == checks["target"]["status"] == "ok"
    assert checks["drafter"]["status"] == ("ok" if absent == ["vllm"] else "fail")


def test_torch_devices_are_named(pair, causal_adapter, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Card")
    assert "2 × Card" in found(examine(question(pair, causal_adapter)), "ok")["torch"]
