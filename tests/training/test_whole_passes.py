"""Passes over whole trajectories read as many tokens at once as a bound allows, and the estimate counts them."""

from __future__ import annotations

import itertools

import pytest
import torch
from live_bytes import LiveBytes
from test_memory import make_config, make_runner
from training_pair import VOCAB, Directories, K, load

from ppow_train import shapes, walk
from ppow_train.memory import MemoryEstimate, estimate_memory
from ppow_train.rollout import WindowRunner
from ppow_train.selection import Judge
from ppow_train.shapes import batches, padded_tokens, pass_bytes_per_token, tokens_at_once
from ppow_train.target import Target
from ppow_train.target_cache import MemoryCache, fill_bytes
from ppow_train.types import Trajectories
from ppow_train.walk import path_rows, target_paths, walk_bytes

COUNT, LONG = 20, 60
TOLERANCE = {"atol": 1e-4, "rtol": 1e-3}  # batches of other sizes round differently


@pytest.fixture(scope="module", params=["eagle3", "causal_lm"])
def runner(request, directories: Directories) -> WindowRunner:
    """Short trajectories and a long one."""
    generator = torch.Generator().manual_seed(6)
    lengths = torch.randint(14, 25, (COUNT,), generator=generator)
    lengths[7] = LONG
    ids = torch.randint(1, VOCAB, (COUNT, LONG), generator=generator)
    pair = load(directories, request.param)
    return WindowRunner(
        pair.target, pair.drafter, Trajectories(ids, torch.full((COUNT,), 3), lengths), K, 0.7
    )


@pytest.fixture
def read(monkeypatch) -> list[tuple[int, int]]:
    """(trajectories, tokens of the longest) of each pass that the target makes."""
    seen = []
    encode = Target.encode

    def watched(self: Target, chosen: Trajectories):
        seen.append(tuple(chosen.input_ids.shape))
        return encode(self, chosen)

    monkeypatch.setattr(Target, "encode", watched)
    return seen


def bound(monkeypatch, runner: WindowRunner, tokens: int) -> None:
    monkeypatch.setattr(shapes, "PASS_BYTES", tokens * pass_bytes_per_token(runner.target))
    assert tokens_at_once(runner.target) == tokens


def assert_bounded(read: list[tuple[int, int]], tokens: int, rows: int) -> None:
    assert sum(count for count, _ in read) == rows
    assert [shape for shape in read if shape[0] * shape[1] > tokens] == [(1, LONG)], "longer, so alone"
    assert len(read) < rows, "more than one at a time where they fit"


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize("tokens", [1, 7, 20, 1000])
@pytest.mark.parametrize("most", [1, 3, 100])
def test_batches_are_as_large_as_the_bounds_allow(tokens, most):
    lengths = torch.randint(1, 12, (50,), generator=torch.Generator().manual_seed(most)).tolist()
    parts = [lengths[part] for part in batches(lengths, tokens, most)]
    assert [*itertools.chain(*parts)] == lengths
    for part, following in itertools.zip_longest(parts, parts[1:]):
        assert len(part) == 1 or (len(part) <= most and len(part) * max(part) <= tokens)
        if following:
            longer = [*part, following[0]]
            assert len(longer) > most or len(longer) * max(longer) > tokens
    assert padded_tokens(lengths, tokens, most) == max(len(part) * max(part) for part in parts)
    assert list(batches([], tokens)) == []


# ---------------------------------------------------------------- the passes


@pytest.mark.parametrize("kind", ["divergence", "lost_tokens"])
def test_criticality(kind, runner, read, monkeypatch):
    rows = torch.arange(4, 12)
    whole = runner.criticality(rows, kind)
    assert read == [(8, LONG)], "what fits is read at once"
    runner.target.forget()
    bound(monkeypatch, runner, 50)
    read.clear()
    parts = runner.criticality(rows, kind)
    assert_bounded(read, 50, 8)
    assert parts.shape == whole.shape
    for one, other, windows in zip(
        whole, parts, runner.trajectories.num_starts(K)[rows].tolist(), strict=True
    ):
        torch.testing.assert_close(other[:windows], one[:windows], **TOLERANCE)


def test_states_that_are_kept(runner, read, monkeypatch):
    rows = torch.arange(COUNT)
    whole = MemoryCache(runner.target, runner.trajectories).encoded(rows, LONG)
    assert read == [(16, LONG), (4, int(runner.trajectories.lengths[16:].max()))]
    bound(monkeypatch, runner, 50)
    read.clear()
    parts = MemoryCache(runner.target, runner.trajectories).encoded(rows, LONG)
    assert_bounded(read, 50, COUNT)
    torch.testing.assert_close(parts.hidden, whole.hidden, **TOLERANCE)


def test_held_out_prompts(runner, read, monkeypatch):
    whole = Judge(runner, greedy_drafts=False)()
    assert [count for count, _ in read] == [16, 4]
    bound(monkeypatch, runner, 50)
    read.clear()
    parts = Judge(runner, greedy_drafts=False)()
    assert_bounded(read, 50, COUNT)
    torch.testing.assert_close(parts.num_drafts, whole.num_drafts, **TOLERANCE)


# ---------------------------------------------------------------- the estimate


def test_forwards_of_fewer_windows_do_not_make_passes_smaller():
    estimate = MemoryEstimate(10.0, 20.0, 100.0, windows_per_trajectory=8, pass_bytes=150.0)
    assert [estimate.of(windows) for windows in (16, 8, 1)] == [300.0, 250.0, 250.0]


@pytest.mark.parametrize("logits", [2**20, 2**22, 2**24])
@pytest.mark.parametrize(("kind", "length"), [("tiny/eagle3", 128), ("tiny/causal_lm", 64)])
def test_what_a_walk_takes(logits, kind, length, directories, monkeypatch):
    monkeypatch.setattr(walk, "_LOGITS_ON_CPU", logits)
    runner = make_runner(directories, kind, 16, length)
    judge = Judge(runner, greedy_drafts=False, keep_bytes=0)
    with LiveBytes() as live:
        judge()
    assert 0.8 < walk_bytes(runner) / live.peak < 1.25


@pytest.mark.parametrize("kind", ["tiny/eagle3", "tiny/causal_lm"])
def test_what_a_pass_of_the_target_takes(kind, directories):
    runner = make_runner(directories, kind, 8, 96)
    with LiveBytes() as live:
        runner.target.encode(runner.trajectories)
    assert 0.8 < fill_bytes(runner.target, runner.trajectories) / live.peak < 1.25


def test_every_pass_of_a_run_is_counted(directories, tmp_path):
    runner = make_runner(directories, "causal_lm", 24, 32)
    states = 16 * 32 * pass_bytes_per_token(runner.target)
    plain = estimate_memory(runner, make_config(tmp_path, "cst:tv", 2, 8))
    assert plain.pass_bytes == 0
    adaptive = make_config(tmp_path, "cst:tv", 2, 8, adaptive_windows="true")
    assert estimate_memory(runner, adaptive).pass_bytes == states / 8
    kept = make_config(tmp_path, "cst:tv", 2, 8, target_cache="memory")
    assert estimate_memory(runner, kept).pass_bytes == states
    judge = Judge(runner, greedy_drafts=False)
    judged = estimate_memory(runner, make_config(tmp_path, "cst:tv", 2, 8), [judge])
    assert judged.pass_bytes == walk_bytes(runner) > states


def test_paths_come_in_the_order_of_their_rows(runner):
    rows = [path.rows for path in target_paths(runner)]
    assert torch.cat(rows).equal(torch.cat(path_rows(runner)))
    assert runner.trajectories.lengths[torch.cat(rows)].diff().min() >= 0
