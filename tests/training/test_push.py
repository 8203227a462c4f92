"""Uploading: asked before training, done after parity, and nothing private goes along. Only the Hub is not real."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalTokenNotFoundError
from test_selection import config_of, continued
from test_training_runs import open_pair

from ppow_train import push as push_module
from ppow_train.cli import run
from ppow_train.errors import UserError
from ppow_train.parity import Parity
from ppow_train.push import Push, push_adapter, take_push
from ppow_train.trainer import PPOWTrainer
from ppow_train.training import train_adapter
from ppow_train.walk import ExpectedWalk
from vllm_ppow.artifact import PEFT_WEIGHTS, Adapter, read_adapter
from vllm_ppow.metrics import SpecDecodeCounts

ME = {"name": "me", "orgs": [{"name": "lab"}], "auth": {"accessToken": {"role": "write"}}}


class FakeHub:
    """Stands for `HfApi`: remembers what it is asked to do."""

    def __init__(self, user: Any = ME, upload_error: Exception | None = None) -> None:
        self.user, self.upload_error = user, upload_error
        self.repos: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}
        self.asked = 0

    def __call__(self) -> FakeHub:
        return self

    def whoami(self) -> dict:
        self.asked += 1
        if isinstance(self.user, Exception):
            raise self.user
        return self.user

    def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> str:
        self.repos[repo_id] = private
        return f"https://hub/{repo_id}"

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
        assert repo_id in self.repos
        if self.upload_error:
            raise self.upload_error
        self.files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}


@pytest.fixture
def hub(monkeypatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr(push_module, "HfApi", fake)
    return fake


@pytest.fixture(scope="module")
def adapter(directories, tmp_path_factory, progress) -> Adapter:
    """A trained one, of local models."""
    root = tmp_path_factory.mktemp("adapter")
    rows = continued(directories, [[i, 9, 4] for i in range(60, 72)], seed=1)
    pair, config = open_pair(directories, "causal_lm"), config_of(root, eval_steps=None, max_steps=1)
    return train_adapter(pair, rows, config, root / "my-adapter", held_out=rows, progress=progress).adapter


# ---------------------------------------------------------------- before training


def test_the_options_are_taken_out_and_complete_each_other(hub, tmp_path):
    values = {"push_to_hub": True, "hub_private_repo": False, "max_steps": 3}
    assert take_push(values, tmp_path / "my-adapter") == Push("me/my-adapter", private=False)
    assert values == {"max_steps": 3}
    named = {"push_to_hub": True, "hub_model_id": "lab/other"}
    assert take_push(named, tmp_path) == Push("lab/other", private=True)
    assert take_push({"hub_model_id": "not / a name"}, tmp_path) is None, (
        "nothing is asked where nothing is wanted"
    )
    assert hub.asked == 2


@pytest.mark.parametrize(
    ("name", "user", "parts"),
    [
        ("a b", ME, ["hub_model_id 'a b' is no name"]),
        ("me/x", LocalTokenNotFoundError("no token"), ["needs a login", "hf auth login"]),
        ("me/x", ConnectionError("no route"), ["no route", "HF_TOKEN"]),
        ("me/x", ME | {"auth": {"accessToken": {"role": "read"}}}, ["may only read"]),
        ("google/x", ME, ["me cannot write to google", "me or lab"]),
    ],
)
def test_what_is_refused_before_training(name, user, parts, monkeypatch, tmp_path):
    monkeypatch.setattr(push_module, "HfApi", FakeHub(user))
    with pytest.raises(UserError) as refused:
        take_push({"push_to_hub": True, "hub_model_id": name}, tmp_path)
    assert all(part in str(refused.value) for part in parts)
    assert "\n" not in str(refused.value)


def test_transformers_must_not_upload_while_training(tmp_path):
    with pytest.raises(UserError, match="push_adapter"):
        config_of(tmp_path, push_to_hub=True)


# ---------------------------------------------------------------- the upload


def test_what_is_uploaded_can_be_read_and_names_no_path(hub, adapter, tmp_path):
    before = {path.name: path.read_bytes() for path in adapter.directory.iterdir()}
    assert push_adapter(adapter, Push("me/my-adapter", private=True), None) == "https://hub/me/my-adapter"
    assert hub.repos == {"me/my-adapter": True}
    assert {path.name: path.read_bytes() for path in adapter.directory.iterdir()} == before
    for name, content in hub.files.items():
        (tmp_path / name).write_bytes(content)
        if name != PEFT_WEIGHTS:
            assert str(adapter.directory.parent).encode() not in content
            assert adapter.config.target.name_or_path.encode() not in content
    uploaded = read_adapter(tmp_path)
    assert uploaded.config.adapter_fingerprint == adapter.config.adapter_fingerprint
    assert uploaded.config.base_drafter.name_or_path == "causal_lm"
    assert uploaded.peft_config["base_model_name_or_path"] == "causal_lm"
    assert [path.name for path in adapter.directory.parent.glob("*my-adapter*")] == ["my-adapter"], (
        "no copy is left"
    )
    assert '"model": "me/my-adapter"' in hub.files["README.md"].decode()


def test_a_drafter_of_the_hub_goes_by_its_repo(hub, adapter):
    """PEFT records the snapshot that it was read from."""
    ref = dataclasses.replace(adapter.config.base_drafter, name_or_path="org/drafter", revision="c0ffee")
    of_hub = dataclasses.replace(adapter, config=dataclasses.replace(adapter.config, base_drafter=ref))
    push_adapter(of_hub, Push("me/my-adapter", private=True), None)
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "org/drafter"
    assert "base_model: org/drafter" in hub.files["README.md"].decode()


def test_an_upload_that_fails_leaves_the_adapter_and_a_copy_that_may_be_uploaded(hub, adapter):
    place = adapter.directory.parent
    before = {path.name for path in place.iterdir()}
    hub.upload_error = RuntimeError("quota\nexceeded")
    kept = []
    for private, flag in ((True, " --private"), (False, "")):
        with pytest.raises(UserError) as refused:
            push_adapter(adapter, Push("me/my-adapter", private=private), None)
        message = str(refused.value)
        assert "quota exceeded)" in message
        assert f"it is in {adapter.directory};" in message
        kept += sorted({path for path in place.iterdir() if path.name not in before} - set(kept))
        assert message.endswith(f"`hf upload me/my-adapter {kept[-1]}{flag}`.")
    assert [path.name.partition(".upload")[0] for path in kept] == ["my-adapter"] * 2, "an earlier one stays"
    assert read_adapter(adapter.directory) == adapter
    for copy in kept:
        assert read_adapter(copy).config.adapter_fingerprint == adapter.config.adapter_fingerprint
        for file in copy.iterdir():
            assert str(place).encode() not in file.read_bytes()
        shutil.rmtree(copy)


# ---------------------------------------------------------------- the command


@pytest.fixture
def train(directories, tmp_path, monkeypatch):
    """`ppow train --push-to-hub` with more arguments; parity as told, without vLLM."""
    text = "windows of draft tokens are drawn from what the target wrote"
    lines = [json.dumps({"prompt": text[start : start + 6]}) for start in range(0, 50, 2)]
    prompts, held_out = tmp_path / "prompts.jsonl", tmp_path / "held_out.jsonl"
    prompts.write_text("\n".join(lines[9:]), encoding="utf-8")
    held_out.write_text("\n".join(lines[:9]), encoding="utf-8")

    def call(*more: str, holds: bool = True) -> int:
        served = SpecDecodeCounts(100, 200, 60 if holds else 200, (40, 20) if holds else (100, 100))
        drafts, accepted = torch.full((10,), 10.0), torch.tensor([[4.0, 2.0]] * 10)
        walk = ExpectedWalk(drafts, accepted, torch.eye(2).repeat(10, 1, 1))
        parity = Parity(walk, served, walk, walk)
        monkeypatch.setattr("ppow_train.commands.training_run.check_parity", lambda *args: parity)
        command = [
            "train",
            "--target",
            str(directories.target),
            "--drafter",
            str(directories.drafter["causal_lm"]),
        ]
        command += ["--prompts", str(prompts), "--output", str(tmp_path / "out"), "--device", "cpu"]
        command += [
            "--cache",
            str(tmp_path / "cache"),
            "--max-new-tokens",
            "12",
            "--max-steps",
            "10",
            "--json",
        ]
        command += [
            "--num-speculative-tokens",
            "2",
            "--trajectories-per-step",
            "2",
            "--windows-per-step",
            "4",
        ]
        return run([*command, "--push-to-hub", *more])

    call.held_out = held_out
    return call


def test_the_command_uploads_what_parity_lets_through(hub, train, tmp_path, capsys):
    held_out = ("--held-out", str(train.held_out))
    assert train(*held_out, holds=False) == 1
    assert "It was not uploaded" in capsys.readouterr().err
    assert hub.repos == {}
    assert "**differs**" in (tmp_path / "out" / "README.md").read_text("utf-8")

    assert train(*held_out, "--overwrite") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["parity"]["holds"] is True
    assert "Uploaded: https://hub/me/out" in captured.err
    assert "agrees at every position" in hub.files["README.md"].decode()
    assert "agrees at every position" in (tmp_path / "out" / "README.md").read_text("utf-8")


def test_an_adapter_that_gains_nothing_fails_and_stays_here(hub, train, tmp_path, monkeypatch, capsys):
    compute_loss = PPOWTrainer._compute_loss
    monkeypatch.setattr(PPOWTrainer, "_compute_loss", lambda *args: -compute_loss(*args))  # unlearns
    assert train("--held-out", str(train.held_out)) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["training"]["gain_above_zero"] is False
    assert "do not serve it" in captured.err
    assert "It was not uploaded" in captured.err
    assert hub.repos == {}
    assert read_adapter(tmp_path / "out").directory == tmp_path / "out"


def test_the_last_adapter_is_judged_where_it_is_the_one_that_is_written(
    hub, train, tmp_path, monkeypatch, capsys
):
    """Not the best of the curve, which gained: that one is on no disk."""
    monkeypatch.setattr("ppow_train.selection.Judge.__call__", _seeing(0.5, 0.6, 0.7, 0.4, 0.55))
    held_out = ("--held-out", str(train.held_out), "--eval-steps", "5")
    assert train(*held_out, "--no-keep-best") == 1
    captured = capsys.readouterr()
    training = json.loads(captured.out)["training"]
    assert [accepted for _, accepted in training["selection"]["curve"]] == [0.6, 0.7, 0.4]
    assert training["gain_above_zero"] is False
    assert "the one after 5 updates accepted more (0.700): drop --no-keep-best. It was not" in captured.err
    assert hub.repos == {}


@pytest.mark.parametrize("holds", [True, False])
def test_a_run_that_diverges_fails_and_says_which_adapter_it_kept(
    hub, train, tmp_path, monkeypatch, capsys, holds
):
    """In one sentence, or in a line before the sentence on what is wrong with that adapter."""
    compute_loss = PPOWTrainer._compute_loss

    def spoilt(self, model, inputs):
        return compute_loss(self, model, inputs) * (float("nan") if self.state.global_step == 5 else 1.0)

    monkeypatch.setattr(PPOWTrainer, "_compute_loss", spoilt)
    monkeypatch.setattr("ppow_train.selection.Judge.__call__", _rising())
    assert train("--held-out", str(train.held_out), "--eval-steps", "2", holds=holds) == 1
    captured = capsys.readouterr()
    chosen = json.loads(captured.out)["training"]["selection"]
    assert (chosen["diverged_at_update"], chosen["written_after_updates"]) == (6, 4)
    prefix = "Error: " if holds else ""
    assert f"{prefix}training diverged at update 6: the adapter of update 4, the best" in captured.err
    assert ("do not trust its figures" in captured.err) is not holds
    assert captured.err.count("Error: ") == 1
    assert "It was not uploaded" in captured.err
    assert hub.repos == {}
    assert read_adapter(tmp_path / "out").directory == tmp_path / "out"
    assert not (tmp_path / "out.checkpoints").exists()


def _seeing(*accepted: float) -> Any:
    """A judge that sees so many accepted tokens per draft, call by call."""
    calls = iter(accepted)

    def judge(self: Any) -> ExpectedWalk:
        return ExpectedWalk(torch.ones(1), torch.tensor([[next(calls)]]))

    return judge


def _rising() -> Any:
    """A judge that sees more accepted tokens at each call."""
    calls = itertools.count(1)

    def judge(self: Any) -> ExpectedWalk:
        return ExpectedWalk(torch.ones(1), torch.tensor([[0.1 * next(calls)]]))

    return judge


def test_nothing_unchecked_is_uploaded_unless_told_so(hub, train, monkeypatch, capsys):
    monkeypatch.setattr("ppow_train.pair.load_pair", lambda *args: pytest.fail("began"))
    assert train() == 1
    assert "parity, which needs --held-out" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert train("--held-out", str(train.held_out)) == 1
    assert "parity, which needs vLLM" in capsys.readouterr().err
    hub.user = LocalTokenNotFoundError("no token")
    assert train("--no-parity") == 1
    assert "hf auth login" in capsys.readouterr().err
