"""What transformers cannot load is refused in a sentence, and code in a model's directory is never run."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest
import torch

from ppow_train import cli
from ppow_train.errors import UserError
from ppow_train.loading import load_causal_lm, read_config, read_tokenizer

CODE = """
from pathlib import Path
from transformers import PretrainedConfig

Path(r"{marker}").write_text("code of the model ran")


class FooConfig(PretrainedConfig):
    model_type = "foo"
"""


@pytest.fixture
def target(directories, tmp_path) -> Path:
    return shutil.copytree(directories.target, tmp_path / "target")


def change(directory: Path, **values) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **values}))


@pytest.fixture
def marker(target, tmp_path) -> Path:
    """The target has a model type and code of its own, which would write this file."""
    marker = tmp_path / "ran"
    (target / "configuration_foo.py").write_text(CODE.format(marker=marker))
    change(target, model_type="foo", auto_map={"AutoConfig": "configuration_foo.FooConfig"})
    return marker


@pytest.mark.parametrize("load", [read_config, lambda path: load_causal_lm(path, torch.float32, "cpu")])
def test_code_of_a_model_is_not_run_whoever_says_yes(target, marker, monkeypatch, load):
    monkeypatch.setattr("sys.stdin", io.StringIO("y\ny\n"))
    with pytest.raises(UserError, match="needs code of its own, which is not run here"):
        load(target)
    assert not marker.exists()


def test_a_tokenizers_code_is_not_run_either(target, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    (target / "tokenization_foo.py").write_text(CODE.format(marker=tmp_path / "ran"))
    config = json.loads((target / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Foo", "auto_map": {"AutoTokenizer": ["tokenization_foo.Foo", None]}}
    (target / "tokenizer_config.json").write_text(json.dumps(config))
    with contextlib.suppress(UserError):  # transformers may have a class of its own for such a model
        read_tokenizer(target)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model_type": "foo"}, "holds no"),
        ({"model_type": "t5", "architectures": ["T5"]}, "holds no causal LM"),
    ],
)
@pytest.mark.parametrize("command", ["train", "data"])
def test_what_is_no_causal_lm(command, values, said, target, directories, tmp_path, capsys):
    change(target, **values)
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "windows of draft"}))
    call = [command, "--target", str(target), "--prompts", str(tmp_path / "prompts.jsonl"), "--device", "cpu"]
    call += ["--output", str(tmp_path / "out"), "--max-new-tokens", "8"]
    if command == "train":
        call += ["--drafter", str(directories.drafter["causal_lm"])]
    assert cli.run(call) == 1
    shown = capsys.readouterr().err
    assert said in shown
    assert "Traceback" not in shown


def test_a_drafter_of_an_unknown_kind(directories, tmp_path, capsys):
    drafter = shutil.copytree(directories.drafter["causal_lm"], tmp_path / "drafter")
    change(drafter, model_type="foo")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "windows of draft"}))
    call = ["train", "--target", str(directories.target), "--drafter", str(drafter), "--device", "cpu"]
    call += ["--prompts", str(tmp_path / "prompts.jsonl"), "--output", str(tmp_path / "out")]
    assert cli.run(call) == 1
    shown = capsys.readouterr().err
    assert str(drafter) in shown
    assert "Traceback" not in shown
