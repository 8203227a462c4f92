"""`ppow serve`: the command it becomes, what it refuses before vLLM starts, and that it hands the process over."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys

import pytest
from serving_hub import add_to_cache
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


@pytest.fixture
def unchecked(monkeypatch):
    """Models that need not be there: what a command is made of does not depend on them."""
    monkeypatch.setattr("vllm_ppow.config.check", lambda *_, **__: None)


@pytest.fixture(scope="module")
def adapter(pair, tmp_path_factory):
    """Directory of an adapter for the pair's causal LM."""
    return str(random_adapter(tmp_path_factory.mktemp("serve"), "causal_lm", pair).directory)


@pytest.fixture
def no_vllm(monkeypatch):
    """vLLM is neither started nor imported."""
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("vLLM was started"))
    monkeypatch.setitem(sys.modules, "vllm", None)  # an import of it fails


def test_options_of_vllm_pass_through_in_order(capsys, unchecked):
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


def test_every_option_of_ours_has_its_key(capsys, unchecked):
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
def test_hot_swap_names_a_directory_and_our_routes(capsys, monkeypatch, tmp_path, unchecked, given, kept):
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ppow": {"windw": "fixed"}}, "\"ppow\" has unknown keys ['windw']: known are"),
        ({"ppow": {"window": "wide"}}, '"ppow": window must be one of'),
        ({"window": "fixed"}, "['window'] belong under the key \"ppow\""),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens must be an integer >= 1, got 0."),
        ({"num-speculative-tokens": "8"}, "num_speculative_tokens must be an integer >= 1, got '8'."),
    ],
)
@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_keys_and_values_are_looked_at_first(capsys, no_vllm, options, message, more):
    code, out, err = run(capsys, "T", "--adapter", "A", "--speculative-options", json.dumps(options), *more)
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_what_could_not_be_served_is_refused_before_vllm_is_imported(
    capsys, pair, adapter, tmp_path, no_vllm, more
):
    def refused(target, *argv):
        code, out, err = run(capsys, str(target), *argv, *more)
        assert (code, out) == (1, "")
        assert err.count("\n") == 1
        return err

    assert "nothere does not exist" in refused(pair.target, "--adapter", "nothere")
    assert "lacks ppow_config.json" in refused(pair.target, "--adapter", str(tmp_path))
    assert f"not for {pair.causal_lm} (its fingerprint" in refused(pair.causal_lm, "--adapter", adapter)
    other = ["--drafter", str(pair.eagle3)]
    assert "was trained on another drafter than" in refused(pair.target, "--adapter", adapter, *other)
    wide = ["--speculative-options", '{"ppow": {"min_tokens": 9}}']
    assert "min_tokens must be at most" in refused(pair.target, "--adapter", adapter, *wide)


def test_the_check_needs_neither_torch_nor_vllm(pair, adapter):
    code = (
        "import sys; from ppow_train.cli import run; code = run(sys.argv[1:]); "
        "assert not {'torch', 'vllm'} & set(sys.modules); sys.exit(code)"
    )
    argv = ["serve", str(pair.target), "--adapter", adapter, "--dry-run"]
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("vllm serve ")


def test_a_dry_run_downloads_nothing(capsys, pair, adapter, tmp_path, monkeypatch):
    """What the Hub's cache holds is looked at; of a target whose configuration alone is there nothing can be said."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    fetch = huggingface_hub.snapshot_download

    def local_only(*args, local_files_only, **kwargs):
        assert local_files_only, "asked the Hub"
        return fetch(*args, local_files_only=True, **kwargs)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", local_only)
    told = "Not checked whether it can be served: org/target is not a directory here, and the Hub cache does not hold"
    argv = ["org/target", "--adapter", adapter, "--dry-run"]
    code, out, err = run(capsys, *argv)
    assert (code, out.startswith("vllm serve org/target ")) == (0, True)
    assert told in err
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.json").write_text("{}")
    add_to_cache(tmp_path / "hub", "org/target", tmp_path / "config")
    assert told in run(capsys, *argv)[2]
    add_to_cache(tmp_path / "hub", "org/target", pair.target, branch="v1")
    assert dry(capsys, *argv[:-1], "--revision", "v1")
    assert dry(capsys, *argv[:-1], "--revision=v1")
    add_to_cache(tmp_path / "hub", "org/target", pair.causal_lm, branch="v2")
    code, _, err = run(capsys, *argv, "--revision", "v2")
    assert code == 1
    assert "not for org/target (its fingerprint" in err


def test_the_target_is_vllms_affair_where_a_file_may_name_its_revision(capsys, pair, adapter):
    argv = [str(pair.causal_lm), "--adapter", adapter]
    assert dry(capsys, *argv, "--config", "vllm.yaml")[0] == str(pair.causal_lm)
    assert run(capsys, *argv, "--dry-run")[0] == 1


@pytest.mark.parametrize("argv", [["-h"], ["T", "--adapter", "A", "-h"], ["--help"]])
def test_help(capsys, argv):
    code, out, _ = run(capsys, *argv)
    assert code == 0
    assert out.startswith("Usage: ppow serve TARGET")


def test_the_process_becomes_vllms(capsys, pair, adapter, monkeypatch):
    started = []
    monkeypatch.setattr(os, "execv", lambda program, argv: started.append((program, argv)))
    assert run(capsys, str(pair.target), "--adapter", adapter, "--port", "80")[0] == 0
    ((program, argv),) = started
    assert program == argv[0] == sys.executable
    assert argv[1:5] == ["-m", "vllm.entrypoints.cli.main", "serve", str(pair.target)]
    assert argv[-2:] == ["--port", "80"]


def test_without_vllm_it_says_what_to_install(capsys, pair, adapter, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "vllm" else find(name, *rest)
    )
    code, _, err = run(capsys, str(pair.target), "--adapter", adapter)
    assert code == 1
    assert err.startswith("Error: vllm is not installed: pip install '.[cpu]'")
