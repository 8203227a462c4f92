"""`ppow compare` on a directory that an earlier call has filled: what is used again, what is refused.

Left out: training and serving, which stand-ins count here.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import OPTConfig

from ppow_train import cli, pair
from ppow_train.commands import compare
from ppow_train.trajectory_store import only_writer

NAMES = (compare.BASE, "exact")


@pytest.fixture
def served(monkeypatch) -> list[tuple[str, list[float]]]:
    """What is served, instead of serving it."""
    calls: list[tuple[str, list[float]]] = []

    def serve(
        adapter: Any, name: str, trainer: Any, prompts: Any, options: Any, temperatures: Any, most: Any
    ) -> dict[str, Any]:
        monkeypatch.setattr(compare, "started", options, raising=False)
        calls.append((name, list(temperatures)))
        return {f"{t:g}": {"num_accepted_tokens": 30, "num_drafts": 10} for t in temperatures}

    ref = SimpleNamespace(fingerprint="f")
    model = SimpleNamespace(config=OPTConfig(max_position_embeddings=2048))
    target = SimpleNamespace(directory=Path("t"), model=model)
    loaded = SimpleNamespace(target_ref=ref, drafter_ref=ref, target=target)
    monkeypatch.setattr(pair, "load_pair", lambda *args: loaded)
    monkeypatch.setattr("ppow_train.generation.load_tokenizer", lambda directory: None)
    monkeypatch.setattr("ppow_train.prompts.text_ids", lambda texts, _: [[1] * len(text) for text in texts])
    monkeypatch.setattr(compare._Trainer, "adapter", lambda *args: None)
    monkeypatch.setattr(compare._Trainer, "check", lambda *args: None)
    monkeypatch.setattr(compare._Trainer, "out_of_the_way", lambda *args: contextlib.nullcontext())
    monkeypatch.setattr(compare, "_serve", serve)
    return calls


@pytest.fixture
def run(tmp_path, served):
    prompts, held_out = tmp_path / "prompts.jsonl", tmp_path / "held_out.jsonl"
    prompts.write_text('{"prompt": "a"}\n', encoding="utf-8")
    held_out.write_text('{"prompt": "h"}\n', encoding="utf-8")

    def call(*options: str) -> int:
        served.clear()
        files = ["--prompts", str(prompts), "--held-out", str(held_out), "--output", str(tmp_path / "out")]
        return cli.run(
            [
                "compare",
                "--target",
                "t",
                "--drafter",
                "d",
                *files,
                "--objective",
                "exact",
                "--seed",
                "0",
                *options,
            ]
        )

    return call


def test_outputs_of_one_token_in_which_nothing_is_drafted_are_wrong_usage(run, served, capsys):
    assert run("--max-tokens", "1") == 2
    assert "--max-tokens" in capsys.readouterr().err
    assert served == []


def test_the_same_again_serves_nothing(run, served, tmp_path):
    assert run() == 0
    assert served == [(name, [1.0, 0.0]) for name in NAMES]
    table = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert run() == 0
    assert served == []
    assert (tmp_path / "out" / "table.md").read_text(encoding="utf-8") == table


@pytest.mark.parametrize(
    ("options", "change"),
    [
        (["--steps", "7"], "steps 100 (now 7)"),
        (["--max-tokens", "8"], "max_tokens 64 (now 8)"),
        (["--max-new-tokens", "8"], "max_new_tokens 128 (now 8)"),
        (["--serving-temperature", "0"], "serving_temperature 1.0 (now 0.0)"),
        (["--learning-rate", "exact=0.5"], "learning_rate of exact None (now 0.5)"),
    ],
)
def test_other_options_are_refused(options, change, run, served, capsys):
    assert run() == 0
    assert run(*options) != 0
    assert served == []
    message = capsys.readouterr().err
    assert change in message
    assert "give the same options, or name another --output" in message


def test_other_prompts_are_refused(run, tmp_path, capsys):
    assert run() == 0
    (tmp_path / "held_out.jsonl").write_text('{"prompt": "b"}\n', encoding="utf-8")
    assert run() != 0
    assert "held_out" in capsys.readouterr().err


def test_prompts_that_judge_are_not_trained_on(run, served, tmp_path, capsys):
    (tmp_path / "held_out.jsonl").write_text('{"prompt": "b"}\n{"prompt": "a"}\n', encoding="utf-8")
    assert run() == 1
    assert served == []
    assert "1 prompts of" in capsys.readouterr().err


def test_other_versions_are_refused(run, served, capsys, monkeypatch):
    assert run() == 0
    version = compare.importlib.metadata.version
    monkeypatch.setattr(
        compare.importlib.metadata, "version", lambda name: "9.9" if name == "trl" else version(name)
    )
    assert run() == 1
    assert served == []
    assert f"version of trl {version('trl')} (now 9.9)" in capsys.readouterr().err


def test_two_processes_do_not_fill_one_directory(run, served, tmp_path, capsys):
    with only_writer(tmp_path / "out"):
        assert run() == 1
    assert served == []
    assert "is being written by another process" in capsys.readouterr().err
    assert run() == 0


def test_results_of_unknown_options_are_refused(run, served, tmp_path, capsys):
    assert run() == 0
    (tmp_path / "out" / compare.FACTS).unlink()
    assert run() != 0
    assert served == []
    assert "no compare.json" in capsys.readouterr().err


def test_a_temperature_added_later_is_served_alone(run, served):
    assert run("--temperature", "1") == 0
    assert run("--temperature", "1", "--temperature", "0.5") == 0
    assert served == [(name, [0.5]) for name in NAMES]
    assert run("--temperature", "0.5", "--temperature", "1") == 0
    assert served == []


def test_a_line_cut_off_by_a_kill_is_served_again(run, served, tmp_path):
    assert run() == 0
    file = tmp_path / "out" / "results.jsonl"
    content = file.read_bytes()
    file.write_bytes(content[:-9])
    assert run() == 0
    assert served == [("exact", [1.0, 0.0])]
    assert file.read_bytes() == content
    assert [json.loads(line)["arm"] for line in content.splitlines()] == list(NAMES)


@pytest.mark.parametrize(
    ("base", "exact", "rows"),
    [
        ((30, 10), (45, 10), ["3.000 (3.000–3.000) | –", "4.500 (4.500–4.500) | +50.0 % (+50.0 … +50.0)"]),
        ((0, 10), (45, 10), ["0.000 (0.000–0.000) | –", "4.500 (4.500–4.500) | –"]),
        ((30, 10), (0, 0), ["3.000 (3.000–3.000) | –", "– | –"]),
        ((0, 0), (0, 0), ["– | –", "– | –"]),
    ],
)
def test_where_there_is_nothing_to_divide_by(base, exact, rows, run, tmp_path, monkeypatch):
    def serve(adapter: Any, name: str, *_: Any) -> dict[str, Any]:
        accepted, drafts = base if name == compare.BASE else exact
        return {"1": {"num_accepted_tokens": accepted, "num_drafts": drafts}}

    monkeypatch.setattr(compare, "_serve", serve)
    assert run("--temperature", "1") == 0
    table = (tmp_path / "out" / "table.md").read_text(encoding="utf-8").splitlines()
    assert table == [
        "| arm | T = 1: accepted per draft | gain over base |",
        "|---|---|---|",
        *(f"| {name} | {row} |" for name, row in zip(NAMES, rows, strict=True)),
    ]


# ---------------------------------------------------------------- models as they are


def test_engines_have_room_for_the_longest_prompt(run, served, tmp_path):
    """Beside 64 output tokens four drafts of 8 + 1."""
    (tmp_path / "held_out.jsonl").write_text(json.dumps({"prompt": "h" * 600}) + "\n", encoding="utf-8")
    assert run() == 0
    assert compare.started.max_model_len == 600 + 64 + 36


def test_a_prompt_that_does_not_fit_is_told_before_anything_is_trained(
    run, served, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(compare._Trainer, "adapter", lambda *args: pytest.fail("trained"))
    (tmp_path / "held_out.jsonl").write_text(json.dumps({"prompt": "h" * 2000}) + "\n", encoding="utf-8")
    assert run() == 1
    assert "need 2064 tokens, the target takes 2048" in capsys.readouterr().err


def test_training_is_where_it_was_asked_for(run, served, monkeypatch, tmp_path, capsys):
    asked: list[Any] = []
    own = pair.load_pair
    monkeypatch.setattr(pair, "load_pair", lambda *args: asked.append(args) or own(*args))
    assert run("--device", "cpu") == 0
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert run() == 1, "another device than before"
    assert "device None (now cuda)" in capsys.readouterr().err
    assert [args[2] for args in asked] == ["cpu", "cuda"]
    trainer = object.__new__(compare._Trainer)
    trainer.__dict__.update(output=tmp_path, steps=2, serving_temperature=1.0, rates={}, device="cpu")
    assert trainer._config("exact", 0).use_cpu
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert run("--device", "cuda") == 1
    assert "--device cuda needs a CUDA device" in capsys.readouterr().err
    assert run("--device", "tpu") == 2
