"""The results of a study on disk, one JSON line per run with what made it, and who is at which run.

Several processes may work at one study: a run is claimed by a lock on a file, which is gone with the process. Left out:
what a run does (run.py), what the results show (table.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ppow_train.versions import made_with


@dataclasses.dataclass(frozen=True)
class RunKey:
    """One training run, or the untrained drafter.

    Attributes:
        phase: `tune` (prompts set apart) or `report` (held-out prompts).
        cell, arm: names; arm None is the supervised start, whose other fields are 0.
        seed, steps: of the run.
        learning_rate: peak.
    """

    phase: str
    cell: str
    arm: str | None
    seed: int
    steps: int
    learning_rate: float


@dataclasses.dataclass(frozen=True)
class Measured:
    """What serving is expected to count for each of B prompts (walk.py), and how long training took.

    Attributes:
        drafts, accepted: [B], expected drafts and accepted tokens.
        seconds: of training; on a shared machine no measure of cost.
    """

    drafts: list[float]
    accepted: list[float]
    seconds: float


class Results:
    """results.jsonl of a directory: appended to by whoever finishes a run, read again before every decision."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.file = directory, directory / "results.jsonl"

    def read(self) -> dict[RunKey, Measured]:
        """All finished runs; a line that was cut short by a kill is left out."""
        return {RunKey(**line["run"]): Measured(**line["measured"]) for line in self._lines()}

    def made_with(self) -> Counter[str | None]:
        """Runs by the versions that made them; None: from before these were recorded."""
        return Counter(line.get("made_with") for line in self._lines())

    def _lines(self) -> list[dict[str, Any]]:
        text = self.file.read_text(encoding="utf-8") if self.file.exists() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines() if line.strip()]

    def add(self, key: RunKey, measured: Measured) -> None:
        """Append a finished run, rounded to what can matter."""
        rounded = {
            "drafts": [round(value, 4) for value in measured.drafts],
            "accepted": [round(value, 4) for value in measured.accepted],
            "seconds": round(measured.seconds, 1),
        }
        line = json.dumps({"run": dataclasses.asdict(key), "measured": rounded, "made_with": made_with()})
        with self.file.open("a+b") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            stream.seek(0)
            stream.truncate(stream.read().rfind(b"\n") + 1)  # what a kill has cut short
            stream.write(line.encode() + b"\n")

    @contextlib.contextmanager
    def claim(self, key: RunKey) -> Iterator[bool]:
        """Whether this process is the one to do a run; the claim ends with the block, or with the process."""
        claims = self.directory / "claims"
        claims.mkdir(exist_ok=True)
        name = hashlib.sha256(json.dumps(dataclasses.asdict(key)).encode()).hexdigest()[:16]
        with (claims / name).open("w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True
