"""Adapters served as users serve them: spawned engine, tensor parallelism, and `vllm serve` over HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from serving_engine import MAX_TOKENS, PROMPTS, expected
from serving_pair import (
    VOCAB,
    K,
    load_drafter,
    random_adapter,
    random_lora,
    restoring_adapter,
    save_adapter,
)

from vllm_ppow.artifact import write_adapter

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TESTS = Path(__file__).parents[1]
MERGED = re.compile(
    r"Merged adapter .* into drafter .*: (\d+) tensors changed, all (\d+) adapter tensors used"
)
START_UP_S = 300


def environment(ranks: int = 1) -> dict[str, str]:
    """The environment of a user: engines are spawned, as vLLM does by default."""
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path}
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


SWAPPED = """
import json, sys
from serving_engine import engine, generate
from vllm_ppow.hot_swap import swap_adapter
from vllm_ppow.metrics import SpecDecodeCounts
if __name__ == "__main__":
    target, before, after = sys.argv[1:]
    spec = {"method": "ppow", "model": before, "ppow": {"hot_swap": True, "window": "fixed"}}
    with engine(target, spec, tensor_parallel_size=2) as llm:
        first = generate(llm)
        reply = swap_adapter(llm, after)
        llm.reset_prefix_cache()
        at_swap = SpecDecodeCounts.from_metrics(llm.get_metrics())
        second = generate(llm)
        counts = SpecDecodeCounts.from_metrics(llm.get_metrics())
    means = [at_swap.mean_accepted, (counts - at_swap).mean_accepted]
    print("RESULT", json.dumps([first, second, reply["adapter"], *means]))
"""


def test_a_swap_reaches_every_tensor_parallel_rank(pair, tmp_path):
    """From a wrong adapter to a right one: shards and fused projections are the new one's on both ranks."""
    spoiled, good = restoring_adapter(tmp_path / "x", "causal_lm", pair)
    model = random_lora(load_drafter("causal_lm", spoiled), 0.3)
    bad = save_adapter(tmp_path / "bad", model, "causal_lm", spoiled, pair.target)
    script = tmp_path / "swapped.py"
    script.write_text(SWAPPED)
    done = subprocess.run(
        [sys.executable, str(script), str(pair.target), str(bad.directory), str(good.directory)],
        env=environment(2),
        capture_output=True,
        text=True,
        timeout=START_UP_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
    first, second, adapter, before, after = json.loads(result.removeprefix("RESULT"))
    assert first == second == expected(VOCAB)
    assert adapter == str(good.directory)
    assert before < 0.5 < 0.9 * K < after


def test_the_sentence_reaches_the_user_of_a_spawned_engine(pair, adapters, tmp_path):
    spec = {"method": "ppow", "model": str(adapters["eagle3"].directory), "ppow": {"typo": 1}}
    done = run_spawned(tmp_path, pair.target, spec)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "\"ppow\" has unknown keys ['typo']: known are ['base_drafter', " in last
    assert last.endswith("].")


# ---------------------------------------------------------------- vllm serve


VLLM = ("vllm.entrypoints.cli.main", "serve")
PPOW = ("ppow_train.cli", "serve")


@contextlib.contextmanager
def server(target, log: Path, *arguments: str, program: tuple[str, str] = VLLM):
    """`vllm serve`, or `ppow serve`, on a free port; the base URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", *program, str(target), "--port", str(port)]
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


def complete(url: str, prompt: list[int], **headers: str) -> list[int]:
    """Token ids of a greedy completion; token x is the text "tx"."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
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
        assert 0 < drafts <= drafted <= 2 * drafts
        assert accepted > 0.9 * drafted
    assert len(MERGED.findall((tmp_path / "log").read_text())) == 1


def ppow_swap(url: str, *arguments: str, key: str = "secret"):
    """`ppow swap` as a user calls it: exit code, what it printed as JSON or None, and its error."""
    command = [sys.executable, "-m", "ppow_train.cli", "swap", "--url", url, "--api-key", key, *arguments]
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=120, check=False
    )
    return done.returncode, json.loads(done.stdout) if done.stdout else None, done.stderr


@contextlib.contextmanager
def traffic(url: str, **headers: str):
    """Requests that never stop; at the end, every one of them must have been answered rightly."""
    stop, answers, errors = threading.Event(), [], []

    def ask():
        while not stop.is_set():
            try:
                answers.append([complete(url, prompt, **headers) for prompt in PROMPTS])
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join(120)
    assert not errors
    assert len(answers) >= 4
    assert all(answer == expected(VOCAB) for answer in answers)


def write_halved(adapter, path):
    """The same deltas from other tensors: twice every A, half of every B."""
    tensors = load_file(adapter.weights)
    scaled = {name: t * (2.0 if ".lora_A." in name else 0.5) for name, t in tensors.items()}
    save_file(scaled, path / "adapter_model.safetensors")
    shutil.copy(adapter.directory / "adapter_config.json", path)


def test_ppow_serve_swaps_adapters_under_traffic(pair, tmp_path):
    """A good adapter is kept and a bad one swapped back; who has no key, or names another path, changes nothing."""
    spoiled, good = restoring_adapter(tmp_path / "x", "causal_lm", pair)
    allowed = tmp_path / "allowed"
    shutil.copytree(good.directory, allowed / "good")
    shutil.copytree(good.directory, allowed / "copied")
    write_adapter(allowed / "again", good.config, lambda path: write_halved(good, path))
    bad = random_lora(load_drafter("causal_lm", spoiled), 0.3)
    save_adapter(allowed / "bad", bad, "causal_lm", spoiled, pair.target)
    options = [
        "--adapter",
        str(allowed / "good"),
        "--hot-swap",
        str(allowed),
        "-K",
        "2",
        "--api-key",
        "secret",
    ]
    bearer = {"Authorization": "Bearer secret"}
    with server(pair.target, tmp_path / "log", *options, program=PPOW) as url:
        code, shown, _ = ppow_swap(url)
        assert (code, shown["adapter"], shown["previous"]) == (0, str(allowed / "good"), None)
        assert ppow_swap(url, key="wrong")[::2] == (
            1,
            "Error: the server wants its API key: give --api-key.\n",
        )
        code, _, error = ppow_swap(url, "--adapter", str(good.directory))
        assert code == 1
        assert f"is not among those that this server may swap to: inside {allowed}." in error
        with traffic(url, **bearer):
            code, shown, _ = ppow_swap(url, "--adapter", "copied", "--wait")  # the same tensors
            assert (code, shown["adapter"], shown["previous"]) == (0, str(allowed / "copied"), None)
            code, shown, _ = ppow_swap(url, "--adapter", "again", "--drafts", "40", "--wait")
            assert (code, shown["adapter"], shown["last"]["event"]) == (0, str(allowed / "again"), "kept")
            code, shown, error = ppow_swap(url, "--adapter", "bad", "--drafts", "40", "--wait")
            assert code == 1
            assert "Error: swapped back: accepted tokens per draft" in error
            assert (shown["adapter"], shown["previous"]) == (str(allowed / "again"), str(allowed / "bad"))
            code, _, error = ppow_swap(url, "--undo")
            assert code == 1
            assert "Error: The server has gone back by itself (accepted tokens per draft" in error
            assert ppow_swap(url, "--adapter", "good", "--no-watch")[0] == 0
            code, shown, _ = ppow_swap(url, "--undo")
            assert (code, shown["adapter"]) == (0, str(allowed / "again"))
        # Before the server is told to end: vLLM may then log an engine that went first.
        log = (tmp_path / "log").read_text()
    assert f"Swapped back to adapter {allowed / 'again'}: accepted tokens per draft" in log
    assert "Traceback" not in log


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
