"""Trajectories that `ppow train` and studies keep: found again when the same would be generated, and only then."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from training_pair import load

from ppow_train import generation
from ppow_train.data import trajectory_key
from ppow_train.generation import load_or_generate, load_tokenizer
from ppow_train.locks import locked
from ppow_train.target_config import config_digest

ASKED: dict[str, Any] = {
    "target_fingerprint": "sha256:0",
    "max_new_tokens": 4,
    "temperature": 0.0,
    "seed": 0,
}


@pytest.fixture
def model(directories) -> Any:
    return load(directories, "causal_lm").target.model


@pytest.fixture
def tokenizer(directories) -> Any:
    return load_tokenizer(directories.target)


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


# ---------------------------------------------------------------- found again, or not


def test_the_key_tells_sets_apart():
    facts = {"a": 1, "b": [2]}
    key = trajectory_key([[1, 2], [3]], facts)
    assert key == trajectory_key([(1, 2), (3,)], {"b": [2], "a": 1})
    others = [([[1], [2, 3]], facts), ([[3], [1, 2]], facts), ([[1, 2], [3]], {**facts, "a": 2})]
    assert len({key, *(trajectory_key(*other) for other in others)}) == 4


def test_what_changes_the_continuations_changes_the_name(model, tokenizer, tmp_path, monkeypatch):
    def kept(**changed: Any) -> int:
        load_or_generate(tmp_path, model, tokenizer, ["windows of"], **{**ASKED, **changed})
        return len(names(tmp_path))

    assert kept() == 1
    assert json.loads((next(tmp_path.iterdir()) / "facts.json").read_text())["end_token_ids"] == [0]
    for number, changed in enumerate(({"seed": 1}, {"temperature": 1.0}, {"max_new_tokens": 3}), start=2):
        assert kept(**changed) == number
    assert kept(target_fingerprint="sha256:1") == 5
    with monkeypatch.context() as edited:
        edited.setattr(model.generation_config, "eos_token_id", [0, 7])
        assert kept() == 6, "other tokens end a continuation"
    with monkeypatch.context() as edited:
        edited.setitem(model.config.rope_parameters, "rope_theta", 5e5)
        assert kept() == 7, "positions turn otherwise"
    with monkeypatch.context() as edited:
        ids = tokenizer("windows of")["input_ids"]
        edited.setattr(generation, "text_ids", lambda texts, _: [ids[1:]])
        assert kept() == 8, "the tokenizer splits the text otherwise"
    monkeypatch.setattr(generation, "generate", lambda *args, **options: pytest.fail("generated again"))
    assert kept() == 8


def test_a_copy_of_a_model_has_its_configuration(model):
    other = copy.deepcopy(model.config)
    other._name_or_path, other.dtype, other.transformers_version = "/elsewhere", "bfloat16", "6.0"
    assert config_digest(other) == config_digest(model.config)
    other.rms_norm_eps *= 2
    assert config_digest(other) != config_digest(model.config)


# ---------------------------------------------------------------- several processes


def test_of_several_that_want_a_set_one_generates_it(model, tokenizer, tmp_path, monkeypatch):
    generate, calls = generation.generate, []

    def slow(*args: Any, **options: Any) -> Any:
        calls.append(threading.get_ident())
        time.sleep(0.5)
        return generate(*args, **options)

    monkeypatch.setattr(generation, "generate", slow)
    loaded: list[Any] = []

    def want() -> None:
        loaded.append(load_or_generate(tmp_path, model, tokenizer, ["windows of"], **ASKED))

    threads = [threading.Thread(target=want) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert len(loaded) == 3
    assert all(one.same_as(loaded[0]) for one in loaded)
    assert len(names(tmp_path)) == 1, "no lock is left"


def test_who_has_the_lock_has_it_alone(tmp_path):
    """Many times over: the lock's file is removed each time, while others wait for it."""
    inside, most, done = 0, 0, 0

    def work() -> None:
        nonlocal inside, most, done
        for _ in range(20):
            with locked(tmp_path / "made" / "set"):
                inside += 1
                most = max(most, inside)
                time.sleep(0.001)
                inside -= 1
                done += 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, done) == (1, 4 * 20)
    assert names(tmp_path / "made") == set()


def test_a_lock_ends_with_its_process_and_with_an_error(tmp_path, caplog):
    program = (
        "import sys, pathlib, time\nfrom ppow_train.locks import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n    print('locked', flush=True)\n    time.sleep(600)\n"
    )
    directory = tmp_path / "set"
    command = [sys.executable, "-c", program, str(directory)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    killer = threading.Timer(0.5, process.kill)
    killer.start()
    with locked(directory):
        assert process.wait(10) < 0, "it had the lock until it was killed"
    with pytest.raises(ZeroDivisionError), locked(directory):
        raise ZeroDivisionError
    assert "set is being made by another process: waiting" in caplog.text
    with locked(directory):
        pass
    assert names(tmp_path) == set()
