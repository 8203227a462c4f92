"""One run in several processes, in several forwards per update, in several lives: always the same adapter."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest
import torch
from runs import losses, start, train_and_die, train_in_group, train_into
from safetensors.torch import load_file
from test_bad_input import refused
from training_pair import VOCAB

from ppow_train.checkpoints import RUN, STATE
from ppow_train.types import Trajectories

OBJECTIVES = ("cst:tv", "ppow")
# Where a run is killed, and how often a whole run of six updates passes there.
PLACES = {
    "ppow_train.trainer:PPOWTrainer.training_step": 6,
    "ppow_train.checkpoints:write_whole": 4,  # run.json, then the mark of each checkpoint
    "torch:save": 9,  # optimizer, schedule and random state: in the middle of a checkpoint
    "transformers.trainer:rotate_checkpoints": 3,
    "ppow_train.training:write_adapter": 1,
    "ppow_train.training:finish_run": 1,
}


@pytest.fixture(scope="module")
def trajectories() -> Trajectories:
    ids = torch.randint(1, VOCAB, (6, 24), generator=torch.Generator().manual_seed(5))
    return Trajectories(ids, torch.tensor([3, 5, 1, 2, 4, 3]), torch.tensor([24, 20, 18, 24, 17, 22]))


@pytest.fixture(scope="module", params=OBJECTIVES)
def unbroken(request, directories, trajectories, tmp_path_factory):
    """An objective, and what one process that nobody disturbed made of it."""
    directory = tmp_path_factory.mktemp("unbroken")
    assert finish(start(train_into, directory, directories, trajectories, objective=request.param)) == 0
    return request.param, directory


def finish(process, limit_s: float = 120.0) -> int | None:
    process.join(limit_s)
    if process.is_alive():
        process.kill()
        pytest.fail(f"still running after {limit_s} s")
    return process.exitcode


def weights(directory: Path) -> bytes:
    return (directory / "adapter" / "adapter_model.safetensors").read_bytes()


def assert_close(one: Path, other: Path) -> None:
    """Adapters and losses equal but for the order of float32 sums: seen 3e-5 on weights up to 0.13, 3e-8 on losses."""
    adapters = [load_file(directory / "adapter" / "adapter_model.safetensors") for directory in (one, other)]
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], tensor, atol=3e-4, rtol=0)
    assert [step for step, _ in losses(one)] == [step for step, _ in losses(other)]
    assert [loss for _, loss in losses(one)] == pytest.approx([loss for _, loss in losses(other)], abs=1e-5)


# ---------------------------------------------------------------- the same windows, divided


def test_two_processes_train_what_one_trains(unbroken, directories, trajectories, tmp_path):
    objective, alone = unbroken
    codes = train_in_group(2, tmp_path, directories, trajectories, objective=objective, windows_per_forward=4)
    assert codes == [0, 0]
    assert_close(alone, tmp_path)


def test_forwards_of_fewer_windows_train_the_same(unbroken, directories, trajectories, tmp_path):
    """Learning rate and clipping would hide a wrong scale of the gradient from Adam, but not from the logged norm."""
    objective, alone = unbroken
    options = {"objective": objective, "windows_per_forward": 5}  # 4 of them, since all forwards are alike
    assert finish(start(train_into, tmp_path, directories, trajectories, **options)) == 0
    assert_close(alone, tmp_path)


def test_an_error_in_one_process_ends_the_others(directories, trajectories, tmp_path, monkeypatch):
    from ppow_train.trainer import PPOWTrainer

    step = PPOWTrainer.training_step

    def failing(self, *args, **kwargs):
        if self.accelerator.process_index == 1 and self.state.global_step == 1:
            raise RuntimeError("lost")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(PPOWTrainer, "training_step", failing)
    began = time.monotonic()
    codes = train_in_group(2, tmp_path, directories, trajectories)
    assert codes == [1, 1]
    assert time.monotonic() - began < 100
    assert not (tmp_path / "adapter").exists()


# ---------------------------------------------------------------- killed and resumed


def test_a_run_killed_anywhere_goes_on_bit_by_bit(unbroken, directories, trajectories, tmp_path):
    objective, alone = unbroken
    dice = random.Random(objective)
    options = {"objective": objective, "save_steps": 2, "resume": True}
    begun = 0
    for place in dice.sample(sorted(PLACES), 4):
        fatal = (place, dice.randrange(PLACES[place]))
        code = finish(start(train_and_die, fatal, tmp_path, directories, trajectories, **options))
        assert code in (-signal.SIGKILL, 0), fatal
        begun += (tmp_path / "state").exists()
    assert begun
    assert finish(start(train_into, tmp_path, directories, trajectories, **options)) == 0
    assert weights(tmp_path) == weights(alone)
    assert losses(tmp_path) == losses(alone)
    assert not (tmp_path / "state").exists()
