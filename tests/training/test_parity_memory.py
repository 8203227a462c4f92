"""When the parity gate starts vLLM, nothing of the training before it holds memory, and its own is bounded."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_memory import make_config
from training_pair import VOCAB, Directories, K, load

from ppow_train import parity, walk
from ppow_train.pair import load_pair
from ppow_train.rollout import WindowRunner
from ppow_train.selection import Judge
from ppow_train.trainer import PPOWTrainer
from ppow_train.training import train_adapter
from ppow_train.types import Trajectories
from ppow_train.walk import TargetPath, simulate_walk
from vllm_ppow.metrics import SpecDecodeCounts


@pytest.fixture
def held_out() -> Trajectories:
    ids = torch.randint(1, VOCAB, (16, 30), generator=torch.Generator().manual_seed(6))
    return Trajectories(ids, torch.full((16,), 3), torch.full((16,), 30))


@pytest.fixture
def made(monkeypatch) -> list[weakref.ref]:
    """Every trainer, Judge and path of the target that is made."""
    references: list[weakref.ref] = []
    for kind in (PPOWTrainer, Judge, TargetPath):

        def remember(self: Any, *args: Any, _own: Any = kind.__init__, **kwargs: Any) -> None:
            references.append(weakref.ref(self))
            _own(self, *args, **kwargs)

        monkeypatch.setattr(kind, "__init__", remember)
    return references


@pytest.mark.parametrize("kind", ["causal_lm", "eagle3"])
def test_training_is_gone_when_vllm_starts(
    kind, directories, held_out, made, tmp_path, progress, monkeypatch
):
    alive: list[object] = []

    class Engine:
        """Counts nothing."""

        def __init__(self, *args: object) -> None:
            alive.extend(reference() for reference in made if reference() is not None)
            alive.extend(pair.target._last)

        def __enter__(self) -> Engine:
            return self

        def __exit__(self, *args: object) -> None: ...

        def wait_until_ready(self) -> None: ...

        def run(self, prompts: list[list[int]], *, max_tokens: int, **kwargs: object) -> SimpleNamespace:
            tokens = [[1] * max_tokens for _ in prompts]
            return SimpleNamespace(counts=SpecDecodeCounts(1, 8, 0, (0,) * 8), tokens=tokens)

    monkeypatch.setattr(parity, "Engine", Engine)
    pair = load_pair(str(directories.target), str(directories.drafter[kind]))
    config = make_config(tmp_path / "state", "cst:tv", 4, 8, max_steps=2, eval_steps=1)
    gc.collect()
    gc.disable()  # or it might do by chance what is tested
    try:
        output = tmp_path / "adapter"
        result = train_adapter(pair, held_out, config, output, held_out=held_out, progress=progress)
        names = {type(one).__name__ for one in (reference() for reference in made) if one is not None}
        assert "PPOWTrainer" in names, "nothing keeps it alive: is this test needed any more?"
        assert "TargetPath" not in names, "what was kept for walks goes when the last one is done"
        assert result.report is not None
        parity.check_parity(pair, result.adapter, directories.drafter[kind], result.report)
    finally:
        gc.enable()
    assert alive == []


def test_windows_of_a_forward_are_bounded_by_their_distributions(directories: Directories, monkeypatch):
    pair = load(directories, "reduced")
    ids = torch.randint(1, VOCAB, (2, 40), generator=torch.Generator().manual_seed(6))
    rows = Trajectories(ids, torch.full((2,), 3), torch.full((2,), 40))
    runner = WindowRunner(pair.target, pair.drafter, rows, K, 0.7)
    seen: list[int] = []
    windows = WindowRunner.path_windows

    def watched(self: WindowRunner, trajectory: torch.Tensor, start: torch.Tensor):
        seen.append(len(start))
        return windows(self, trajectory, start)

    monkeypatch.setattr(WindowRunner, "path_windows", watched)
    whole = simulate_walk(runner, 20, greedy_drafts=True)
    assert seen == [33, 33]
    columns = pair.target.vocab_size + len(pair.drafter.vocabulary.target_ids) + 1
    monkeypatch.setattr(walk, "_LOGITS_ON_GPU", 10 * K * columns + 1)
    seen.clear()
    assert simulate_walk(runner, 20, greedy_drafts=True) == whole
    assert seen == [10, 10, 10, 3] * 2
    monkeypatch.setattr(walk, "_LOGITS_ON_GPU", 1)
    assert walk._windows_at_a_time(runner) == 1
