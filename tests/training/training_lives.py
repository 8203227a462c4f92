"""Whole runs in processes of their own, forked from the test's: groups of several, and ones that can be killed.

Forked, so that a process trains at once instead of importing torch first. Left out: what is compared.
"""

from __future__ import annotations

import importlib
import itertools
import json
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from training_pair import Directories, K

from ppow_train.config import PPOWConfig
from ppow_train.pair import load_pair
from ppow_train.progress import make_progress
from ppow_train.training import train_adapter
from ppow_train.types import Trajectories

_FORK = multiprocessing.get_context("fork")


def train_into(
    directory: Path,
    directories: Directories,
    trajectories: Trajectories,
    *,
    resume: bool = False,
    kind: str = "eagle3",
    cache: Path | None = None,
    held_out: Trajectories | None = None,
    **options: Any,
) -> None:
    """Train `directory`/adapter and write the run's log beside it; training state is in `directory`/state."""
    defaults = {
        "num_speculative_tokens": K,
        "trajectories_per_step": 4,
        "windows_per_step": 16,
        "num_generations": 4,
        "max_steps": 6,
        "lora_rank": 4,
        "logging_steps": 2,
        "save_steps": 3,
        "use_cpu": True,
        "output_dir": str(directory / "state"),
    }
    config = PPOWConfig(**{**defaults, **options})
    pair = load_pair(
        str(directories.target), str(directories.drafter[kind]), target_dtype=config.target_dtype
    )
    progress = make_progress(Console(quiet=True))
    result = train_adapter(
        pair,
        trajectories,
        config,
        directory / "adapter",
        held_out=held_out,
        resume=resume,
        cache=cache,
        progress=progress,
    )
    if config.process_index == 0:
        (directory / "log.json").write_text(json.dumps(result.log))


def start(work: Callable[..., None], *args: Any, **options: Any) -> multiprocessing.process.BaseProcess:
    """Run it in a forked process."""
    process = _FORK.Process(target=work, args=args, kwargs=options)
    process.start()
    return process


def train_in_group(count: int, *args: Any, **options: Any) -> list[int | None]:
    """Run `train_into` in `count` processes of one group, as torchrun would; gives their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def member(rank: int) -> None:
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in variables.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", LOCAL_WORLD_SIZE=str(count))
        train_into(*args, **options)

    members = [start(member, rank) for rank in range(count)]
    for process in members:
        process.join()
    return [process.exitcode for process in members]


def log(directory: Path) -> list[dict[str, float]]:
    """Every line of a run's log, without what it took in time."""
    lines = json.loads((directory / "log.json").read_text())
    return [{name: line[name] for name in line if name != "step_time"} for line in lines if "loss" in line]


def curve(directory: Path) -> list[list[float]]:
    """[update, loss, norm of the gradient] of every line of a run's log."""
    return [[line[name] for name in ("step", "loss", "grad_norm")] for line in log(directory)]


def train_and_die(fatal: tuple[str, int], *args: Any, **options: Any) -> None:
    """Run `train_into` and kill -9 this process before call n (from 0) of a place, given as ("module:name", n)."""
    place, count = fatal
    module_name, _, name = place.partition(":")
    owner = importlib.import_module(module_name)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    own, calls = getattr(owner, last), itertools.count()

    def counted(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return own(*args, **kwargs)

    setattr(owner, last, counted)
    train_into(*args, **options)
