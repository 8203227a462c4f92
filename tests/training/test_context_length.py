"""A drafter that takes fewer tokens than its target: said before training, since longer requests are not drafted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from serving_profile import plain_adapter
from training_pair import K

from ppow_train import cli
from ppow_train.commands.profile import _plan
from ppow_train.context_length import context_length, tell_longer
from ppow_train.data import collate
from ppow_train.errors import UserError

LENGTH = {"max_position_embeddings": 64}


def model(directory: Path, config: dict[str, Any]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (LENGTH, 64),
        ({"text_config": LENGTH, "model_type": "some_vl"}, 64),
        ({"transformer_layer_config": LENGTH, "speculators_model_type": "eagle3"}, 64),
        ({"text_config": None} | LENGTH, 64),
        ({"max_position_embeddings": None}, None),
        ({"max_position_embeddings": "64"}, None),
        ({}, None),
    ],
)
def test_where_a_config_says_it(config, length, tmp_path):
    assert context_length(model(tmp_path, config)) == length


def test_the_share_that_is_longer_is_told(tmp_path):
    """A text of as many tokens as the drafter takes is none of them."""
    some = collate([[1] * 60, [1] * 3], [[2] * 4, [2] * 62])
    others = collate([[1] * 60], [[2] * 5])
    told = tell_longer(model(tmp_path, LENGTH), [some, others])
    assert told is not None
    assert "the drafter takes 64 tokens, 2 of 3 prompts with their continuations (67 %) have more" in told
    assert tell_longer(tmp_path, [some.select(some.lengths.eq(64).nonzero().squeeze(-1))]) is None
    assert tell_longer(model(tmp_path, {}), [some, others]) is None


# ---------------------------------------------------------------- the commands


@pytest.fixture
def command(directories, tmp_path, monkeypatch) -> list[str]:
    """Training of a head for 64 tokens on texts of which some are longer; it ends where it would begin to train."""
    head = shutil.copytree(directories.drafter["eagle3"], tmp_path / "head")
    config = json.loads((head / "config.json").read_text())
    config["transformer_layer_config"] |= LENGTH
    (head / "config.json").write_text(json.dumps(config))
    for name, texts in (("prompts", ["of", "q7" * 40]), ("held_out", ["7q" * 40, "tokens"])):
        lines = [json.dumps({"prompt": text}) for text in texts]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))

    def begin(*arguments: Any, **more: Any) -> None:
        raise UserError("began")

    monkeypatch.setattr("ppow_train.training.train_adapter", begin)
    monkeypatch.setattr("ppow_train.estimate.estimate_run", begin)
    train = ["train", "--target", str(directories.target), "--drafter", str(head), "--device", "cpu"]
    train += ["--prompts", str(tmp_path / "prompts.jsonl"), "--held-out", str(tmp_path / "held_out.jsonl")]
    train += ["--output", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), "--max-new-tokens", "16"]
    return [*train, "--num-speculative-tokens", str(K), "--trajectories-per-step", "2"]


@pytest.mark.parametrize("more", [[], ["--estimate"]])
def test_training_says_what_will_not_be_drafted(more, command, capsys):
    assert cli.run([*command, *more]) == 1
    said = capsys.readouterr().err
    assert "began" in said
    assert "Warning: the drafter takes 64 tokens, 2 of 4 prompts with their continuations (50 %)" in said
    assert "longer requests are served without drafts" in said


@pytest.mark.parametrize("nested", [False, True])
def test_a_profile_does_not_measure_beyond_what_the_target_takes(nested, tmp_path):
    """Also of a multimodal target, which says it of its text model."""
    config = {"max_position_embeddings": 600}
    target = model(tmp_path / "target", {"text_config": config} if nested else config)
    asked = {"num_speculative_tokens": 2, "temperature": None, "batch_sizes": (1,), "steps": 2, "rounds": 1}
    asked |= {"max_tokens": 16, "context_lengths": None}
    adapter = plain_adapter(tmp_path / "adapter")
    options, longest = _plan(adapter, target, asked, 10)
    assert options.context_lengths == (128,), "not also 1024"
    assert longest <= 600
    with pytest.raises(UserError, match="the target takes 600"):
        _plan(adapter, target, asked | {"context_lengths": (1024,)}, 10)
