"""Fixtures of the training tests; what they are made of is in training_pair.py."""

from __future__ import annotations

import json
from pathlib import Path
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


@pytest.fixture
def small_study(directories, tmp_path) -> Path:
    """A plan for the test pair: two arms, one of them drafting, in two cells."""
    texts = ["windows", "of draft", "tokens ", "dow", "so", "many"]
    for name, more in (("train", ""), ("held_out", " so")):
        lines = "".join(json.dumps({"prompt": text + more}) + "\n" for text in texts)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    cells = [
        {
            "name": name,
            "drafter": str(directories.drafter[name]),
            "prompts": str(tmp_path / "train.jsonl"),
            "held_out": str(tmp_path / "held_out.jsonl"),
            "temperature": temperature,
        }
        for name, temperature in (("eagle3", 1.0), ("causal_lm", 0.0))
    ]
    cells[1]["tuned_like"] = "eagle3"
    values = {
        "target": str(directories.target),
        "cells": cells,
        "arms": {"cst:tv": {"objective": "cst:tv"}, "ppow": {"objective": "ppow", "num_generations": 2}},
        "reference": "cst:tv",
        "seeds": [0],
        "learning_rates": [0.003],
        "tuning_prompts": 2,
        "steps": [2],
        "options": {"num_speculative_tokens": K, "trajectories_per_step": 2, "windows_per_step": 4},
        "max_new_tokens": 12,
        "max_tokens": 8,
    }
    (tmp_path / "plan.yaml").write_text(json.dumps(values), encoding="utf-8")  # JSON is YAML
    return tmp_path / "plan.yaml"
