"""`ppow serve`: the command it becomes, what it refuses, and that it hands the process over."""

from __future__ import annotations

import json
import os
import shlex
import sys

import pytest
from serving_pair import random_adapter

from ppow_train import cli


def run(capsys, *argv):
    code = cli.run(["serve", *argv])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def dry(capsys, *argv):
    code, out, err = run(capsys, *argv, "--dry-run")
    assert (code, err) == (0, "")
    command = shlex.split(out)
    assert command[:2] == ["vllm", "serve"]
    return command[2], json.loads(command[4]), command[5:]


def test_options_of_vllm_pass_through_in_order(capsys):
    vllm_options = [
        "--port",
        "80",
        "-tp",
        "2",
        "-O3",
        "-dph",
        "x",
        "--no-enable-prefix-caching",
        "--middleware",
        "a.b",
    ]
    target, spec, rest = dry(capsys, "org/target", "--adapter", "A", *vllm_options, "-K", "4")
    assert (target, rest) == ("org/target", vllm_options)
    assert spec == {"method": "ppow", "model": "A", "num_speculative_tokens": 4}


def test_every_option_of_ours_has_its_key(capsys):
    _, spec, rest = dry(
        capsys,
        *("org/target", "--adapter", "org/adapter", "--adapter-revision", "v1", "--drafter", "D"),
        *("--draft-sample-method", "greedy", "--allow-target-mismatch"),
        *("--speculative-options", '{"draft-tensor-parallel-size": 1, "ppow": {"window": "fixed"}}'),
    )
    assert rest == []
    assert spec == {
        "method": "ppow",
        "model": "org/adapter",
        "revision": "v1",
        "draft_sample_method": "greedy",
        "draft_tensor_parallel_size": 1,
        "ppow": {"base_drafter": "D", "allow_target_mismatch": True, "window": "fixed"},
    }


@pytest.mark.parametrize(("given", "kept"), [(None, "lora_filesystem_resolver"), ("other", "other")])
def test_hot_swap_names_a_directory_and_our_routes(capsys, monkeypatch, tmp_path, given, kept):
    """vLLM adds routes only for plugins that VLLM_PLUGINS names, and then loads no others."""
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if given:
        monkeypatch.setenv("VLLM_PLUGINS", given)
    code, out, _ = run(capsys, "T", "--adapter", "A", "--hot-swap", str(tmp_path), "--dry-run")
    assert code == 0
    variable, *command = shlex.split(out)
    plugins = variable.removeprefix("VLLM_PLUGINS=").split(",")
    assert {"ppow", kept} <= set(plugins)
    assert len(plugins) == len(set(plugins))
    assert json.loads(command[4])["ppow"] == {"hot_swap": True, "hot_swap_directory": str(tmp_path)}


@pytest.mark.parametrize(
    "option",
    [
        "--speculative-config",
        "--speculative_config={}",
        "--speculative-config.method",
        "-sc",
        "--spec-method",
        "--spec_model",
    ],
)
def test_saying_it_twice_is_wrong_usage(capsys, option):
    code, _, err = run(capsys, "T", "--adapter", "A", option, "x")
    assert code == 2
    assert "leave it out" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--port", "80", "T", "--adapter", "A"], "give the target first"),
        (["T", "--adapter", "A", "-K", "0"], "0 is not in the range x>=1"),
        (["T"], "Missing option '--adapter'"),
        (["T", "--adapter", "A", "--speculative-options", "{"], "is not JSON"),
        (["T", "--adapter", "A", "--speculative-options", '{"ppow": 1}'], "must be a JSON object"),
        (["T", "--adapter", "A", "--speculative-options", '{"model": "B"}'], "says 'model' again"),
        (
            [
                "T",
                "--adapter",
                "A",
                "--drafter",
                "D",
                "--speculative-options",
                '{"ppow": {"base_drafter": "E"}}',
            ],
            "again",
        ),
    ],
)
def test_wrong_usage(capsys, argv, message):
    code, _, err = run(capsys, *argv, "--dry-run")
    assert code == 2
    assert message in err


def test_a_bad_adapter_is_refused_before_vllm_is_imported(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("vLLM was started"))
    monkeypatch.setitem(sys.modules, "vllm", None)  # an import of it fails
    code, _, err = run(capsys, "T", "--adapter", str(tmp_path))
    assert code == 1
    assert "lacks ppow_config.json" in err


def test_the_process_becomes_vllms(capsys, pair, tmp_path, monkeypatch):
    adapter = random_adapter(tmp_path, "causal_lm", pair)
    started = []
    monkeypatch.setattr(os, "execv", lambda program, argv: started.append((program, argv)))
    assert run(capsys, "T", "--adapter", str(adapter.directory), "--port", "80")[0] == 0
    ((program, argv),) = started
    assert program == argv[0] == sys.executable
    assert argv[1:5] == ["-m", "vllm.entrypoints.cli.main", "serve", "T"]
    assert argv[-2:] == ["--port", "80"]


def test_without_vllm_it_says_what_to_install(capsys, pair, tmp_path, monkeypatch):
    import importlib.util

    adapter = random_adapter(tmp_path, "causal_lm", pair)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "vllm" else find(name, *rest)
    )
    capsys.readouterr()
    code, _, err = run(capsys, "T", "--adapter", str(adapter.directory))
    assert code == 1
    assert err.startswith("Error: vllm is not installed: pip install '.[cpu]'")
