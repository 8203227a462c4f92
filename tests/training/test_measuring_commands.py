"""`ppow bench` and `ppow profile` up to where engines start: what they refuse, what they pass on, what they keep."""

from __future__ import annotations

import json
import types

import pytest
import torch
from safetensors.torch import save_file
from serving_profile import PROFILE, plain_adapter

from ppow_train import cli
from ppow_train.benchmark import ARMS, Work, run_benchmark
from ppow_train.preflight import find_target
from ppow_train.profile_engine import Measured
from ppow_train.serving_eval import NONE, EngineOptions, Run
from vllm_ppow.artifact import fingerprint_model
from vllm_ppow.metrics import SpecDecodeCounts

COUNTS = SpecDecodeCounts(10, 40, 20, (9, 6, 4, 1))
COMMANDS = ("bench", "profile")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An adapter, prompts, a target that it was not trained for; no engine may start unless a test lets it."""
    plain_adapter(tmp_path / "adapter")
    (tmp_path / "target").mkdir()
    save_file({"a": torch.ones(2, 2)}, tmp_path / "target" / "model.safetensors")
    (tmp_path / "target" / "config.json").write_text(
        '{"model_type": "qwen3", "max_position_embeddings": 4096}'
    )
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n')
    monkeypatch.setattr("ppow_train.serving_eval.subprocess", None)
    monkeypatch.setattr("vllm_ppow.resolve.resolve_base_drafter", lambda *_: tmp_path / "drafter")
    monkeypatch.setattr("ppow_train.generation.load_tokenizer", lambda _: None)
    monkeypatch.setattr("ppow_train.prompts.text_ids", lambda texts, _: [[1, 2, 3] for _ in texts])
    return tmp_path


def call(place, command, *more):
    given = [command, "--adapter", str(place / "adapter"), "--prompts", str(place / "p.jsonl")]
    return cli.run([*given, "--target", str(place / "target"), *more])


@pytest.fixture
def engines(monkeypatch):
    """Stand-ins for the engines of both commands; what they were started with and asked to do."""
    seen = types.SimpleNamespace(specs=[], runs=[], options=[])

    class Stand:
        def __init__(self, name, options, spec):
            self.name = name
            seen.specs.append(spec)
            seen.options.append(options)

        def __enter__(self):
            return self

        def __exit__(self, *exc_info):
            return None

        def wait_until_ready(self):
            return None

        def run(self, prompts, *, max_tokens, temperature, with_gaps=False):
            seen.runs.append((self.name, len(prompts), max_tokens, temperature, with_gaps))
            gaps = [[9.0] * max_tokens for _ in prompts] if with_gaps else None
            counts = None if self.name == NONE else COUNTS
            return Run([[3] * max_tokens for _ in prompts], 1.0, counts, gaps)

        def profile(self, adapter, options, prompts, say):
            return Measured(PROFILE, 0.1, 0.2, 0.0)

    monkeypatch.setattr("ppow_train.benchmark.Engine", Stand)
    monkeypatch.setattr("ppow_train.profile_engine.ProfileEngine", Stand)
    return seen


# ---------------------------------------------------------------- another target


@pytest.mark.parametrize("command", COMMANDS)
def test_another_target_is_refused_before_an_engine_starts(place, command, capsys):
    assert call(place, command) == 1
    told = capsys.readouterr().err
    assert "is not the target that the adapter was trained for" in told
    assert "--allow-target-mismatch" in told


@pytest.mark.parametrize("command", COMMANDS)
def test_another_target_is_measured_where_it_is_allowed(place, command, engines):
    """The engines that serve the adapter are told; vLLM's own speculative config takes no such key."""
    assert call(place, command, "--allow-target-mismatch") == 0
    ours = [spec for spec in engines.specs if spec and spec["method"] == "ppow"]
    assert len(ours) == (2 if command == "bench" else 1)
    assert all(spec["ppow"]["allow_target_mismatch"] is True for spec in ours)
    if command == "profile":
        written = json.loads((place / "adapter" / "cost_profile.json").read_text())
        assert written["target_fingerprint"] == fingerprint_model(place / "target")


def test_the_target_of_the_adapter_needs_no_flag(place):
    target = place / "target"
    trained = types.SimpleNamespace(
        name_or_path=str(target), revision=None, fingerprint=fingerprint_model(target)
    )
    adapter = types.SimpleNamespace(config=types.SimpleNamespace(target=trained))
    assert find_target(adapter, None, allow_mismatch=False) == (target, trained.fingerprint)
    (target / "model.safetensors").unlink()
    assert find_target(adapter, None, allow_mismatch=True) == (target, None)


# ---------------------------------------------------------------- room for prompts and output


@pytest.mark.parametrize(("given", "room"), [((), 3 + 64 + 4 * 5), (("--max-model-len", "67"), 67)])
def test_engines_have_room_for_the_longest_prompt_and_its_output(place, engines, given, room):
    call(place, "bench", "--allow-target-mismatch", "--num-speculative-tokens", "4", *given)
    assert {options.max_model_len for options in engines.options} == {room}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("--max-tokens", "5000"), "need 5003 tokens, the target takes 4096: lower --max-tokens or shorten"),
        (("--max-model-len", "66"), "need 67 tokens, --max-model-len is 66: lower --max-tokens, raise"),
    ],
)
def test_too_little_room_is_told_before_an_engine_starts(place, given, told, capsys):
    assert call(place, "bench", "--allow-target-mismatch", *given) == 1
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_outputs_of_one_token_in_which_nothing_is_drafted_are_wrong_usage(place, command, capsys):
    assert call(place, command, "--allow-target-mismatch", "--max-tokens", "1") == 2
    assert "--max-tokens" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "qwen3", "hidden_size": "64"}'])
def test_a_target_with_a_broken_config_is_refused_in_a_sentence(place, content, capsys):
    (place / "target" / "config.json").write_text(content)
    assert call(place, "bench", "--allow-target-mismatch") == 1
    assert str(place / "target") in capsys.readouterr().err


# ---------------------------------------------------------------- vLLM's own arguments


@pytest.mark.parametrize("command", COMMANDS)
def test_every_engine_gets_the_arguments_of_the_server(place, command, engines, capsys):
    given = (
        "--engine-arg",
        "kv-cache-dtype=fp8",
        "--engine-arg",
        'hf_overrides={"a": 1}',
        "--dtype",
        "float32",
    )
    assert call(place, command, "--allow-target-mismatch", "--json", *given) == 0
    wanted = {"kv_cache_dtype": "fp8", "hf_overrides": {"a": 1}}
    assert len(engines.options) == (4 if command == "bench" else 1)
    assert all((options.more, options.dtype) == (wanted, "float32") for options in engines.options)
    if command == "bench":
        told = json.loads(capsys.readouterr().out)
        assert (told["engine_arguments"], told["dtype"], told["compiled"]) == (wanted, "float32", False)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("quantization", "expected NAME=VALUE"),
        ("=fp8", "expected NAME=VALUE"),
        ("quantisation=fp8", "did you mean quantization?"),
        ("tensor_parallel_size=2", "use --tensor-parallel-size"),
        ("max-model-len=64", "from its other options"),
        ("speculative_config={}", "is set by this command: what it compares or keeps depends on it"),
    ],
)
def test_an_argument_that_cannot_be_passed_on_is_a_usage_error(place, command, given, told, capsys):
    assert call(place, command, "--engine-arg", given) == 2
    assert told in capsys.readouterr().err


# ---------------------------------------------------------------- warm-up


@pytest.mark.parametrize("concurrency", [2, 8])
def test_every_arm_has_the_same_warm_up_before_it_is_timed(engines, concurrency):
    """The pass whose log probabilities are read is no head start: it comes after what is timed."""
    config = types.SimpleNamespace(drafter_type="eagle3", draft_sample_method="probabilistic")
    run_benchmark(
        types.SimpleNamespace(config=config, directory="a"),
        "base",
        EngineOptions("t", max_num_seqs=concurrency),
        Work([[1, 2]] * 5, max_tokens=20, temperatures=[0.0, 1.0], rounds=2),
        num_speculative_tokens=4,
        side_by_side=True,
    )
    timed = [(number, 20, t, False) for t in (0.0, 1.0) for number in (min(concurrency, 5), 5, 5)]
    for arm in ARMS:
        done = [run[1:] for run in engines.runs if run[0] == arm]
        assert done == timed + ([(5, 20, 0.0, True)] if arm == NONE else [])


# ---------------------------------------------------------------- what is kept


def _out(place, command):
    return place / "out" if command == "bench" else place / "out" / "profile.json"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_place_that_takes_no_file_is_refused_before_an_engine_starts(place, command, capsys, monkeypatch):
    (place / "out").mkdir()

    def refuse(**given):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("ppow_train.preflight.tempfile.TemporaryFile", refuse)
    assert call(place, command, "--allow-target-mismatch", "--output", str(_out(place, command))) == 1
    told = capsys.readouterr().err
    assert f"Nothing can be written to {place / 'out'} (Permission denied): name another place" in told


def test_what_fails_before_anything_is_measured_leaves_no_directory(place, capsys):
    assert call(place, "bench", "--output", str(place / "out")) == 1
    assert "is not the target that the adapter was trained for" in capsys.readouterr().err
    assert not (place / "out").exists()


def test_a_file_is_no_directory_for_results(place, capsys):
    (place / "out").write_text("")
    assert call(place, "bench", "--allow-target-mismatch", "--output", str(place / "out")) == 1
    assert "name another place with --output" in capsys.readouterr().err


def test_what_a_plot_needs_is_asked_for_before_an_engine_starts(place, capsys, monkeypatch):
    monkeypatch.setattr("ppow_train.report.importlib.util.find_spec", lambda name: None)
    assert call(place, "bench", "--allow-target-mismatch", "--output", str(place / "out")) == 1
    assert "pip install matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_results_that_cannot_be_written_are_shown_all_the_same(place, command, engines, capsys, monkeypatch):
    (place / "out").mkdir()

    def full(*given):
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr("ppow_train.report.write_json", full)
    monkeypatch.setattr("vllm_ppow.cost_profile.write_profile_file", full)
    output = str(_out(place, command))
    assert call(place, command, "--allow-target-mismatch", "--json", "--output", output) == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out)
    assert "No space left" in shown.err


# ---------------------------------------------------------------- wrong usage


@pytest.mark.parametrize("value", ["0", "-1"])
@pytest.mark.parametrize(
    "option",
    ["--rounds", "--num-speculative-tokens", "--limit", "--concurrency", "--max-tokens", "--max-model-len"],
)
def test_numbers_that_nothing_can_be_measured_with_are_wrong_usage(option, value, capsys):
    assert cli.run(["bench", "--adapter", "a", "--prompts", "p", option, value]) == 2
    assert option in capsys.readouterr().err


@pytest.mark.parametrize("command", [*COMMANDS, "data"])
def test_a_dtype_that_there_is_not_is_wrong_usage(command, capsys):
    assert cli.run([command, "--prompts", "p", "--dtype", "foo"]) == 2
    assert "'foo' is not one of 'auto', 'bfloat16', 'float16', 'float32'" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_a_negative_temperature_is_wrong_usage(command, capsys):
    assert cli.run([command, "--adapter", "a", "--prompts", "p", "--temperature", "-0.5"]) == 2
    assert "--temperature" in capsys.readouterr().err
