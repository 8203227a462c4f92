"""Of the held-out prompts' states no more is kept than a limit says; the rest is computed anew and nothing changes."""

from __future__ import annotations

import pytest
import torch
from test_memory import make_config
from training_pair import VOCAB, Directories, K, load

from ppow_train import selection, training
from ppow_train.estimate import estimate_run
from ppow_train.memory import MemoryEstimate, estimate_memory
from ppow_train.pair import load_pair
from ppow_train.rollout import WindowRunner
from ppow_train.selection import Judge
from ppow_train.target import Target
from ppow_train.training import train_adapter
from ppow_train.types import FlatTrajectories, Trajectories
from ppow_train.walk import TargetPath, path_bytes, path_rows

COUNT = 40  # three batches


@pytest.fixture(scope="module")
def held_out() -> Trajectories:
    generator = torch.Generator().manual_seed(6)
    lengths = torch.randint(20, 35, (COUNT,), generator=generator)
    ids = torch.randint(1, VOCAB, (COUNT, 34), generator=generator)
    return FlatTrajectories.of(Trajectories(ids, torch.full((COUNT,), 3), lengths))


@pytest.fixture(params=["eagle3", "causal_lm"])
def runner(request, directories: Directories, held_out: Trajectories) -> WindowRunner:
    pair = load(directories, request.param)
    return WindowRunner(pair.target, pair.drafter, held_out, K, 0.7)


@pytest.fixture
def read(monkeypatch) -> list[int]:
    """How many trajectories the target reads in each of its passes."""
    seen = []
    encode = Target.encode

    def watched(self: Target, chosen: Trajectories):
        seen.append(len(chosen))
        return encode(self, chosen)

    monkeypatch.setattr(Target, "encode", watched)
    return seen


def kept_storage(paths: list[TargetPath]) -> int:
    """Bytes that these keep alive."""
    tensors = [
        tensor
        for path in paths
        for tensor in (path.encoded.hidden, path.encoded.taps, path.logps, path.trajectories.input_ids)
        if tensor is not None
    ]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize(("batches", "read_again"), [(0, [16, 16, 8]), (1, [16, 8]), (2, [8]), (3, [])])
def test_what_is_beyond_the_limit_is_computed_anew(batches, read_again, runner, read):
    sizes = [path_bytes(runner, rows) for rows in path_rows(runner)]
    wanted = Judge(runner, greedy_drafts=False, keep_bytes=float("inf"))()
    judge = Judge(runner, greedy_drafts=False, keep_bytes=sum(sizes[:batches]) + 1)
    assert judge.kept_bytes == sum(sizes[:batches])
    for expected in ([16, 16, 8], read_again, read_again):
        read.clear()
        walked = judge()
        assert read == expected
        assert walked.num_drafts.equal(wanted.num_drafts)
        assert walked.num_accepted_tokens_per_pos.equal(wanted.num_accepted_tokens_per_pos)
        assert kept_storage(judge._kept) <= judge.kept_bytes
    judge.forget()
    assert judge._kept == []
    assert judge().num_drafts.equal(wanted.num_drafts)


def test_no_keys_and_values_outlive_a_walk(runner):
    judge = Judge(runner, greedy_drafts=False, keep_bytes=float("inf"))
    judge()
    assert runner.target._last == []
    assert [path.encoded.cache for path in judge._kept] == [None] * 3


def test_the_size_is_what_is_kept(runner):
    judge = Judge(runner, greedy_drafts=False, keep_bytes=float("inf"))
    judge()
    assert 0.9 < kept_storage(judge._kept) / judge.kept_bytes <= 1


def test_the_limit_is_a_share_of_what_is_free(runner, monkeypatch):
    sizes = [path_bytes(runner, rows) for rows in path_rows(runner)]
    monkeypatch.setattr(selection, "available_bytes", lambda device: 2 * sizes[0] / selection.KEPT_SHARE)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # each of them has half
    assert Judge(runner, greedy_drafts=False).kept_bytes == sizes[0]


def test_the_estimate_counts_what_is_kept(runner, tmp_path):
    config = make_config(tmp_path, "cst:tv", 4, 8)
    judges = [Judge(runner, False, keep_bytes=limit) for limit in (float("inf"), 0)]
    with_judges, without = estimate_memory(runner, config, judges), estimate_memory(runner, config)
    assert with_judges.fixed_bytes - without.fixed_bytes == judges[0].kept_bytes > 0


@pytest.mark.parametrize("whole", [True, False])
def test_a_run_is_divided_by_an_estimate_that_counts_it(
    whole, directories, held_out, tmp_path, progress, monkeypatch
):
    """And what `--estimate` says counts it as well."""
    seen: list[MemoryEstimate] = []
    monkeypatch.setattr(
        "ppow_train.microbatches.windows_that_fit", lambda estimate, *_: seen.append(estimate) or 8
    )
    config = make_config(tmp_path / "state", "cst:tv", 4, 8, max_steps=1, eval_steps=1)
    pair = load_pair(str(directories.target), str(directories.drafter["causal_lm"]))
    if whole:
        train_adapter(pair, held_out, config, tmp_path / "adapter", held_out=held_out, progress=progress)
    else:
        estimate_run(pair, held_out, config, tmp_path / "state", held_out, progress=progress)
    alone = estimate_memory(training.make_runner(pair, held_out, config), config)
    assert seen[0].fixed_bytes > alone.fixed_bytes
    assert seen[0].pass_bytes > alone.pass_bytes == 0
