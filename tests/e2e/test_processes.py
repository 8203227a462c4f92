"""Adapters served as users serve them: spawned engine, tensor parallelism, and `vllm serve` over HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from serving_engine import MAX_TOKENS, PROMPTS, expected
from serving_pair import VOCAB, K, random_adapter, restoring_adapter

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TESTS = Path(__file__).parents[1]
MERGED = re.compile(
    r"Merged adapter .* into drafter .*: (\d+) tensors changed, all (\d+) adapter tensors used"
)
START_UP_S = 300


def environment(ranks: int = 1) -> dict[str, str]:
    """The environment of a user: engines are spawned, as vLLM does by default."""
    env = {**os.environ, "PYTHONPATH": str(TESTS)}
    env.pop("VLLM_ENABLE_V1_MULTIPROCESSING")
    cpus = sorted(os.sched_getaffinity(0))
    if ranks > 1:  # vLLM binds a rank to a NUMA node of its own, unless told which CPUs to take
        env["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(cpus[rank % len(cpus)]) for rank in range(ranks))
    return env


@pytest.fixture(scope="module")
def adapters(pair, tmp_path_factory):
    """Restoring adapters of both kinds."""
    root = tmp_path_factory.mktemp("processes")
    return {kind: restoring_adapter(root, kind, pair)[1] for kind in ("eagle3", "causal_lm")}


# ---------------------------------------------------------------- LLM, spawned

SPAWNED = """
import json, sys
from serving_engine import engine, generate
from vllm_ppow.metrics import SpecDecodeCounts
if __name__ == "__main__":
    target, spec, options = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    with engine(target, spec, **options) as llm:
        output = generate(llm)
        counts = SpecDecodeCounts.from_metrics(llm.get_metrics())
    print("RESULT", json.dumps([output, counts.acceptance_per_position]))
"""


def run_spawned(tmp_path, target, spec, **options):
    script = tmp_path / "spawned.py"
    script.write_text(SPAWNED)
    return subprocess.run(
        [sys.executable, str(script), str(target), json.dumps(spec), json.dumps(options)],
        env=environment(options.get("tensor_parallel_size", 1)),
        capture_output=True,
        text=True,
        timeout=START_UP_S,
        check=False,
    )


@pytest.mark.parametrize(
    ("kind", "ranks", "window"),
    [("eagle3", 1, "fixed"), ("eagle3", 2, "fixed"), ("causal_lm", 2, "adaptive")],
)
def test_spawned_engine_and_tensor_parallelism(pair, adapters, tmp_path, kind, ranks, window):
    """An adaptive window is chosen by the one scheduler there is: ranks that drafted unlike would hang or fail."""
    spec = {"method": "ppow", "model": str(adapters[kind].directory), "ppow": {"window": window}}
    options = {"tensor_parallel_size": ranks} if ranks > 1 else {}
    done = run_spawned(tmp_path, pair.target, spec, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    result = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    output, acceptance = json.loads(result.removeprefix("RESULT"))
    assert output == expected(VOCAB)
    # Not exactly 1: how requests arrive decides which batch a draft falls into, with and without the plugin.
    sure = 1 if kind == "eagle3" or window == "adaptive" else K
    assert min(acceptance[:sure]) > 0.9
    merges = MERGED.findall(done.stdout + done.stderr)
    assert len(merges) == ranks, "every rank merges, once"
    assert len(set(merges)) == 1


def test_the_sentence_reaches_the_user_of_a_spawned_engine(pair, adapters, tmp_path):
    spec = {"method": "ppow", "model": str(adapters["eagle3"].directory), "ppow": {"typo": 1}}
    done = run_spawned(tmp_path, pair.target, spec)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.endswith(
        "\"ppow\" has unknown keys ['typo']: known are ['base_drafter', 'allow_target_mismatch', "
        "'window', 'min_tokens']."
    )


# ---------------------------------------------------------------- vllm serve


@contextlib.contextmanager
def server(target, log: Path, *arguments: str):
    """`vllm serve` on a free port; the base URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(target), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "128"]
    command += ["--max-num-seqs", "4", "--served-model-name", "tiny", *arguments]
    with log.open("w") as stream:
        process = subprocess.Popen(command, env=environment(), stdout=stream, stderr=subprocess.STDOUT)
        try:
            wait_until_healthy(process, f"http://127.0.0.1:{port}/health", log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_until_healthy(process, url: str, log: Path) -> None:
    deadline = time.monotonic() + START_UP_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail(f"the server ended with {process.returncode}:\n{log.read_text()[-3000:]}")
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(1)
    pytest.fail(f"the server was not healthy after {START_UP_S} s:\n{log.read_text()[-3000:]}")


def complete(url: str, prompt: list[int]) -> list[int]:
    """Token ids of a greedy completion; token x is the text "tx"."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        text = json.load(answer)["choices"][0]["text"]
    return [int(token) for token in re.findall(r"t(\d+)", text)]


def counter(url: str, name: str) -> int:
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return sum(
        int(float(line.split()[-1])) for line in lines if line.startswith(f"vllm:spec_decode_{name}_total{{")
    )


@pytest.mark.parametrize("form", ["json", "flags"])
def test_vllm_serve(pair, adapters, tmp_path, form):
    kind = {"json": "eagle3", "flags": "causal_lm"}[form]
    directory = str(adapters[kind].directory)
    arguments = {
        "json": [
            "--speculative-config",
            json.dumps(
                {
                    "method": "ppow",
                    "model": directory,
                    "num_speculative_tokens": 2,
                    "ppow": {"window": "fixed"},
                }
            ),
        ],
        "flags": ["--spec-method", "ppow", "--spec-model", directory, "--spec-tokens", "2"],
    }[form]
    with server(pair.target, tmp_path / "log", *arguments) as url:
        assert [complete(url, prompt) for prompt in PROMPTS] == expected(VOCAB)
        drafts, drafted = counter(url, "num_drafts"), counter(url, "num_draft_tokens")
        accepted = counter(url, "num_accepted_tokens")
    if kind == "eagle3":
        assert drafted == 2 * drafts > 0
        assert accepted > 0.9 * drafts
    else:  # flags have no place for our options: the window is adaptive
        assert 0 < drafts <= drafted < 2 * drafts
        assert accepted > 0.9 * drafted
    assert len(MERGED.findall((tmp_path / "log").read_text())) == 1


def test_vllm_serve_says_what_is_wrong(pair, tmp_path):
    adapter = random_adapter(tmp_path, "causal_lm", pair)
    (adapter.directory / "adapter_config.json").unlink()
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.cli.main",
        "serve",
        str(pair.target),
        "--spec-method",
        "ppow",
    ]
    done = subprocess.run(
        [*command, "--spec-model", str(adapter.directory), "--max-model-len", "128"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=START_UP_S,
        check=False,
    )
    assert done.returncode != 0
    sentence = (
        f"Adapter {adapter.directory} lacks adapter_config.json: it is half-written or not a PPOW adapter; "
    )
    assert done.stderr.strip().splitlines()[-1].endswith(sentence + "copy it again or run `ppow train`.")
