"""`ppow data` through a real vLLM: an engine of its own, and `vllm serve` as an endpoint.

The target follows every token by its successor, but faintly: greedy continuations are known, sampled ones are any.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from serving_pair import VOCAB
from test_processes import server

from ppow_train.cli import run
from ppow_train.serving_eval import Engine
from ppow_train.trajectory_store import MANIFEST, read_records

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

END = VOCAB - 1
NEW_TOKENS = 12
PROMPTS = [[5, 6, 7], [100], [END - 4], [9, 200], [44, 45], [60], [61], [62]]


@pytest.fixture(scope="module")
def target(pair, tmp_path_factory):
    """The pair's target with logits a sixteenth as far apart, which bfloat16 holds exactly."""
    directory = tmp_path_factory.mktemp("faint") / "target"
    shutil.copytree(pair.target, directory)
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] /= 16
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.fixture
def arguments(target, tmp_path):
    """Of `ppow data`, without what continues, the temperature and the output."""
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(json.dumps({"body": {"prompt": ids}}) for ids in PROMPTS), encoding="utf-8")
    fixed = {"target": target, "prompts": path, "shard-size": 3, "held-out-share": 0}
    fixed |= {"max-new-tokens": NEW_TOKENS}
    return ["data", *(str(part) for name, value in fixed.items() for part in (f"--{name}", value))]


def successors(ids: list[int]) -> list[int]:
    """What the target says after a prompt, up to its end token."""
    return list(range(ids[-1] + 1, min(ids[-1] + NEW_TOKENS, END) + 1))


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def without_last_shards(directory: Path, copy: Path) -> None:
    """The set as a kill after its first shard leaves it."""
    shutil.copytree(directory, copy)
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["shards"] = manifest["shards"][:1]
    (copy / MANIFEST).write_text(json.dumps(manifest))


def check_greedy_sampled_and_resumed(command: list[str], tmp_path: Path) -> None:
    greedy, sampled, resumed, other = (tmp_path / name for name in ("greedy", "sampled", "resumed", "other"))
    assert run([*command, "--temperature", "0", "--output", str(greedy)]) == 0
    assert read_records(greedy, held_out=False) == (PROMPTS, [successors(ids) for ids in PROMPTS])

    sample = [*command, "--temperature", "2"]
    assert run([*sample, "--output", str(sampled)]) == 0
    completions = read_records(sampled, held_out=False)[1]
    assert len({tuple(row) for row in completions}) == len(PROMPTS)
    assert completions != [successors(ids) for ids in PROMPTS]
    without_last_shards(sampled, resumed)
    assert run([*sample, "--output", str(resumed)]) == 0
    assert files(resumed) == files(sampled), "where a run was interrupted does not matter"
    assert run([*sample, "--seed", "1", "--output", str(other)]) == 0
    assert read_records(other, held_out=False)[1] != completions


class Kept(Engine):
    """An engine that outlives a command: starting takes most of the time."""

    ready = False

    def wait_until_ready(self) -> None:
        if not self.ready:
            super().wait_until_ready()
        self.ready = True

    def close(self) -> None:
        """Called by each command; `Engine.close` at the end of the test is what stops it."""


@pytest.fixture
def one_engine(monkeypatch):
    """Every command of the test is given the same engine."""
    started: list[Kept] = []

    def start(*args):
        if not started:
            started.append(Kept(*args))
        return started[0]

    monkeypatch.setattr("ppow_train.serving_eval.Engine", start)
    yield
    for engine in started:
        Engine.close(engine)


@pytest.mark.usefixtures("one_engine")
def test_an_engine_of_its_own(arguments, tmp_path):
    check_greedy_sampled_and_resumed([*arguments, "--engine", "vllm", "--concurrency", "4"], tmp_path)


def test_vllm_serve(arguments, target, tmp_path):
    with server(target, tmp_path / "server.log") as url:
        # One request at a time: in which batch it lands is the server's business, and batches round differently.
        command = [*arguments, "--endpoint", f"{url}/v1", "--model", "tiny", "--concurrency", "1"]
        check_greedy_sampled_and_resumed(command, tmp_path)
