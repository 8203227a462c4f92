"""The GPU benchmark as far as a CPU goes: its arguments, resuming, models, judge and table; two steps at tiny scale.

Left out: what needs CUDA (tests/gpu), so graphs, the V2 runner, synthetic acceptance, and all figures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "benchmarks"
sys.path.append(str(FOLDER / "gpu"))

import random_pair  # noqa: E402
import steps as gpu_steps  # noqa: E402
import summary as gpu_summary  # noqa: E402

TINY = ["--backend", "cpu", "--tiny"]


# ---------------------------------------------------------------- the random pair


def test_the_shape_is_qwen3_8bs_and_its_head_an_eagle3s():
    shapes = random_pair.head_shapes(random_pair.QWEN3_8B)
    assert shapes["fc"] == (4096, 3 * 4096)
    assert shapes["midlayer.self_attn.k_proj"] == (1024, 8192)
    assert sum(rows * columns for rows, columns in shapes.values()) == 399_507_456


def test_the_pair_is_merged_by_the_loaders_own_merge_and_built_once(tmp_path):
    from safetensors.torch import load_file

    from vllm_ppow.artifact import read_adapter
    from vllm_ppow.merge import Merger

    pair = random_pair.build(tmp_path, random_pair.TINY, 3)
    adapter = read_adapter(pair.adapter)
    merger = Merger(adapter)
    merger.check_base(pair.head)
    base = load_file(pair.head / "model.safetensors")
    merged = dict(merger.wrap((name, tensor.clone()) for name, tensor in base.items()))
    report = merger.assert_complete()
    assert report.num_merged == len(random_pair.head_shapes(random_pair.TINY))
    assert not merged["fc.weight"].equal(base["fc.weight"])

    stamp = (pair.head / "model.safetensors").stat().st_mtime_ns
    assert random_pair.build(tmp_path, random_pair.TINY, 3) == pair
    assert (pair.head / "model.safetensors").stat().st_mtime_ns == stamp


# ---------------------------------------------------------------- arguments, resuming


def plan(path: Path, backend: str = "cuda", tiny: bool = False) -> gpu_steps.Plan:
    return gpu_steps.Plan(path, backend, tiny)


def test_the_steps_are_what_the_benchmark_promises(tmp_path):
    names = list(gpu_steps.steps(plan(tmp_path)))
    assert names[0] == "loop"
    assert [n for n in names if n.startswith("identity")] == [
        f"identity-{runner}-{mode}" for runner in ("v1", "v2") for mode in ("eager", "graphs")
    ]
    arms = [n for n in names if n.startswith("arm-")]
    assert arms == ["arm-none", *(f"arm-fixed-{k:02d}" for k in range(1, 11)), "arm-adaptive"]
    assert names.index("profile") < names.index("arm-adaptive")
    assert plan(tmp_path).batches == (1, 2, 4, 8, 16, 32, 64)


def test_on_a_gpu_every_arm_accepts_alike(tmp_path):
    whole, short = gpu_steps.adaptive(plan(tmp_path)), gpu_steps.fixed(plan(tmp_path), 3)
    assert whole["num_speculative_tokens"] == 10
    assert short["synthetic_acceptance_rates"] == whole["synthetic_acceptance_rates"][:3] == [0.75, 0.6, 0.48]
    assert whole["rejection_sample_method"] == "synthetic"


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


def rates(**by_batch):
    return result(measured=[{"batch": int(b[1:]), "tokens_per_second": r} for b, r in by_batch.items()])


def test_the_summary_gives_ratios_of_medians_and_names_the_card():
    shown = gpu_summary.summary(
        {
            "arm-none": rates(b1=[100, 90, 110], b8=[800]),
            "arm-fixed-01": rates(b1=[150], b8=[1000]),
            "arm-fixed-02": rates(b1=[200], b8=[900]),
            "arm-adaptive": rates(b1=[190], b8=[1010]),
        }
    )
    assert "Ran on: Card, vLLM 0.26.0, 2026-01-02." in shown
    assert "| fixed-02 | 2.00 | 1.12 |" in shown
    assert "| adaptive over the best fixed | 0.95 | 1.01 |" in shown
    assert "Greedy output: not run." in shown
    assert "Tiny" not in shown


def test_the_summary_shows_errors_and_says_when_it_means_nothing(tmp_path, capsys):
    compared = {
        "adapter against X": {"identical": 1, "prompts": 4, "ties": 0, "errors": ["a", "b"], "holds": False}
    }
    shown = gpu_summary.summary({"identity-v1-eager": result(compared=compared) | {"tiny": True}})
    assert "| identity-v1-eager | adapter against X | 1 of 4 | 0 | **2** |" in shown
    assert "says nothing about speed" in shown
    assert "arm-none was not run" in shown
    assert gpu_summary.main([str(tmp_path)]) == 1
    assert "run gpu.sh first" in capsys.readouterr().err


# ---------------------------------------------------------------- steps at tiny scale


@pytest.mark.engine
@pytest.mark.slow
def test_arms_of_the_random_pair_run_on_the_cpu(tmp_path):
    """As the script runs them: the config-only target, the merged head, throughput at every batch."""
    for step in ("arm-none", "arm-fixed-02"):
        command = [sys.executable, FOLDER / "gpu" / "steps.py", step, "--output", tmp_path, *TINY]
        environ = {**os.environ, "PYTHONPATH": f"{ROOT / 'train'}:{ROOT}"}
        subprocess.run(command, check=True, env=environ)
    found = json.loads((tmp_path / "arm-fixed-02.json").read_text())
    assert [one["batch"] for one in found["measured"]] == [1, 2]
    assert all(one["tokens_per_second"][0] > 0 for one in found["measured"])
    assert all(one["num_draft_tokens"] == 2 * one["num_drafts"] for one in found["measured"])
    assert "fixed-02" in gpu_summary.summary(
        {p.stem: json.loads(p.read_text()) for p in tmp_path.glob("*.json")}
    )
