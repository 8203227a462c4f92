"""Fills a trajectory directory with made-up continuations, and dies when told to: what test_data_store.py kills.

`python interrupted_writer.py DIRECTORY FATAL PAUSE_S`; FATAL = 2n dies before the n-th rename, 2n + 1 after it, -1
never. Left out: torch, so that it starts at once.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

from ppow_train.trajectory_store import fill, open_store

FACTS = {
    "target_fingerprint": "sha256:0",
    "temperature": 1.0,
    "seed": 3,
    "shard_size": 8,
    "held_out_share": 0.25,
}
PROMPTS = [[n, n + 1, 70000][: 1 + n % 3] for n in range(1, 62)]


class Continuer:
    """Continuations that depend on the seed and on the place in the shard, as sampling does."""

    def __init__(self, pause_s: float = 0.0) -> None:
        self.pause_s = pause_s
        self.calls = 0

    def continue_prompts(self, prompt_ids: Any, *, seed: int, report: Any) -> list[list[int]]:
        time.sleep(self.pause_s)
        self.calls += 1
        dice = random.Random(seed)
        report(len(prompt_ids))
        return [[dice.randrange(90000) for _ in range(dice.randrange(6))] for _ in prompt_ids]


def die_around_rename(fatal: int) -> None:
    """From now on a rename of the process may be its last."""
    rename, renames = Path.replace, 0

    def counted(self: Path, target: Path) -> None:
        nonlocal renames
        if fatal == 2 * renames:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(self, target)
        if fatal == 2 * renames + 1:
            os.kill(os.getpid(), signal.SIGKILL)
        renames += 1

    Path.replace = counted  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    die_around_rename(int(sys.argv[2]))
    print("begun", flush=True)
    with open_store(Path(sys.argv[1]), FACTS, len(PROMPTS)) as store:
        fill(store, [(PROMPTS, Continuer(pause_s=float(sys.argv[3])))])
