"""The memory model against every tensor of real updates, the choice that follows from it, and what the machine has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from live_bytes import LiveBytes
from peft import LoraConfig, inject_adapter_in_model
from training_pair import VOCAB, Directories, load

from ppow_train.cli import run
from ppow_train.config import PPOWConfig
from ppow_train.errors import UserError
from ppow_train.estimate import estimate_run
from ppow_train.machine import available_bytes, peak_bytes
from ppow_train.memory import (
    SHARE,
    MemoryEstimate,
    estimate_memory,
    windows_that_fit,
)
from ppow_train.microbatches import choose_windows_per_forward
from ppow_train.objectives.choose import make_objective
from ppow_train.pair import load_pair
from ppow_train.rollout import WindowRunner
from ppow_train.target import Target
from ppow_train.training import train_adapter
from ppow_train.types import Trajectories

TINY = Path(__file__).parents[2] / "examples" / "tiny"
K = 8


def make_runner(
    directories: Directories, kind: str, count: int, length: int, rank: int = 8, more: tuple[str, ...] = ()
) -> WindowRunner:
    """A pair with LoRA, on `more` modules, too; `tiny` kinds have layers and a vocabulary in other proportions."""
    if kind.startswith("tiny/"):
        directories = Directories(TINY, TINY / "target", {kind: TINY / kind.removeprefix("tiny/")})
    pair = load(directories, kind)
    targets = [*pair.drafter.lora_targets, *more]
    inject_adapter_in_model(LoraConfig(r=rank, target_modules=targets), pair.drafter.model)
    for name, parameter in pair.drafter.model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    ids = torch.randint(1, VOCAB, (count, length), generator=torch.Generator().manual_seed(0))
    lengths = torch.full((count,), length)
    return WindowRunner(
        pair.target, pair.drafter, Trajectories(ids, torch.full_like(lengths, 4), lengths), K, 1.0
    )


def make_config(tmp_path: Path, objective: str, count: int, windows: int, **options: Any) -> PPOWConfig:
    return PPOWConfig(
        objective=objective,
        num_speculative_tokens=K,
        trajectories_per_step=count,
        windows_per_step=count * windows,
        use_cpu=True,
        **{
            "lora_rank": 8,
            "adaptive_windows": "false",
            "target_cache": "none",
            "output_dir": str(tmp_path),
            **options,
        },
    )


def measured(runner: WindowRunner, config: PPOWConfig, windows: int) -> int:
    """Peak of live bytes of one update: rollout if there is one, forward, backward."""
    count = len(runner.trajectories)
    trajectory = torch.arange(count).repeat_interleave(windows)
    room = int(runner.trajectories.num_starts(K)[0])
    start = 5 + torch.randint(room, (count * windows,), generator=torch.Generator().manual_seed(0))
    weights = [p for p in runner.drafter.model.parameters() if p.requires_grad]
    with LiveBytes() as live:
        if config.is_rollout:
            noise = runner.draw_noise(len(start), torch.Generator().manual_seed(0))
            rollout = runner.roll_out(trajectory, start, noise)
            loss = runner.draft_logps(trajectory, start, rollout.tokens)[0].mean()
        else:
            loss = make_objective(config)(runner.path_windows(trajectory, start))
        torch.autograd.grad(loss, weights)
    return live.peak


@pytest.mark.parametrize(
    ("kind", "objective", "count", "windows", "length"),
    [
        ("tiny/eagle3", "cst:tv", 2, 16, 64),
        ("tiny/eagle3", "exact", 2, 8, 128),
        ("tiny/eagle3", "ppow", 1, 16, 96),
        ("tiny/causal_lm", "cst:lk_hybrid", 2, 16, 64),
        ("tiny/causal_lm", "cst:kl", 1, 4, 128),
        ("tiny/causal_lm", "ppow", 2, 16, 64),
        ("reduced", "overlap", 2, 16, 64),
        ("reduced", "ppow", 2, 8, 64),
        ("original", "cst:jsd", 2, 8, 96),
        ("eagle31", "cst:ce", 2, 8, 96),
        ("tiny/eagle3", "drafts", 2, 16, 64),
        ("tiny/eagle3", "overlap + 4 * cst:tv", 2, 16, 64),
    ],
)
def test_the_model_is_near_what_updates_take(kind, objective, count, windows, length, directories, tmp_path):
    check_near(
        make_runner(directories, kind, count, length), make_config(tmp_path, objective, count, windows)
    )


@pytest.mark.parametrize(("kind", "objective"), [("reduced", "ppow"), ("original", "cst:jsd")])
def test_a_rank_above_the_width_is_counted(kind, objective, directories, tmp_path):
    """Without what lies between A and B the estimate is below 0.8 times what is measured."""
    config = make_config(tmp_path, objective, 2, 8, lora_rank=128)
    check_near(make_runner(directories, kind, 2, 64, rank=128), config)


@pytest.mark.parametrize("objective", ["cst:jsd", "ppow"])
@pytest.mark.parametrize("kind", ["tiny/eagle3", "reduced"])
def test_an_output_layer_that_is_adapted_is_counted(kind, objective, directories, tmp_path):
    runner = make_runner(directories, kind, 2, 64, rank=128, more=("lm_head",))
    targets = [*runner.drafter.lora_targets, "lm_head"]
    check_near(runner, make_config(tmp_path, objective, 2, 16, lora_rank=128, lora_targets=targets))


def check_near(runner: WindowRunner, config: PPOWConfig) -> None:
    estimate = estimate_memory(runner, config)
    # LoRA and its optimizer were there before, or come after.
    estimated = estimate.of(config.windows_per_step) - estimate.fixed_bytes
    windows = config.windows_per_step // config.trajectories_per_step
    assert 0.8 < estimated / measured(runner, config, windows) < 1.25


def test_fixed_bytes_are_lora_and_criticality(directories, tmp_path):
    injected = make_runner(directories, "causal_lm", 2, 32)
    weights = sum(p.numel() for p in injected.drafter.model.parameters() if p.requires_grad)
    pair = load(directories, "causal_lm")
    runner = WindowRunner(pair.target, pair.drafter, injected.trajectories, K, 1.0)
    fixed = estimate_memory(runner, make_config(tmp_path, "cst:tv", 2, 8)).fixed_bytes
    assert fixed == 16 * weights > 0
    options = {"adaptive_windows": "true"}
    adaptive = estimate_memory(runner, make_config(tmp_path, "cst:tv", 2, 8, **options)).fixed_bytes
    with LiveBytes() as live:
        runner.criticality(torch.arange(len(runner.trajectories)))
    assert live.peak / 1.6 < adaptive - fixed < live.peak * 1.25


# ---------------------------------------------------------------- the choice


ESTIMATE = MemoryEstimate(window_bytes=10.0, prefix_bytes=20.0, fixed_bytes=100.0, windows_per_trajectory=8)


@pytest.mark.parametrize(
    ("windows", "wanted"),
    [(16, 100 + 40 + 160), (8, 200), (4, 100 + 20 + 40), (1, 130), (12, 100 + 60 + 240)],
)
def test_an_estimate_counts_prefixes_and_padding(windows, wanted):
    """12 windows of 8 a trajectory touch up to 3 of them, each padded to 8."""
    assert ESTIMATE.of(windows) == wanted


@pytest.mark.parametrize(("needed", "chosen"), [(300, 16), (299, 8), (200, 8), (199, 4), (130, 1)])
def test_as_many_windows_as_fit(needed, chosen):
    assert windows_that_fit(ESTIMATE, needed / SHARE + 1e-9, 16) == chosen


def test_one_window_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match=r"One window .* needs about .* lower num_speculative_tokens"):
        windows_that_fit(ESTIMATE, 129 / SHARE, 16)


def memory_for(estimate: MemoryEstimate, windows: int) -> float:
    return estimate.of(windows) / SHARE


def test_a_run_is_divided_until_it_fits(directories, tmp_path, progress, monkeypatch):
    pair = load_pair(str(directories.target), str(directories.drafter["causal_lm"]))
    trajectories = make_runner(directories, "causal_lm", 4, 32).trajectories
    config = make_config(tmp_path / "state", "cst:tv", 4, 8, max_steps=1)
    runner = WindowRunner(pair.target, pair.drafter, trajectories, K, 1.0)
    room = memory_for(estimate_memory(runner, config), 8)
    monkeypatch.setattr("ppow_train.microbatches.available_bytes", lambda device: room)
    result = train_adapter(pair, trajectories, config, tmp_path / "adapter", progress=progress)
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (8, 4)
    facts = result.adapter.config.training
    assert facts["options"]["windows_per_forward"] == 8
    assert facts["peak_memory_bytes"] > 2**20

    room *= 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # each of them has half
    assert choose_windows_per_forward(runner, make_config(tmp_path, "cst:tv", 4, 8)) == 8


def test_a_run_that_does_not_fit_is_refused_before_it_starts(directories, tmp_path, progress, monkeypatch):
    pair = load_pair(str(directories.target), str(directories.drafter["causal_lm"]))
    trajectories = make_runner(directories, "causal_lm", 4, 32).trajectories
    config = make_config(tmp_path / "state", "cst:tv", 4, 8)
    monkeypatch.setattr("ppow_train.microbatches.available_bytes", lambda device: 1000)
    with pytest.raises(UserError, match="One window"):
        train_adapter(pair, trajectories, config, tmp_path / "adapter", progress=progress)
    assert not (tmp_path / "state").exists()
    assert not any("lora" in name for name, _ in pair.drafter.model.named_modules())


def test_a_resumed_run_keeps_its_division(directories, tmp_path, progress, monkeypatch):
    """Less memory here than where it began: it goes on as it was, or it would be another run to the bit."""
    pair = load_pair(str(directories.target), str(directories.drafter["causal_lm"]))
    trajectories = make_runner(directories, "causal_lm", 4, 32).trajectories
    runner = WindowRunner(pair.target, pair.drafter, trajectories, K, 1.0)

    def train(room: int, windows: int | None = None, resume: bool = True) -> PPOWConfig:
        config = make_config(
            tmp_path / "state", "cst:tv", 4, 8, max_steps=2, save_steps=1, windows_per_forward=windows
        )
        needed = memory_for(estimate_memory(runner, config), room)
        monkeypatch.setattr("ppow_train.microbatches.available_bytes", lambda device: needed)
        train_adapter(pair, trajectories, config, tmp_path / "adapter", resume=resume, progress=progress)
        return config

    with monkeypatch.context() as broken:
        broken.setattr("ppow_train.training.write_adapter", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(room=16)
    with pytest.raises(UserError, match="of this very configuration: add --resume"):
        train(room=2, resume=False)
    with pytest.raises(UserError, match=r"windows_per_forward 16 \(now 4\)"):
        train(room=2, windows=4)
    assert train(room=2).per_device_train_batch_size == 16


# ---------------------------------------------------------------- the machine


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


MEMINFO = "MemTotal:  9000 kB\nMemAvailable:    4000 kB\nSwapTotal: 0 kB\n"
GROUP = {
    "memory.max": "3000000\n",
    "memory.current": "2500000\n",
    "memory.stat": "anon 1\ninactive_file 500000\n",
}


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({}, 4_096_000),
        ({f"sys/fs/cgroup/{name}": text for name, text in GROUP.items()}, 1_000_000),
        (
            {"proc/self/cgroup": "0::/user/job\n", "sys/fs/cgroup/user/memory.max": "max\n"}
            | {f"sys/fs/cgroup/user/job/{name}": text for name, text in GROUP.items()},
            1_000_000,
        ),
        (
            {"proc/self/cgroup": "0::/user/job\n", "sys/fs/cgroup/user/job/memory.max": "max\n"}
            | {f"sys/fs/cgroup/user/{name}": text for name, text in GROUP.items()},
            1_000_000,
        ),
    ],
)
def test_available_memory_is_the_tightest_limit(files, wanted, tmp_path):
    write(tmp_path, {"proc/meminfo": MEMINFO} | files)
    assert available_bytes(torch.device("cpu"), tmp_path) == wanted


def test_this_machine_answers():
    device = torch.device("cpu")
    assert available_bytes(device) > 2**20
    before = peak_bytes(device)
    held = torch.ones(before // 4 + 2**26)
    assert peak_bytes(device) >= before
    assert peak_bytes(device) >= held.nbytes


@pytest.mark.parametrize("kept", ["memory", "disk", "none"])
def test_estimated_updates_are_as_the_run_makes_them(kept, directories, tmp_path, monkeypatch, progress):
    """Where the target's states are kept it reads nothing in them, once it has read all trajectories."""
    trajectories = make_runner(directories, "eagle3", 8, 32).trajectories
    pair = load_pair(str(directories.target), str(directories.drafter["eagle3"]))
    config = make_config(tmp_path / "state", "cst:tv", 4, 8, target_cache=kept, max_steps=9)
    read: list[int] = []
    own = Target.encode_parts

    def encode_parts(self, parts):
        read.append(sum(len(part.trajectories) for part in parts))
        return own(self, parts)

    monkeypatch.setattr(Target, "encode_parts", encode_parts)
    estimate_run(pair, trajectories, config, tmp_path / "state", cache=tmp_path / "cache", progress=progress)
    assert (sum(read) == 8) == (kept != "none"), "four updates read four trajectories each"


def test_estimate_trains_nothing(directories, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": text}) for text in ("windows", "of draft", "tokens ")))
    arguments = [
        "train",
        "--target",
        str(directories.target),
        "--drafter",
        str(directories.drafter["eagle3"]),
    ]
    arguments += ["--prompts", str(prompts), "--output", str(tmp_path / "adapter"), "--max-new-tokens", "24"]
    arguments += [
        "--cache",
        str(tmp_path / "cache"),
        "--trajectories-per-step",
        "2",
        "--windows-per-step",
        "8",
    ]
    assert run([*arguments, "--max-steps", "50", "--estimate", "--json"]) == 0
    estimated = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert estimated["windows_per_forward"] == 8
    assert estimated["updates"] == 50
    assert estimated["seconds"] == pytest.approx(50 * estimated["seconds_per_update"])
    assert 0 < estimated["update_bytes"] < estimated["available_bytes"]
    assert not (tmp_path / "adapter").exists()
