"""The GPU benchmark as far as a CPU goes: its arguments, resuming, judge and table; some steps at tiny scale.

Left out: its models (test_gpu_models.py); what needs CUDA (tests/gpu), so graphs, the V2 runner, synthetic acceptance,
and all figures.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest

from ppow_train.errors import UserError
from ppow_train.serving_eval import EngineOptions, Run

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "benchmarks"
sys.path.append(str(FOLDER / "gpu"))

import arms as gpu_arms  # noqa: E402
import serving_tests  # noqa: E402
import steps as gpu_steps  # noqa: E402
import summary as gpu_summary  # noqa: E402
import within as gpu_within  # noqa: E402

TINY = ["--backend", "cpu", "--tiny"]


# ---------------------------------------------------------------- arguments, resuming


def plan(path: Path, backend: str = "cuda", tiny: bool = False) -> gpu_steps.Plan:
    return gpu_steps.Plan(path, backend, tiny, tuple(range(1, 11)), (1, 2, 4, 8, 16, 32, 64))


def test_the_steps_are_what_the_benchmark_promises(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_steps, "all_arms", lambda plan: [*map(arm, ("none", *"abcdef"))])
    monkeypatch.setattr(gpu_steps, "_at_once", lambda plan: 2)
    names = list(gpu_steps.steps(plan(tmp_path)))
    identity = [f"identity-{runner}-{mode}" for runner in ("v1", "v2") for mode in ("eager", "graphs")]
    tests = list(serving_tests.GROUPS)
    assert names[:-6] == [
        *("loop", "train-eagle3", "train-causal_lm"),
        *(*identity, *tests, "packed-speed", "profile", "within"),
    ]
    assert names[-6:] == [
        f"arms-{number}" for number in range(1, 7)
    ]  # two engines at once: each beside no speculation


def test_on_a_cpu_the_tests_of_serving_are_left_to_make_test(tmp_path):
    assert not set(serving_tests.GROUPS) & set(gpu_steps.steps(plan(tmp_path, backend="cpu", tiny=True)))


def test_groups_of_tests_leave_none_of_their_files_out():
    """What a group does not select another one does."""
    selections = {}
    for file, *selected in serving_tests.GROUPS.values():
        assert (serving_tests.TESTS / file).is_file()
        selections.setdefault(file, []).append(selected)
    for expressions in selections.values():
        if len(expressions) > 1:
            (_, first), (_, second) = expressions
            assert second == f"not {first}"
        else:
            assert expressions == [[]]


@pytest.mark.parametrize(
    ("body", "counts"),
    [
        ("def test_a(): pass\ndef test_b():\n    import pytest\n    pytest.skip('no')", (1, 1)),
        ("def test_a(): pass\ndef test_b(): assert False", None),
        ("import pytest\n@pytest.mark.skip(reason='no')\ndef test_a(): pass", None),
        ("x = 1", None),
    ],
)
def test_a_group_is_done_when_all_of_it_passed_and_something_did(tmp_path, monkeypatch, body, counts):
    (tmp_path / "tests" / "e2e").mkdir(parents=True)
    (tmp_path / "tests" / "e2e" / "test_x.py").write_text(body, encoding="utf-8")
    monkeypatch.setattr(serving_tests, "TESTS", tmp_path / "tests" / "e2e")
    monkeypatch.setattr(serving_tests, "GROUPS", {"tests-x": ("test_x.py",)})
    if counts is None:
        with pytest.raises(SystemExit, match="tests-x: "):
            serving_tests.run("tests-x", tmp_path)
    else:
        found = serving_tests.run("tests-x", tmp_path)["tests"]
        assert (found["passed"], found["skipped"]) == counts
        assert found["arguments"] == ["test_x.py"]


def test_arms_are_none_every_length_and_the_adaptive_window(tmp_path, monkeypatch):
    every = [f"fixed-{k:02d}" for k in range(1, 11)]
    monkeypatch.setattr(gpu_steps, "_steerable_runner", lambda: None)
    arms = gpu_steps.all_arms(plan(tmp_path))
    assert [arm.name for arm in arms] == ["none", *every, "adaptive"]
    assert {arm.runner for arm in arms} == {None}


def test_where_only_the_v1_runner_adapts_arms_are_alike_and_v2s_are_shown_too(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_steps, "_steerable_runner", lambda: "0")
    arms = {arm.name: arm for arm in gpu_steps.all_arms(plan(tmp_path))}
    assert {arms[name].runner for name in ("none", "fixed-01", "fixed-10", "adaptive")} == {"0"}
    assert {arms[name].runner for name in ("v2-none", "v2-fixed-01", "v2-fixed-10")} == {"1"}
    assert arms["v2-fixed-03"].spec == arms["fixed-03"].spec


def test_on_a_gpu_every_arm_accepts_alike(tmp_path):
    whole, short = gpu_steps.adaptive(plan(tmp_path)), gpu_steps.fixed(plan(tmp_path), 3)
    assert whole["num_speculative_tokens"] == 10
    assert short["synthetic_acceptance_rates"] == whole["synthetic_acceptance_rates"][:3] == [0.75, 0.6, 0.48]
    assert whole["rejection_sample_method"] == "synthetic"


def test_unknown_arms_are_refused(tmp_path):
    unknown = dataclasses.replace(plan(tmp_path, "cpu", tiny=True), arms=("none", "fixed-99"))
    with pytest.raises(SystemExit, match="No arms fixed-99: choose from none, fixed-01"):
        gpu_steps.chosen_arms(unknown)


@pytest.mark.parametrize("text", ["0,1", "2,1", "1,1"])
def test_lengths_and_batches_ascend(tmp_path, text, capsys):
    with pytest.raises(SystemExit):
        gpu_steps.main(["list", "--output", str(tmp_path), "--batches", text])
    assert "must be positive and ascend" in capsys.readouterr().err


# ---------------------------------------------------------------- engines in turns


def arm(name: str, runner: str | None = None) -> gpu_arms.Arm:
    return gpu_arms.Arm(name, None if name == "none" else {"method": "ppow"}, runner)


def test_every_group_has_the_arm_that_others_are_compared_with():
    names = [
        [one.name for one in group] for group in gpu_arms.groups([*map(arm, ("none", "a", "b", "c"))], 3)
    ]
    assert names == [["none", "a", "b"], ["none", "c"]]
    alone = gpu_arms.groups([*map(arm, ("none", "a"))], 1)
    assert [[one.name for one in group] for group in alone] == [["none"], ["a"]]


class FakeEngine:
    """Notes when it is loaded, and the environment that it was started with."""

    calls: ClassVar[list[tuple[str, int]]] = []
    runners: ClassVar[dict[str, str | None]] = {}
    tokens_short = 0

    def __init__(self, name, options, spec):
        self.name = name
        FakeEngine.runners[name] = os.environ.get(gpu_arms.V2_RUNNER)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        pass

    def wait_until_ready(self):
        if self.name == "broken":
            raise UserError("The engine of arm 'broken' stopped: out of memory")

    def run(self, prompts, *, max_tokens, temperature, ignore_eos):
        assert ignore_eos, "arms are compared over equally many tokens"
        FakeEngine.calls.append((self.name, len(prompts)))
        tokens = [[1] * (max_tokens - self.tokens_short) for _ in prompts]
        return Run(tokens, 2.0, None, step_seconds=[0.5, 0.25, 1.25])


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(gpu_arms, "Engine", FakeEngine)
    monkeypatch.setattr(FakeEngine, "calls", [])
    monkeypatch.setattr(FakeEngine, "runners", {})
    monkeypatch.setenv(gpu_arms.V2_RUNNER, "user's")
    return FakeEngine


def measured(names: list[str], path: Path, **load) -> tuple[list[str], list[dict]]:
    arms = [arm(name, "0" if name == "a" else None) for name in names]
    work = gpu_arms.Load(
        **{"batches": (1, 4), "max_tokens": 3, "rounds": 2, "seconds": 60, "vocab_size": 64, **load}
    )
    failures = gpu_arms.measure(arms, EngineOptions("t"), work, path, lambda text: None)
    return failures, [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_arms_take_turns_and_each_round_begins_with_another(fake, tmp_path):
    failures, figures = measured(["none", "a"], tmp_path / "arms.jsonl")
    assert failures == []
    warm_up, rounds = fake.calls[:4], fake.calls[4:]
    assert warm_up == [("none", 1), ("a", 1), ("none", 4), ("a", 4)]
    assert rounds == [*warm_up, ("a", 1), ("none", 1), ("a", 4), ("none", 4)]
    assert len(figures) == 8
    times = {"steps": 3, "median_step_seconds": 0.5, "longest_step_seconds": 1.25}
    assert figures[0] == {
        **{"round": 0, "arm": "none", "batch": 1, "tokens_per_second": 1.5},
        **times,
        "allocation_retries": 0,
    }
    assert fake.runners == {"none": None, "a": "0"}
    assert os.environ[gpu_arms.V2_RUNNER] == "user's"


def test_an_arm_that_does_not_start_is_told_and_the_others_are_measured(fake, tmp_path):
    failures, figures = measured(["none", "broken"], tmp_path / "arms.jsonl")
    assert failures == ["The engine of arm 'broken' stopped: out of memory"]
    assert {figure["arm"] for figure in figures} == {"none"}


def test_no_round_begins_after_the_time_is_up(fake, tmp_path):
    assert measured(["none"], tmp_path / "arms.jsonl", seconds=-1.0) == ([], [])


def test_texts_that_end_early_are_no_figures(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(FakeEngine, "tokens_short", 1)
    with pytest.raises(UserError, match="1 requests ended after 2 tokens instead of 3"):
        measured(["none"], tmp_path / "arms.jsonl")


def test_unknown_steps_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu_steps.main(["no-such-step", "--output", str(tmp_path)])
    assert stopped.value.code == 2
    assert "no-such-step is not a step: choose from loop," in capsys.readouterr().err


def test_a_step_that_is_done_is_not_run_again_and_one_that_failed_is(tmp_path, monkeypatch, capsys):
    calls = []

    def step(plan):
        calls.append(plan)
        if len(calls) == 1:
            raise RuntimeError("out of memory")
        return {"card": "X"}

    monkeypatch.setattr(gpu_steps, "steps", lambda plan: {"one": step})
    arguments = ["one", "--output", str(tmp_path), *TINY]
    with pytest.raises(RuntimeError, match="out of memory"):
        gpu_steps.main(arguments)
    assert list(tmp_path.iterdir()) == []
    assert gpu_steps.main(arguments) == 0
    assert gpu_steps.main(arguments) == 0
    assert len(calls) == 2
    assert json.loads((tmp_path / "one.json").read_text()) == {"card": "X", "tiny": True, "backend": "cpu"}
    assert "done before" in capsys.readouterr().out


# Stands in for Python: notes its calls, lists two steps, and fails or hangs where the test says so.
FAKE_PYTHON = """#!/bin/bash
echo "$(basename "$1") ${*:2}" >> "$FAKE_LOG"
case "$2" in
  list) echo one; echo two ;;
  "$FAKE_FAILS") exit 1 ;;
  "$FAKE_HANGS") sleep 60 ;;
esac
"""


def run_script(tmp_path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    (tmp_path / "out").mkdir(exist_ok=True)
    full = {"PATH": os.environ["PATH"], "PYTHON": str(python), "FAKE_LOG": str(tmp_path / "log")}
    command = [FOLDER / "gpu.sh", tmp_path / "out", *arguments]
    return subprocess.run(command, env=full | environ, capture_output=True, text=True, check=False)


def test_the_script_runs_every_step_then_the_summary(tmp_path):
    done = run_script(tmp_path, *TINY)
    assert done.returncode == 0, done.stderr
    calls = [line.split(" --output")[0] for line in (tmp_path / "log").read_text().splitlines()]
    assert calls == ["steps.py list", "steps.py one", "steps.py two", f"summary.py {tmp_path / 'out'}"]
    assert "--backend cpu --tiny" in (tmp_path / "log").read_text()


def test_the_script_goes_on_after_a_step_that_fails_and_says_so(tmp_path):
    done = run_script(tmp_path, FAKE_FAILS="one")
    assert done.returncode == 1
    assert "Failed: one. Run the same command again" in done.stderr
    assert "steps.py two" in (tmp_path / "log").read_text()


def test_the_script_ends_a_step_that_hangs(tmp_path):
    done = run_script(tmp_path, FAKE_HANGS="two", STEP_LIMIT="1")
    assert done.returncode == 1
    assert "two took longer than 1 s" in done.stderr


# ---------------------------------------------------------------- the table


def result(**more):
    return {"card": "Card", "vllm": "0.26.0", "date": "2026-01-02T03:04:05", "tiny": False, **more}


def figures(arm: str, group: int = 0, **by_batch: list[float]) -> list[dict]:
    return [
        {"group": group, "round": number, "arm": arm, "batch": int(b[1:]), "tokens_per_second": rate}
        for b, rates in by_batch.items()
        for number, rate in enumerate(rates)
    ]


def test_the_summary_gives_ratios_within_rounds_and_names_the_card():
    measured = [
        *figures("none", b1=[100, 50, 200], b8=[800, 800, 800]),
        *figures("fixed-01", b1=[150, 75, 320], b8=[1000, 1000, 1000]),
        *figures("fixed-02", b1=[200, 110, 400], b8=[900, 900, 900]),
        *figures("none", group=1, b1=[50, 50, 50], b8=[400, 400, 400]),
        *figures("adaptive", group=1, b1=[100, 99, 90], b8=[505, 505, 505]),
    ]
    shown = gpu_summary.summary({"profile": result()}, measured)
    assert "Ran on: Card, vLLM 0.26.0, 2026-01-02." in shown
    assert "| fixed-02 | 2.00 (2.00 to 2.20) | 1.12 (1.12 to 1.12) |" in shown
    assert "| adaptive over the best fixed | 0.90 (0.90 to 1.00) | 1.01 (1.01 to 1.01) |" in shown
    assert "V2" not in shown
    assert "Greedy output: not run." in shown
    assert "Tiny" not in shown


def test_the_summary_sets_the_adaptive_window_beside_the_other_runners_fixed_ones_too():
    both = [*figures("none", b1=[100]), *figures("v2-fixed-03", b1=[150]), *figures("adaptive", b1=[180])]
    assert "| adaptive over the best fixed on the V2 runner | 1.20" in gpu_summary.summary(
        {"a": result()}, both
    )


def test_one_engine_at_a_time_is_compared_all_the_same_and_said():
    alone = [*figures("none", group=0, b1=[100, 50]), *figures("fixed-03", group=1, b1=[150, 100])]
    shown = gpu_summary.summary({"a": result()}, alone)
    assert "**One engine at a time**" in shown
    assert "| fixed-03 | 1.75 (1.50 to 2.00) |" in shown


@pytest.mark.parametrize("kept", sorted(FOLDER.glob("gpu-*")), ids=lambda path: path.name)
def test_the_summary_of_the_results_that_are_kept_is_the_one_that_is_kept(kept, capsys):
    assert gpu_summary.main([str(kept)]) == 0
    assert capsys.readouterr().out == (kept / "summary.md").read_text()


def test_the_summary_shows_errors_and_says_when_it_means_nothing(tmp_path, capsys):
    compared = {
        "adapter against X": {"identical": 1, "prompts": 4, "ties": 0, "errors": ["a", "b"], "holds": False}
    }
    tests = {"arguments": ["test_x.py", "-k", "a"], "passed": 3, "skipped": 1}
    rates = {name: {"median": m, "min": m - 1, "max": m + 1} for name, m in (("packed", 80), ("ratio", 8))}
    rates["unpacked"] = {"median": 10, "min": 9, "max": 11}
    packed = {"eagle3": {"results": [{"windows_per_step": 64, "mean_tokens": 300.0, "wall": rates}]}}
    both = {"identity-v1-eager": result(compared=compared) | {"tiny": True}, "tests-x": result(tests=tests)}
    both["packed-speed"] = result(packed_speed=packed)
    shown = gpu_summary.summary(both, [])
    assert "| tests-x | `test_x.py -k a` | 3 | 1 |" in shown
    assert "| identity-v1-eager | adapter against X | 1 of 4 | 0 | **2** |" in shown
    assert "| eagle3 | 64 | 300 | 80.0 | 10.0 | 8.0 (7.0 to 9.0) |" in shown
    assert "says nothing about speed" in shown
    assert "the arm none was not run" in shown
    assert gpu_summary.main([str(tmp_path)]) == 1
    assert "run gpu.sh first" in capsys.readouterr().err


def test_turns_in_which_a_request_had_ended_or_read_its_prompt_do_not_count():
    whole = {"requests": 12, "prefilled": 0, "drafted": {"1": 2, "3": 1}}
    others = [whole | {"requests": 11}, whole | {"prefilled": 32}]
    assert gpu_within.steady([whole, *others], 4) == [whole]


def test_too_few_turns_are_no_result(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_within, "_generate", lambda llm, batch, load: None)
    load = gpu_arms.Load((4,), 8, rounds=16, seconds=0.05, vocab_size=64)
    with pytest.raises(SystemExit, match="0 rotations of 4 requests in 0 s, at least 16 are needed"):
        gpu_within.measure(None, tmp_path / "turns.jsonl", ["none", "adaptive"], load, lambda text: None)


# ---------------------------------------------------------------- steps at tiny scale


@pytest.mark.engine
@pytest.mark.slow
def test_profile_and_turns_within_one_engine_run_on_the_cpu(tmp_path, capsys):
    environ = {**os.environ, "PYTHONPATH": f"{ROOT / 'train'}:{ROOT}"}
    for step in ("profile", "within"):
        command = [sys.executable, FOLDER / "gpu" / "steps.py", step, "--output", tmp_path, *TINY]
        subprocess.run(command, check=True, env=environ)
    levels = json.loads((tmp_path / "within.json").read_text())["within"]
    assert [line["concurrency"] for line in levels] == [1, 2]
    for line in levels:
        assert {turn["arm"] for turn in line["turns"]} == {"none", "K=1", "K=2", "adaptive"}
        assert all(turn["requests"] == line["concurrency"] * (turn["ended"] - 1) for turn in line["turns"])
    assert gpu_summary.main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "K=2 ÷ none" in shown
    assert "concurrency 2: its choices are worth" in shown


@pytest.mark.engine
@pytest.mark.slow
def test_arms_of_the_random_pair_run_on_the_cpu(tmp_path, capsys):
    """As the script runs them: the config-only target, the merged head, two engines, throughput at every batch."""
    command = [sys.executable, FOLDER / "gpu" / "steps.py", "arms-1", "--output", tmp_path, *TINY]
    environ = {**os.environ, "PYTHONPATH": f"{ROOT / 'train'}:{ROOT}"}
    subprocess.run([*command, "--arms", "none,fixed-02", "--rounds", "1"], check=True, env=environ)
    found = [json.loads(line) for line in (tmp_path / "arms-1.jsonl").read_text().splitlines()]
    assert [(one["arm"], one["batch"]) for one in found] == [
        ("none", 1),
        ("fixed-02", 1),
        ("none", 2),
        ("fixed-02", 2),
    ]
    assert all(one["tokens_per_second"] > 0 for one in found)
    assert all(one["num_draft_tokens"] == 2 * one["num_drafts"] for one in found if one["arm"] == "fixed-02")
    assert gpu_summary.main([str(tmp_path)]) == 0
    assert "| fixed-02 |" in capsys.readouterr().out
