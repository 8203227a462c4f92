"""Fixtures of the training tests; what they are made of is in training_pair.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from rich.console import Console
from training_pair import KINDS, VOCAB, Directories, K, LoadedPair, build, load

from ppow_train.rollout import WindowRunner
from ppow_train.types import Trajectories

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def directories(tmp_path_factory: Any) -> Directories:
    return build(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="session", params=KINDS)
def loaded(request: Any, directories: Directories) -> LoadedPair:
    """Target and drafter of every kind in turn."""
    return load(directories, request.param)


@pytest.fixture(scope="session")
def trajectories() -> Trajectories:
    """Three of unequal lengths, right-padded; what stands in the padding must never matter."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, VOCAB, (3, 20), generator=generator)
    return Trajectories(ids, torch.tensor([3, 5, 1]), torch.tensor([20, 14, 11]))


@pytest.fixture
def runner(loaded: LoadedPair, trajectories: Trajectories) -> WindowRunner:
    return WindowRunner(loaded.target, loaded.drafter, trajectories, K, temperature=0.7)


@pytest.fixture(scope="session")
def progress():
    """A progress display that shows nothing."""
    from ppow_train.progress import make_progress

    return make_progress(Console(quiet=True))
