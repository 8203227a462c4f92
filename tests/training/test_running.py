"""One run in several processes, in several forwards per update, in several lives: always the same adapter."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file
from test_bad_input import refused
from training_lives import curve, log, start, train_and_die, train_in_group, train_into
from training_pair import VOCAB

from ppow_train.checkpoints import RUN, STATE, finish_run, open_run, run_facts
from ppow_train.config import PPOWConfig
from ppow_train.types import Trajectories
from vllm_ppow.artifact import read_adapter

OBJECTIVES = ("cst:tv", "ppow")
# Where a run is killed, and how often a whole run of six updates passes there.
PLACES = {
    "ppow_train.trainer:PPOWTrainer.training_step": 6,
    "ppow_train.checkpoints:write_whole": 3,  # run.json, then the mark of each checkpoint
    "torch:save": 6,  # optimizer, schedule and random state: in the middle of a checkpoint
    "transformers.trainer:rotate_checkpoints": 2,
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


def windows(directory: Path) -> str:
    return (directory / "adapter" / "windows.jsonl").read_text(encoding="utf-8")


def assert_close(one: Path, other: Path) -> None:
    """Equal but for the order of float32 sums: seen 3e-5 on weights up to 0.13, where one update moves them by 3e-3."""
    adapters = [load_file(directory / "adapter" / "adapter_model.safetensors") for directory in (one, other)]
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], tensor, atol=3e-4, rtol=0)
    torch.testing.assert_close(torch.tensor(curve(one)), torch.tensor(curve(other)), atol=1e-5, rtol=1e-3)


# ---------------------------------------------------------------- the same windows, divided


def test_two_processes_train_what_one_trains(unbroken, directories, trajectories, tmp_path):
    objective, alone = unbroken
    codes = train_in_group(2, tmp_path, directories, trajectories, objective=objective, windows_per_forward=4)
    assert codes == [0, 0]
    assert_close(alone, tmp_path)


def test_forwards_of_fewer_windows_train_the_same(unbroken, directories, trajectories, tmp_path):
    """Adam would forgive a wrong scale of the loss; what is logged does not."""
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


@pytest.mark.slow
def test_accelerate_starts_two_processes_on_a_cpu(directories, tmp_path):
    """The README's command, where --cpu would start one process only: two processes, one adapter."""
    prompts = tmp_path / "prompts.jsonl"
    texts = ("windows", "of draft", "tokens ", "dow", "raft", "ken")
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), encoding="utf-8")
    launch = ["-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu", "--num_processes", "2"]
    options = {
        "target": directories.target, "drafter": directories.drafter["eagle3"], "prompts": prompts,
        "output": tmp_path / "adapter", "cache": tmp_path / "cache", "device": "cpu", "max-new-tokens": 24,
        "max-steps": 2, "trajectories-per-step": 2, "windows-per-step": 8, "lora-rank": 4,
    }  # fmt: skip
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, *launch, "-m", "ppow_train.cli", "train", *flags, "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (told,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert json.loads(told)["training"]["options"]["windows_per_forward"] == 4  # each has half of an update's
    assert [path.name for path in tmp_path.glob("adapter*")] == ["adapter"]


# ---------------------------------------------------------------- killed and resumed


def test_a_run_killed_anywhere_goes_on_bit_by_bit(unbroken, directories, trajectories, tmp_path):
    objective, alone = unbroken
    dice = random.Random(objective)
    options = {"objective": objective, "resume": True}
    deaths = [(place, dice.randrange(PLACES[place])) for place in dice.sample(sorted(PLACES), 3)]
    # Past a checkpoint and past the last line of the log: what both have not seen must be found again.
    deaths = [("ppow_train.trainer:PPOWTrainer.training_step", 4), *deaths]
    codes = [
        finish(start(train_and_die, fatal, tmp_path, directories, trajectories, **options))
        for fatal in deaths
    ]
    assert set(codes) <= {-signal.SIGKILL, 0}, "a life after a kill may end before its own"
    assert codes.count(-signal.SIGKILL) >= 2
    assert finish(start(train_into, tmp_path, directories, trajectories, **options)) == 0
    assert weights(tmp_path) == weights(alone)
    assert log(tmp_path) == log(alone)
    assert windows(tmp_path) == windows(alone)
    assert not (tmp_path / "state").exists()


def test_a_killed_run_on_an_output_layer_goes_on_bit_by_bit(directories, trajectories, tmp_path):
    """Its training state holds LoRA alone, no embeddings."""
    options = {"objective": "cst:jsd", "lora_targets": ["q_proj", "lm_head"]}
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    for directory in (alone, killed):
        directory.mkdir()
    assert finish(start(train_into, alone, directories, trajectories, **options)) == 0
    fatal = ("ppow_train.trainer:PPOWTrainer.training_step", 4)
    life = start(train_and_die, fatal, killed, directories, trajectories, **options)
    assert finish(life) == -signal.SIGKILL
    (state,) = (killed / "state").glob("checkpoint-*/adapter_model.safetensors")
    saved = load_file(state)
    assert all(".lora_" in name for name in saved)
    assert any(".lm_head." in name for name in saved)
    assert finish(start(train_into, killed, directories, trajectories, resume=True, **options)) == 0
    assert weights(killed) == weights(alone)
    assert log(killed) == log(alone)


def held_out() -> Trajectories:
    """Twelve texts to choose the best adapter on."""
    ids = torch.randint(1, VOCAB, (12, 20), generator=torch.Generator().manual_seed(7))
    return Trajectories(ids, torch.full((12,), 3), torch.full((12,), 20))


def test_a_run_that_diverges_keeps_the_same_adapter_in_two_processes_and_after_a_kill(
    directories, trajectories, tmp_path, monkeypatch
):
    """Killed when the adapter was to be written, it goes on from its last checkpoint and diverges again."""
    from ppow_train.trainer import PPOWTrainer

    own = PPOWTrainer._compute_loss

    def spoilt(self, model, inputs):
        return own(self, model, inputs) * (float("nan") if self.state.global_step == 4 else 1.0)

    monkeypatch.setattr(PPOWTrainer, "_compute_loss", spoilt)
    monkeypatch.setattr("ppow_train.selection.SelectionState.beats_untrained", True)
    options = {"held_out": held_out(), "eval_steps": 2}
    alone, two, killed = (tmp_path / name for name in ("alone", "two", "killed"))
    for directory in (alone, two, killed):
        directory.mkdir()
    assert finish(start(train_into, alone, directories, trajectories, **options)) == 0
    assert train_in_group(2, two, directories, trajectories, **options) == [0, 0]
    fatal = ("ppow_train.training:write_adapter", 0)
    assert (
        finish(start(train_and_die, fatal, killed, directories, trajectories, **options)) == -signal.SIGKILL
    )
    assert finish(start(train_into, killed, directories, trajectories, resume=True, **options)) == 0
    assert weights(killed) == weights(alone)
    assert windows(killed) == windows(alone)
    chosen = [read_adapter(d / "adapter").config.training["selection"] for d in (alone, two, killed)]
    assert chosen[0]["diverged_at_update"] == 5
    assert chosen[2] == chosen[0]
    assert chosen[1]["written_after_updates"] == chosen[0]["written_after_updates"]
    assert not any((d / "state").exists() for d in (alone, two, killed))


def test_the_best_adapter_is_chosen_alike_in_two_processes_and_after_a_kill(
    directories, trajectories, tmp_path
):
    options = {"held_out": held_out(), "eval_steps": 2}
    alone, two, killed = (tmp_path / name for name in ("alone", "two", "killed"))
    for directory in (alone, two, killed):
        directory.mkdir()
    assert finish(start(train_into, alone, directories, trajectories, **options)) == 0
    assert train_in_group(2, two, directories, trajectories, **options) == [0, 0]
    assert_close(alone, two)
    fatal = ("ppow_train.trainer:PPOWTrainer.training_step", 4)
    life = start(train_and_die, fatal, killed, directories, trajectories, **options)
    assert finish(life) == -signal.SIGKILL
    options = {**options, "keep_best": True, "resume": True}
    assert finish(start(train_into, killed, directories, trajectories, **options)) == 0
    assert weights(killed) == weights(alone)
    assert log(killed) == log(alone)
    chosen = [read_adapter(d / "adapter").config.training["selection"] for d in (alone, two, killed)]
    assert chosen[2] == chosen[0]
    assert chosen[1]["written_after_updates"] == chosen[0]["written_after_updates"]


# ---------------------------------------------------------------- the directory of training state


FACTS = {"seed": 0, "learning_rate": 0.003}


def begin(directory: Path, facts: dict = FACTS, resume: bool = False) -> Path | None:
    """Enter a run and leave it unfinished, as a kill does."""
    PartialState(cpu=True)
    with open_run(directory, facts, resume) as checkpoint:
        return checkpoint


def save(directory: Path, step: int, whole: bool = True) -> Path:
    checkpoint = directory / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "optimizer.pt").write_bytes(b"moments")
    if whole:
        (checkpoint / STATE).write_text("{}")
    return checkpoint


def test_the_newest_whole_checkpoint_is_taken(tmp_path):
    assert begin(tmp_path / "state") is None
    save(tmp_path / "state", 9)
    newest, cut_off = save(tmp_path / "state", 10), save(tmp_path / "state", 11, whole=False)
    assert begin(tmp_path / "state", resume=True) == newest
    assert not cut_off.exists()


def test_an_unfinished_run_is_not_begun_again(tmp_path):
    begin(tmp_path / "state")
    checkpoint = save(tmp_path / "state", 5)
    with refused("unfinished run of this very configuration", "--resume", "delete"):
        begin(tmp_path / "state")
    with refused(r"seed 0 \(now 1\)", "--resume", "other --checkpoints"):
        begin(tmp_path / "state", {**FACTS, "seed": 1}, resume=True)
    (tmp_path / "state" / RUN).write_text("{")
    with refused("damaged", "delete"):
        begin(tmp_path / "state", resume=True)
    assert (checkpoint / STATE).exists()


def test_the_directory_of_something_else(tmp_path):
    save(tmp_path / "mine", 5)
    with refused("something else", "other --checkpoints"):
        begin(tmp_path / "mine", resume=True)
    (tmp_path / "file").write_text("mine")
    with refused("something else"):
        begin(tmp_path / "file")


def test_two_runs_at_once(tmp_path):
    begin(tmp_path / "state")
    with open_run(tmp_path / "state", FACTS, resume=True), refused("another process"):
        begin(tmp_path / "state", resume=True)


def test_a_finished_run_leaves_what_is_not_its_own(tmp_path):
    begin(tmp_path / "state")
    save(tmp_path / "state", 5)
    (tmp_path / "state" / "runs").mkdir()
    finish_run(tmp_path / "state")
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["runs"]


def test_what_a_resumed_run_may_change(trajectories, tmp_path):
    def facts(**options: object) -> dict:
        config = PPOWConfig(**{"output_dir": str(tmp_path), "use_cpu": True, **options})
        return run_facts(config, trajectories, target="sha256:0")

    same = facts(output_dir=str(tmp_path / "moved"), save_steps=7, save_total_limit=3, logging_steps=1)
    assert facts() == same
    other = Trajectories(trajectories.input_ids + 1, trajectories.prompt_lengths, trajectories.lengths)
    assert run_facts(PPOWConfig(output_dir=str(tmp_path), use_cpu=True), other, target="sha256:0") != same
    for change in ({"seed": 1}, {"windows_per_forward": 64}, {"weight_decay": 0.1}, {"bf16": True}):
        assert facts(**change) != same, change


# ---------------------------------------------------------------- numbers and logs


@pytest.mark.parametrize(
    ("objective", "kind", "tolerance"), [("cst:tv", "causal_lm", 0.05), ("ppow", "eagle3", 0.2)]
)
def test_bf16_trains_much_the_same(objective, kind, tolerance, directories, trajectories, tmp_path):
    losses = []
    for name, bf16 in (("fp32", False), ("bf16", True)):
        (tmp_path / name).mkdir()
        options = {"objective": objective, "kind": kind, "bf16": bf16, "max_steps": 2, "save_strategy": "no"}
        train_into(tmp_path / name, directories, trajectories, **options)
        losses.append(curve(tmp_path / name)[-1][1])
    assert losses[0] != losses[1], "bf16 changed nothing: was the forward run under autocast?"
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)  # ppow drafts other windows
