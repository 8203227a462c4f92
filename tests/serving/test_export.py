"""`ppow export`: PEFT's own merge in the base's format, whole or not at all."""

from __future__ import annotations

import errno
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from serving_pair import checkpoint_name, load_drafter, random_adapter, random_lora

from ppow_train import cli
from ppow_train.export import export_drafter
from vllm_ppow.artifact import fingerprint_safetensors

KINDS = ("eagle3", "causal_lm", "original")


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def adapter(pair, tmp_path_factory, kind):
    return random_adapter(tmp_path_factory.mktemp("export"), kind, pair)


def export(adapter, output, *more):
    return cli.run(["export", "--adapter", str(adapter.directory), "--output", str(output), *more])


def test_tensors_are_pefts_merge_bit_for_bit_and_the_rest_is_the_bases(pair, adapter, kind, tmp_path, capsys):
    base, output = pair.drafter(kind), tmp_path / "new" / "out"
    assert export(adapter, output) == 0
    config = json.loads(capsys.readouterr().out)
    assert config["model"] == str(output)
    assert config["method"] == ("draft_model" if kind == "causal_lm" else "eagle3")
    found, before = load_file(output / "model.safetensors"), load_file(base / "model.safetensors")
    reference = random_lora(load_drafter(kind, base, pair.target)).merge_and_unload().state_dict()
    wanted = {checkpoint_name(kind, name): tensor for name, tensor in reference.items()}
    assert list(found) == list(before)
    changed = [name for name in found if not torch.equal(found[name], before[name])]
    assert len(changed) == 7, "the adapter has seven linear layers"
    for name in changed:
        assert torch.equal(found[name], wanted[name].to(found[name].dtype)), name
    assert (output / "config.json").read_bytes() == (base / "config.json").read_bytes()
    card = (output / "README.md").read_text()
    assert adapter.config.adapter_fingerprint in card
    assert str(tmp_path.parent) not in card, "a path of this machine"
    assert not list(output.parent.glob(".out*")), "nothing temporary is left"


def test_a_drafter_with_a_broken_header_is_refused_in_a_sentence(pair, adapter, kind, tmp_path, capsys):
    """Metadata, which no fingerprint sees, and which the safetensors library does not read so."""
    base = shutil.copytree(pair.drafter(kind), tmp_path / "base")
    file = base / "model.safetensors"
    whole = file.read_bytes()
    size = 8 + int.from_bytes(whole[:8], "little")
    text = json.dumps({**json.loads(whole[8:size]), "__metadata__": {"format": 5}}).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + whole[size:])
    assert export(adapter, tmp_path / "out", "--drafter", str(base)) == 1
    assert "is not a readable safetensors file: copy or download it again." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_shards_tokenizer_and_index_are_kept(pair, tmp_path):
    adapter = random_adapter(tmp_path, "causal_lm", pair)
    base = tmp_path / "sharded"
    base.mkdir()
    tensors = load_file(pair.causal_lm / "model.safetensors")
    names = sorted(tensors)
    index: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, base / file)
        index |= dict.fromkeys(part, file)
    shutil.copy(pair.causal_lm / "config.json", base)
    kept = {
        "model.safetensors.index.json": json.dumps({"weight_map": index}),
        "tokenizer.json": "{}",
        "chat_template.jinja": "x",
        "merges.txt": "m",
    }
    left = {
        "pytorch_model.bin": "pickle",
        "modeling.py": "code",
        "ppow_config.json": "{}",
        "README.md": "the base's card",
    }
    for name, text in {**kept, **left}.items():
        (base / name).write_text(text)
    assert export(adapter, tmp_path / "out", "--drafter", str(base)) == 0
    assert export(adapter, tmp_path / "whole") == 0
    files = {path.name for path in (tmp_path / "out").iterdir()}
    shards = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    assert files == {*shards, "config.json", *kept, "README.md"}
    assert "the base's card" not in (tmp_path / "out" / "README.md").read_text()
    assert fingerprint_safetensors(*(tmp_path / "out" / name for name in shards)) == fingerprint_safetensors(
        tmp_path / "whole" / "model.safetensors"
    )


def test_what_exists_is_not_touched(pair, tmp_path, capsys):
    adapter = random_adapter(tmp_path, "causal_lm", pair)
    output = tmp_path / "out"
    output.mkdir()
    assert export(adapter, output) == 0, "an empty directory is fine"
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    capsys.readouterr()
    assert export(adapter, output) == 1
    assert (
        f"Error: {output} exists and is not an empty directory: name another output."
        in capsys.readouterr().err
    )
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    (tmp_path / "file").write_text("mine")
    assert export(adapter, tmp_path / "file") == 1
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("when", ["before", "while"])
def test_a_full_disk_leaves_nothing_behind(pair, tmp_path, monkeypatch, capsys, when):
    adapter = random_adapter(tmp_path, "causal_lm", pair)
    there = set(tmp_path.iterdir())
    if when == "before":
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    else:

        def copyfile(source, target):
            target.write_bytes(b"part")
            raise OSError(errno.ENOSPC, "No space left on device", str(target))

        monkeypatch.setattr(shutil, "copyfile", copyfile)
    assert export(adapter, tmp_path / "out") == 1
    assert "No space left on device" in capsys.readouterr().err
    assert set(tmp_path.iterdir()) == there


def test_an_incomplete_merge_writes_nothing(pair, tmp_path):
    adapter = random_adapter(tmp_path, "causal_lm", pair)
    base = tmp_path / "base"
    base.mkdir()
    tensors = load_file(pair.causal_lm / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, base / "model.safetensors")
    shutil.copy(pair.causal_lm / "config.json", base)
    with pytest.raises(ValueError, match=r"has tensors for layers.0.mlp.up_proj, which .* does not contain"):
        export_drafter(adapter, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_path_that_vllm_would_take_for_another_method_is_refused(pair, tmp_path, capsys):
    adapter = random_adapter(tmp_path, "causal_lm", pair)
    assert export(adapter, tmp_path / "my-eagle3-drafter") == 1
    assert "which vLLM takes for another speculative method" in capsys.readouterr().err
