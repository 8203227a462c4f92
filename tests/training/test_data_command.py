"""`ppow data` and `ppow train --data` on the tiny models, killed for good in between, and their refusals."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_data_endpoint import Server
from test_data_prompts import DATED, set_today
from training_pair import K

from ppow_train.cli import run
from ppow_train.serving_eval import EngineOptions, Run
from ppow_train.trajectory_store import MANIFEST, TrajectoryStore, read_manifest, read_records

WORDS = ("windows", "of", "draft", "tokens")
TEXTS = [f"{a} {b}" for a in WORDS for b in WORDS] + list(WORDS)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": text}) for text in [*TEXTS, TEXTS[0]]), encoding="utf-8")
    return path


@pytest.fixture
def arguments(directories, prompts):
    """Of `ppow data`, without --output."""
    fixed = {"prompts": prompts, "target": directories.target, "shard-size": 2, "batch-size": 2}
    fixed |= {"max-new-tokens": 24, "seed": 7, "held-out-share": 0.3}
    return ["data", *(str(part) for name, value in fixed.items() for part in (f"--{name}", value))]


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def finished_shards(directory: Path) -> int:
    return len(read_manifest(directory).shards) if (directory / MANIFEST).exists() else 0


def test_killed_and_resumed_it_writes_the_same(arguments, tmp_path, capsys):
    assert run([*arguments, "--output", str(tmp_path / "whole"), "--json"]) == 0
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    assert result["train"] + result["held_out"] == len(TEXTS)
    assert 0 < result["held_out"] < len(TEXTS)
    assert f"{len(TEXTS)} prompts (1 duplicates" in shown.err
    assert "at most" in shown.err

    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "ppow_train.cli", *arguments, "--output", str(killed)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while finished_shards(killed) < 1 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 1 <= finished_shards(killed) < 10, "killed between the first shard and the last"
    assert run([*arguments, "--output", str(killed)]) == 0
    assert files(killed) == files(tmp_path / "whole")
    assert "ppow train" in capsys.readouterr().out


def test_continuations_are_the_targets_own(arguments, directories, tmp_path):
    """Greedy ones are argmax chains from the tokens of the prompt."""
    import torch
    from transformers import AutoModelForCausalLM

    assert run([*arguments, "--temperature", "0", "--limit", "3", "--output", str(tmp_path / "set")]) == 0
    model = AutoModelForCausalLM.from_pretrained(directories.target)
    prompt_ids, completion_ids = read_records(tmp_path / "set", held_out=False)
    assert prompt_ids
    for prompt, completion in zip(prompt_ids, completion_ids, strict=True):
        ids = torch.tensor([prompt + completion])
        predicted = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].argmax(-1)
        assert predicted.tolist() == completion


def test_train_on_it(arguments, directories, tmp_path, capsys):
    data, adapter = tmp_path / "set", tmp_path / "adapter"
    assert run([*arguments, "--output", str(data)]) == 0
    train = ["train", "--target", str(directories.target), "--drafter", str(directories.drafter["causal_lm"])]
    train += [
        "--data",
        str(data),
        "--output",
        str(adapter),
        "--num-speculative-tokens",
        str(K),
        "--device",
        "cpu",
    ]
    train += ["--max-steps", "10", "--trajectories-per-step", "4", "--windows-per-step", "8", "--json"]
    capsys.readouterr()
    assert run(train) == 0
    training = json.loads(capsys.readouterr().out)["training"]
    manifest = read_manifest(data)
    held_out = sum(shard.held_out for shard in manifest.shards)
    assert 0 < training["trajectories"] <= len(TEXTS) - held_out
    assert set(training["report"]) == {"prompts", "before", "after"}, "held-out prompts were measured on"
    assert training["prompts"] == "set"

    assert run([*train, "--overwrite", "--serving-temperature", "0.5"]) == 1
    assert "--serving-temperature 1.0" in capsys.readouterr().err


def test_through_an_endpoint(directories, prompts, tmp_path, capsys, monkeypatch):
    server = Server()
    monkeypatch.setenv("MY_KEY", "secret")
    command = [
        "data",
        "--target",
        str(directories.target),
        "--prompts",
        str(prompts),
        "--max-new-tokens",
        "2",
    ]
    command += [
        "--endpoint",
        server.url,
        "--model",
        "m",
        "--api-key-env",
        "MY_KEY",
        "--output",
        str(tmp_path / "set"),
    ]
    server.models = (200, {"data": [{"id": "m", "max_model_len": 3}]})
    assert run(command) == 1
    assert "--max-prompt-tokens 1" in capsys.readouterr().err
    assert not server.requests
    assert not (tmp_path / "set").exists(), "else other prompts would need another directory"
    server.models = (200, {"data": [{"id": "m", "max_model_len": 128}]})
    assert run(command) == 0
    prompt_ids, completion_ids = read_records(tmp_path / "set", held_out=False)
    assert [row[1] for row in completion_ids] == [ids[-1] + 1 for ids in prompt_ids]
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert "secret" not in (tmp_path / "set" / MANIFEST).read_text()
    asked = len(server.requests)
    server.http.shutdown()
    server.http.server_close()
    assert run(command) == 0, "a set that is whole needs no server"
    assert len(server.requests) == asked
    monkeypatch.delenv("MY_KEY")
    command[-1] = str(tmp_path / "other")
    assert run(command) == 1
    assert "MY_KEY" in capsys.readouterr().err


def test_it_says_how_many_chats_had_their_answer(directories, tmp_path, capsys):
    import shutil

    target = shutil.copytree(directories.target, tmp_path / "target")
    (target / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.content }}>{% endfor %}", encoding="utf-8"
    )
    rows = [[{"role": "user", "content": word}, {"role": "assistant", "content": "of"}] for word in WORDS]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": row}) for row in rows), "utf-8")
    command = ["data", "--target", str(target), "--prompts", str(tmp_path / "chats.jsonl")]
    command += ["--max-new-tokens", "2", "--held-out-share", "0", "--output", str(tmp_path / "set")]
    assert run(command) == 0
    assert f"{len(WORDS)} chats ended with the assistant's answer" in capsys.readouterr().err


def test_begun_on_one_day_and_gone_on_with_on_the_next(directories, tmp_path, monkeypatch, capsys):
    import shutil

    target = shutil.copytree(directories.target, tmp_path / "target")
    (target / "chat_template.jinja").write_text(DATED, encoding="utf-8")
    rows = [[{"role": "user", "content": text}] for text in TEXTS]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": row}) for row in rows), "utf-8")
    command = [
        "data",
        "--target",
        str(target),
        "--prompts",
        str(tmp_path / "chats.jsonl"),
        "--shard-size",
        "8",
    ]
    command += ["--max-new-tokens", "2", "--held-out-share", "0.3", "--output"]
    set_today(monkeypatch, 2031, 3, 3)
    assert run([*command, str(tmp_path / "whole")]) == 0
    begun = tmp_path / "begun"
    with monkeypatch.context() as cut_off:
        add = TrajectoryStore.add
        cut_off.setattr(TrajectoryStore, "add", lambda self, *rows: add(self, *rows) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run([*command, str(begun)])
    assert finished_shards(begun) == 1
    set_today(monkeypatch, 2031, 3, 4)
    assert run([*command, str(begun)]) == 0
    assert files(begun) == files(tmp_path / "whole"), "split and all"


# ---------------------------------------------------------------- refusals


def changed(arguments: list[str], flag: str, value: str | None) -> list[str]:
    """The command line with an option changed, or without it."""
    place = arguments.index(flag)
    return arguments[:place] + ([flag, value] if value is not None else []) + arguments[place + 2 :]


@pytest.mark.parametrize(
    ("drop", "extra", "said"),
    [
        ("--prompts", [], "exactly one of --prompts and --dataset"),
        (None, ["--dataset", "some/set"], "exactly one of --prompts and --dataset"),
        (None, ["--endpoint", "http://127.0.0.1:1/v1"], "--endpoint and --model"),
        (None, ["--model", "m"], "--endpoint and --model"),
        (None, ["--split", "test"], "--split belongs to --dataset"),
        (None, ["--api-key-env", "X"], "--api-key-env has no effect with hf"),
        (None, ["--compile"], "--compile has no effect with hf"),
        (None, ["--engine-arg", "quantization=fp8"], "--engine-arg has no effect with hf"),
        (None, ["--engine-arg", "dtype=float32"], "dtype is set by this command: use --dtype"),
        (None, ["--endpoint", "http://127.0.0.1:1/v1", "--model", "m", "--engine", "hf"], "one of --engine and"),
        (None, ["--endpoint", "http://127.0.0.1:1/v1", "--model", "m"], "--batch-size has no effect with endpoint"),
        (None, ["--temperature", "-1"], "--temperature"),
        (None, ["--engine", "magic"], "--engine"),
    ],
)  # fmt: skip
def test_wrong_usage(drop: Any, extra: list[str], said: str, arguments, tmp_path, capsys):
    arguments = changed(arguments, drop, None) if drop else arguments
    assert run([*arguments, "--output", str(tmp_path / "set"), *extra]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--max-new-tokens", "128", "the target takes 128"),
        ("--held-out-share", "1", "--held-out-share 1 sets all"),
        ("--prompts", "absent.jsonl", "cannot be read"),
        ("--target", "./absent", "does not exist"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_written(
    flag, value, said, arguments, tmp_path, capsys
):
    assert run([*changed(arguments, flag, value), "--output", str(tmp_path / "set")]) == 1
    shown = capsys.readouterr().err
    assert said in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "set").exists()


def test_other_options_do_not_resume(arguments, tmp_path, capsys):
    limited = [*arguments, "--output", str(tmp_path / "set"), "--limit", "4"]
    assert run(limited) == 0
    before = files(tmp_path / "set")
    for extra in (["--seed", "8"], ["--temperature", "0"], ["--dtype", "float32"], ["--limit", "5"]):
        assert run([*limited, *extra]) == 1
        assert "was begun with" in capsys.readouterr().err
    assert files(tmp_path / "set") == before


class StandIn:
    """An engine that repeats one token."""

    def __init__(self, name: str, options: EngineOptions, spec: None) -> None:
        STARTED.append(options)

    def __enter__(self) -> StandIn:
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass

    def wait_until_ready(self) -> None:
        pass

    def run(self, prompts: list, *, max_tokens: int, **_: Any) -> Run:
        return Run([[5] * max_tokens for _ in prompts], 1.0, None)


STARTED: list[EngineOptions] = []


def test_engine_arguments_reach_vllm_and_stay_the_same(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ppow_train.serving_eval.Engine", StandIn)
    command = [
        *changed(arguments, "--batch-size", None),
        "--output",
        str(tmp_path / "set"),
        "--engine",
        "vllm",
    ]

    def with_arguments(*given: str) -> int:
        STARTED.clear()
        return run([*command, *(part for one in given for part in ("--engine-arg", one))])

    assert with_arguments("quantization=fp8", "gpu_memory_utilization=0.5") == 0
    assert STARTED[0].more == {"quantization": "fp8", "gpu_memory_utilization": 0.5}
    assert with_arguments("quantization=fp8", "gpu_memory_utilization=0.4") == 0, "memory changes no token"
    assert STARTED == [], "the set is complete"
    assert with_arguments() == 1
    assert "was begun with" in capsys.readouterr().err


def test_data_that_is_none_is_refused_before_models_are_loaded(tmp_path, capsys):
    train = [
        "train",
        "--target",
        "t",
        "--drafter",
        "d",
        "--output",
        str(tmp_path / "a"),
        "--data",
        str(tmp_path),
    ]
    assert run(train) == 1
    assert "not the manifest" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ([], "exactly one of --prompts and --data"),
        (["--prompts", "p.jsonl", "--data", "d"], "exactly one of --prompts and --data"),
        (["--data", "d", "--held-out", "h.jsonl"], "--held-out was settled"),
        (["--data", "d", "--max-new-tokens", "9"], "--max-new-tokens was settled"),
    ],
)
def test_wrong_usage_of_train(extra, said, tmp_path, capsys):
    assert run(["train", "--target", "t", "--drafter", "d", "--output", str(tmp_path / "a"), *extra]) == 2
    assert said in capsys.readouterr().err
