"""What `ppow train` tells when it ends, and what it refuses before it begins: parity, figures, devices, memory."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_training_command import TEXTS, command, jsonl  # noqa: F401  (a fixture)

from ppow_train import cli
from ppow_train.commands import train as train_command
from ppow_train.errors import UserError
from ppow_train.parity import Parity
from ppow_train.walk import ExpectedWalk
from vllm_ppow.metrics import SpecDecodeCounts


@pytest.fixture
def checked(command, tmp_path, monkeypatch):  # noqa: F811
    """Trains with held-out prompts and asks for parity, which `answer` stands for."""
    command.remove("--no-parity")
    command.remove("--json")
    command += ["--held-out", str(jsonl(tmp_path / "held_out.jsonl", ["of", "draft"]))]

    def run(answer: Any, as_json: bool = False) -> int:
        monkeypatch.setattr("ppow_train.commands.training_run.check_parity", answer)
        return cli.run([*command, *(["--json"] if as_json else [])])

    return run


def parity(accepted: int) -> Parity:
    walks = [
        ExpectedWalk(torch.full((10,), 10.0), torch.full((10, 1), share), torch.eye(2).repeat(10, 1, 1))
        for share in (8.0, 4.0)
    ]
    served = SpecDecodeCounts(100, 100, accepted, (accepted,))
    return Parity(walks[0], served, walks[0], walks[1])


@pytest.mark.parametrize(
    "failure", [UserError("The engine of arm 'adapter' stopped: boom"), torch.cuda.OutOfMemoryError("full")]
)
def test_an_engine_that_does_not_start_leaves_adapter_and_figures(failure, checked, tmp_path, capsys):
    def answer(*args: Any) -> None:
        raise failure

    assert checked(answer) == 1
    shown = capsys.readouterr()
    assert "Expected accepted tokens per draft on 2 held-out prompts" in shown.out
    assert f"Adapter: {tmp_path / 'adapter'}" in shown.out
    assert f"parity with vLLM was not checked ({failure})" in shown.err
    assert f"the adapter is written, check it with `ppow bench --adapter {tmp_path / 'adapter'}" in shown.err
    assert (tmp_path / "adapter" / "README.md").is_file()


def test_an_adapter_that_was_not_applied_fails(checked, capsys):
    assert checked(lambda *args: parity(40), as_json=True) == 1
    shown = capsys.readouterr()
    assert "vLLM serves it as if the adapter had not been applied" in shown.err
    assert json.loads(shown.out)["parity"]["holds"] is False


def test_parity_is_told(checked, capsys):
    assert checked(lambda *args: parity(80)) == 0
    told = capsys.readouterr().out
    assert "on vLLM's own texts expected 0.800" in told
    assert "without the adapter 0.400: agree" in told


def test_parity_runs_in_an_engine_as_the_server_has_it(command, tmp_path, capsys, monkeypatch):  # noqa: F811
    started = []

    def no_engine(name: str, options: Any, spec: Any) -> None:
        started.append(options.more)
        raise UserError("not today")

    monkeypatch.setattr("ppow_train.parity.Engine", no_engine)
    command.remove("--no-parity")
    command += ["--held-out", str(jsonl(tmp_path / "held_out.jsonl", ["of", "draft"]))]
    assert cli.run([*command, "--engine-arg", "kv_cache_dtype=fp8"]) == 1
    assert "parity with vLLM was not checked (not today)" in capsys.readouterr().err
    assert started == [{"kv_cache_dtype": "fp8"}]


def test_nothing_accepted_before_is_no_division(capsys):
    before, after = (ExpectedWalk(torch.ones(2), torch.full((2, 1), share)) for share in (0.0, 0.5))
    config = SimpleNamespace(training={"peak_memory_bytes": 1}, target=SimpleNamespace(name_or_path="t"))
    adapter = SimpleNamespace(config=config, directory=Path("a"))
    train_command._report(SimpleNamespace(adapter=adapter, before=before, after=after), None, False)
    assert "0.000 -> 0.500\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("keep_best", "told"),
    [
        (True, "the adapter after 2 of 4 updates, by 9 other held-out prompts (a/selection.png)"),
        (
            False,
            "the adapter after the last of 4 updates, best or not (--no-keep-best); the curve is of 9 other",
        ),
    ],
)
def test_which_adapter_was_written(keep_best, told, capsys):
    chosen = {"prompts": 9, "keep_best": keep_best, "written_after_updates": 2 if keep_best else 4}
    training = {"peak_memory_bytes": 1, "updates": 4, "selection": chosen}
    config = SimpleNamespace(training=training, target=SimpleNamespace(name_or_path="t"))
    adapter = SimpleNamespace(config=config, directory=Path("a"))
    train_command._report(SimpleNamespace(adapter=adapter, before=None, after=None), None, False)
    assert f"Written: {told}" in capsys.readouterr().out


# ---------------------------------------------------------------- before it begins


@pytest.fixture
def unbegun(command, monkeypatch) -> list[str]:  # noqa: F811
    """Nothing may be generated."""
    monkeypatch.setattr("ppow_train.training.load_or_generate", lambda *args, **more: pytest.fail("began"))
    return command


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--config", "seed: -1"], "seed must be in 0..2^32 - 1"),
        (["--config", "learning_rate: -1"], "learning_rate must be > 0"),
        (["--lora-targets", "lm_head"], "lora_targets must name linear layers"),
        (["--config", "logging_steps: 0"], "logging_steps must be"),
        (["--device", "cuda"], "--device cuda needs a CUDA device"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_generated(
    options, says, unbegun, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    if options[0] == "--config":
        (tmp_path / "run.yaml").write_text(options[1])
        options = ["--config", str(tmp_path / "run.yaml")]
    assert cli.run([*unbegun, *options]) == 1
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("held_out", [True, False])
def test_an_engine_argument_without_parity_is_a_usage_error(held_out, unbegun, tmp_path, capsys):
    unbegun.remove("--no-parity")
    if held_out:
        unbegun += ["--no-parity", "--held-out", str(jsonl(tmp_path / "held_out.jsonl", ["of", "draft"]))]
    assert cli.run([*unbegun, "--engine-arg", "kv_cache_dtype=fp8"]) == 2
    assert "--engine-arg is for parity" in capsys.readouterr().err
    assert cli.run([*unbegun, "--engine-arg", "tensor_parallel_size=2"]) == 2
    assert "tensor_parallel_size is set by this command and cannot be chosen here" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [["--device", "gpu"], ["--max-new-tokens", "0"], ["--seed", "-1"], ["--logging-steps", "0"]]
)
def test_wrong_usage_of_train(options, unbegun):
    assert cli.run([*unbegun, *options]) == 2


@pytest.mark.parametrize("name", ["data", "study", "compare"])
def test_a_device_is_one_of_two(name, capsys):
    assert cli.run([name, "--device", "tpu"]) == 2
    assert "'tpu' is not one of 'cpu', 'cuda'" in capsys.readouterr().err


def test_a_gpu_that_is_full_while_the_target_writes_is_told_what_helps(command, monkeypatch, capsys):  # noqa: F811
    def full(*args: Any, **more: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("ppow_train.training.load_or_generate", full)
    assert cli.run(command) == 1
    told = capsys.readouterr().err
    assert "while the target continued prompts.jsonl" in told
    assert "ppow data --batch-size" in told
    assert "--windows-per-forward" not in told


@pytest.mark.parametrize(("line", "code"), [("target_cache: disk", 0), ("", 2)])
def test_a_cache_on_disk_may_be_asked_for_in_a_file(line, code, command, tmp_path, monkeypatch):  # noqa: F811
    manifest = SimpleNamespace(facts={})
    monkeypatch.setattr("ppow_train.trajectory_store.read_manifest", lambda data: manifest)
    monkeypatch.setattr("ppow_train.commands.training_run.estimate", lambda request: None)
    (tmp_path / "run.yaml").write_text(line, encoding="utf-8")
    call = ["train", *command[1:5], "--data", str(tmp_path), "--output", str(tmp_path / "out"), "--estimate"]
    call += ["--cache", str(tmp_path / "c"), "--config", str(tmp_path / "run.yaml")]
    assert cli.run(call) == code


@pytest.mark.parametrize("name", ["bench", "compare"])
def test_every_option_says_what_it_is(name):
    module, _, attribute = cli.COMMANDS[name][0].partition(":")
    found = getattr(importlib.import_module(module), attribute)
    unsaid = [option.name for option in found.params if not getattr(option, "help", None)]
    assert unsaid == []
