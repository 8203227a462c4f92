"""The adapter directory: written whole or not at all, and read only if it is what it says."""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, replace

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vllm_ppow.artifact import (
    AdapterConfig,
    ArtifactError,
    ModelRef,
    check_output,
    fingerprint_model,
    fingerprint_safetensors,
    fingerprint_scale,
    model_weight_files,
    parse_config,
    read_adapter,
    read_model_config,
    safetensors_ranges,
    write_adapter,
)
from vllm_ppow.resolve import resolve_directory

CONFIG = AdapterConfig(
    drafter_type="eagle3",
    base_drafter=ModelRef("org/drafter", "sha256:1"),
    target=ModelRef("org/target", "sha256:2"),
    num_speculative_tokens=4,
    draft_cost_ratio=0.1,
    draft_sample_method="greedy",
    temperature=0.0,
)


def write_peft(path, value=0.0):
    save_file({"a": torch.full((3000, 2), value), "b": torch.arange(4)}, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text("{}")


def test_what_is_written_is_read(tmp_path):
    adapter = write_adapter(tmp_path / "a", CONFIG, write_peft)
    fingerprints = {"adapter_fingerprint": fingerprint_safetensors(adapter.weights)}
    fingerprints["scale_fingerprint"] = fingerprint_scale({})
    assert adapter.config == replace(CONFIG, **fingerprints)
    assert read_adapter(tmp_path / "a") == adapter
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_failed_write_leaves_the_old_adapter(tmp_path):
    old = write_adapter(tmp_path / "a", CONFIG, write_peft)

    def fail(path):
        write_peft(path, 1.0)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_adapter(tmp_path / "a", CONFIG, fail)
    assert read_adapter(tmp_path / "a") == old
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    new = write_adapter(tmp_path / "a", CONFIG, lambda path: write_peft(path, 1.0))
    assert new.config.adapter_fingerprint != old.config.adapter_fingerprint


def test_a_directory_of_something_else_is_not_replaced(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.txt").write_text("precious")
    with pytest.raises(ArtifactError, match="exists and is not a PPOW adapter"):
        write_adapter(tmp_path / "a", CONFIG, write_peft)
    assert (tmp_path / "a" / "thesis.txt").read_text() == "precious"


def test_the_scale_belongs_to_the_tensors(tmp_path):
    """Files of two runs of one rank: every tensor fits, and changes the drafter by another factor."""
    adapter = write_adapter(tmp_path / "a", CONFIG, write_peft)
    (adapter.directory / "adapter_config.json").write_text('{"target_modules": ["q"]}')
    read_adapter(adapter.directory)  # what does not scale may be rewritten
    (adapter.directory / "adapter_config.json").write_text('{"lora_alpha": 64}')
    with pytest.raises(ArtifactError, match="gives another rank or alpha"):
        read_adapter(adapter.directory)
    config = json.loads((adapter.directory / "ppow_config.json").read_text())
    del config["scale_fingerprint"]  # an adapter from before there was one
    (adapter.directory / "ppow_config.json").write_text(json.dumps(config))
    read_adapter(adapter.directory)


@pytest.mark.parametrize("content", ["[]", "3", "null"])
def test_a_peft_config_that_is_no_object(tmp_path, content):
    adapter = write_adapter(tmp_path / "a", CONFIG, write_peft)
    (adapter.directory / "adapter_config.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"adapter_config.json must hold a JSON object, got"):
        read_adapter(adapter.directory)


def test_an_adapter_is_replaced_through_a_symbolic_link(tmp_path):
    write_adapter(tmp_path / "a", CONFIG, write_peft)
    (tmp_path / "current").symlink_to("a")
    new = write_adapter(tmp_path / "current", CONFIG, lambda path: write_peft(path, 1.0))
    assert (tmp_path / "current").is_symlink()
    assert read_adapter(tmp_path / "a").config == read_adapter(tmp_path / "current").config == new.config
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "current"]


def test_a_mount_point_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr("os.path.ismount", lambda path: str(path) == str(tmp_path))
    with pytest.raises(ArtifactError, match="is a mount point: name a directory inside it"):
        check_output(tmp_path)
    assert check_output(tmp_path / "a") == tmp_path / "a"


def test_weights_are_what_the_index_names(tmp_path):
    """Repos hold them a second time, in the maker's own format; a copy without that is the same model."""
    save_file({"a": torch.zeros(5)}, tmp_path / "model-1.safetensors")
    save_file({"a": torch.zeros(5)}, tmp_path / "consolidated.safetensors")
    alone = fingerprint_safetensors(tmp_path / "model-1.safetensors")
    assert fingerprint_model(tmp_path) == alone
    save_file({"b": torch.zeros(5)}, tmp_path / "stray.safetensors")
    assert fingerprint_model(tmp_path) != alone
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    assert fingerprint_model(tmp_path) == alone
    index.write_text('{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}')
    with pytest.raises(ArtifactError, match=r"lacks model-2\.safetensors, which model"):
        model_weight_files(tmp_path)
    index.unlink()
    (tmp_path / "model-1.safetensors").unlink()
    (tmp_path / "stray.safetensors").unlink()
    assert [path.name for path in model_weight_files(tmp_path)] == ["consolidated.safetensors"]


def test_fingerprints_see_content_and_not_sharding(tmp_path):
    tensors = {"a": torch.zeros(5000, 4), "b": torch.ones(3)}
    save_file(tensors, tmp_path / "whole.safetensors")
    for name, tensor in tensors.items():
        save_file({name: tensor}, tmp_path / f"{name}.safetensors")
    whole = fingerprint_safetensors(tmp_path / "whole.safetensors")
    assert whole == fingerprint_safetensors(tmp_path / "b.safetensors", tmp_path / "a.safetensors")
    for change in (
        {"a": tensors["a"].half()},
        {"a": tensors["a"].view(4, 5000)},
        {"a": torch.zeros(5000, 4) + 1e-6},
    ):
        save_file({**tensors, **change}, tmp_path / "whole.safetensors")
        assert fingerprint_safetensors(tmp_path / "whole.safetensors") != whole


def test_fingerprint_of_a_model_ignores_an_adapter_beside_it(tmp_path):
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    alone = fingerprint_model(tmp_path)
    write_peft(tmp_path)
    assert fingerprint_model(tmp_path) == alone


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "schema_version 2, this version reads 1"),
        ({"gamma": 1}, r"unknown keys \['gamma'\]"),
        ({"drafter_type": "medusa"}, r"drafter_type must be one of \['eagle3', 'causal_lm'\], got 'medusa'"),
        ({"num_speculative_tokens": 0}, "must be a whole number of tokens >= 1, got 0"),
        ({"num_speculative_tokens": True}, "must be a whole number"),
        ({"temperature": -1}, "temperature must be a number >= 0, got -1"),
        ({"draft_sample_method": "beam"}, "draft_sample_method must be one of"),
        ({"adapter_fingerprint": None}, "adapter_fingerprint must be a string"),
        ({"target": "org/target"}, "target must be an object with the keys"),
        ({"target": {"name_or_path": "x", "fingerprint": ""}}, "needs a name_or_path and a fingerprint"),
    ],
)
def test_configs_refused(change, message):
    raw = json.loads(json.dumps(asdict(CONFIG)))
    assert parse_config(raw) == CONFIG
    with pytest.raises(ArtifactError, match=message):
        parse_config(raw | change)


def test_configs_that_are_no_object_or_lack_a_key():
    with pytest.raises(ArtifactError, match="must hold a JSON object, got list"):
        parse_config([])
    raw = asdict(CONFIG)
    del raw["temperature"]
    with pytest.raises(ArtifactError, match=r"lacks \['temperature'\]"):
        parse_config(raw)


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"not safetensors at all", b"\x02\0\0\0\0\0\0\0[]"])
def test_files_that_are_no_safetensors(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"is truncated|is not a readable safetensors file"):
        fingerprint_safetensors(tmp_path / "x.safetensors")


def written(file, header, data=b""):
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return file


def entry(begin, end, dtype="U8", shape=None):
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({"a": entry(0, 4)}, b"1234"),
        ({"b": entry(2, 4), "a": entry(0, 2), "none": entry(2, 2), "one": entry(4, 5, shape=[])}, b"12345"),
        ({"a": entry(0, 3, "F4", [2, 3]), "b": entry(3, 6, "F6_E2M3", [4])}, b"123456"),
        ({"__metadata__": {"format": "pt"}, "a": entry(0, 8, "F32", [1, 2])}, b"12345678"),
        ({"a": entry(0, 4, "I32", [])} | {"__metadata__": None}, b"1234"),
        ({}, b""),
    ],
)
def test_headers_that_the_library_reads_are_read(tmp_path, header, data):
    file = written(tmp_path / "x.safetensors", header, data)
    with safe_open(file, framework="pt") as checkpoint:
        names = set(checkpoint.keys())
    ranges = safetensors_ranges(file)
    assert set(ranges) == names
    start = file.stat().st_size - len(data)
    for name, (_, begin, end) in ranges.items():
        assert [begin - start, end - start] == header[name]["data_offsets"]


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ([], b""),
        ({"a": 5}, b""),
        ({"a": {"dtype": "U8", "shape": [1]}}, b"1"),
        ({"a": entry(0, 4, 5)}, b"1234"),
        ({"a": entry(0, 4, "F32", [2])}, b"1234"),
        ({"a": entry(0, 4, shape=[-1, -4])}, b"1234"),
        ({"a": entry(0, 4, shape=[4.0])}, b"1234"),
        ({"a": entry(0, 4, shape="4")}, b"1234"),
        ({"a": entry(0, 4) | {"data_offsets": [0, 2, 4]}}, b"1234"),
        ({"a": entry(0, 4) | {"data_offsets": [4, 0]}}, b"1234"),
        ({"a": entry(0, 4) | {"data_offsets": [0.0, 4.0]}}, b"1234"),
        ({"a": entry(0, 4) | {"data_offsets": ["0", "4"]}}, b"1234"),
        ({"a": entry(-4, 4)}, b"1234"),
        ({"a": entry(1, 4)}, b"1234"),
        ({"a": entry(0, 2), "b": entry(1, 4)}, b"1234"),
        ({"a": entry(0, 1), "b": entry(2, 4)}, b"1234"),
        ({"a": entry(0, 4)}, b"12345"),
        ({"a": entry(0, 4)}, b"123"),
        ({"a": entry(0, 4), "__metadata__": {"a": 5}}, b"1234"),
        ({"a": entry(0, 4), "__metadata__": []}, b"1234"),
    ],
)
def test_headers_that_the_library_refuses_are_refused_in_a_sentence(tmp_path, header, data):
    file = written(tmp_path / "x.safetensors", header, data)
    with pytest.raises(SafetensorError):
        safe_open(file, framework="pt")
    with pytest.raises(ArtifactError, match=r"is truncated|is not a readable safetensors file"):
        safetensors_ranges(file)


def test_a_header_of_lists_in_lists_in_lists(tmp_path):
    text = b"[" * 100_000
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(ArtifactError, match="is not a readable safetensors file"):
        safetensors_ranges(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "content",
    ["[]", "[" * 100_000, '{"weight_map": ["a"]}', '{"weight_map": {"a": 5}}', '"a"', "{"],
)
def test_an_index_that_names_no_files(tmp_path, content):
    save_file({"a": torch.zeros(5)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"index.json (must map tensors to files|is not readable JSON)"):
        fingerprint_model(tmp_path)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (
            "pytorch_model.bin",
            'pytorch_model.bin is not read, .*see "pickled weights" under "When something is in',
        ),
        ("config.json", r"holds no \*.safetensors weights: give the directory of a model"),
    ],
)
def test_directories_without_safetensors(file, message, tmp_path):
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(ArtifactError, match=message) as caught:
        model_weight_files(tmp_path)
    assert "save_pretrained" not in str(caught.value), "EAGLE heads have no class that has it"


def test_a_file_is_no_directory_of_a_model(tmp_path):
    file = tmp_path / "config.json"
    file.write_text("{}")
    with pytest.raises(
        ArtifactError, match=r"config.json is a file: give the directory that it belongs to\."
    ):
        resolve_directory(str(file))


def test_model_configs(tmp_path):
    with pytest.raises(ArtifactError, match="is not readable JSON"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ArtifactError, match="must hold a JSON object"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 8}')
    assert read_model_config(tmp_path) == {"num_hidden_layers": 8}


@pytest.mark.parametrize("name", ["/nowhere", "./nowhere", "~/nowhere", "nowhere", "a/b/c"])
def test_paths_are_never_taken_for_hub_repos(name, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked the Hub"))
    with pytest.raises(ArtifactError, match="does not exist: check the path"):
        resolve_directory(name)


def test_a_hub_repo_that_cannot_be_had(monkeypatch):
    import huggingface_hub

    def refuse(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ArtifactError, match="neither a directory here nor a Hub repo that can be had"):
        resolve_directory("org/name")
