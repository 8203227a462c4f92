"""How the window's counts get from the engine core to the API server: a small file, written by one, read by the other.

vLLM's own statistics travel in messages whose fields are fixed (`SchedulerStats`: unknown ones are dropped when a
message is decoded), and nothing of vLLM's is bent to carry ours. The file lies in memory (/dev/shm) or where the user
has vLLM put its sockets (VLLM_RPC_BASE_PATH), belongs to this user alone, and is replaced at most once a second. The
reader makes it, empty, and removes it when it ends: where nobody reads (`LLM` in a script), nothing is written, and
nothing stays behind. Engines on another machine than the API server cannot be read this way: their counts are then
missing, and nothing else is. Left out: what is counted (window.py) and what becomes of it (metrics_logger.py). Neither
side ever raises: statistics must not stop serving.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import stat
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FORMAT = 1
INTERVAL_S = 1.0  # between two files, and between two looks at one
RETRY_S = 60.0  # after a failure: a memory that is full may have room again
_LARGEST = 1 << 20  # bytes; a report takes a few hundred
_MEMORY = "/dev/shm"

logger = logging.getLogger("vllm.ppow.metrics")


def report_path(vllm_config: Any, engine_index: int | None = None) -> Path:
    """Where an engine's report lies; every process of one `vllm serve` gets the same path.

    Args:
        vllm_config: as every process of vLLM holds it; its instance_id tells servers of one machine apart.
        engine_index: number of the engine under data parallelism; None in the engine itself.
    """
    if engine_index is None:
        engine_index = vllm_config.parallel_config.data_parallel_index
    shared = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    if shared and vllm_config.parallel_config._api_process_count > 1:
        # Several API servers: each builds a config of its own, and all share this directory with the engines.
        return Path(shared) / f"ppow-window-{engine_index}.json"
    # Under Ray every engine's id ends in its own number; the API server's does not.
    instance = str(vllm_config.instance_id).removesuffix(f"_dp{engine_index}")
    base = os.environ.get("VLLM_RPC_BASE_PATH") or _in_memory() or tempfile.gettempdir()
    return Path(base) / f"ppow-window-{os.getuid()}-{instance}-{engine_index}.json"


def _in_memory() -> str | None:
    """A directory that no disk is behind: the engine's loop writes there, and a disk may make it wait."""
    return _MEMORY if os.access(_MEMORY, os.W_OK | os.X_OK) else None


class ReportWriter:
    """The engine's side."""

    def __init__(self, vllm_config: Any, clock: Callable[[], float] = time.monotonic) -> None:
        self.path = report_path(vllm_config)
        self._clock = clock
        self._next = -float("inf")
        self._told = False

    def write(self, counts: Any, at_once: bool = False) -> None:
        """Replace the report, if somebody reads and the last one is older than a second; the first failure is logged.

        Args:
            counts: a dataclass of counts since the engine started.
            at_once: whatever the age of the last one.
        """
        now = self._clock()
        if now < self._next and not at_once:
            return
        self._next = now + INTERVAL_S
        try:
            if self.path.exists():
                self._replace(json.dumps({"format": FORMAT, **dataclasses.asdict(counts)}))
        except (OSError, TypeError, ValueError) as error:
            self._next = now + RETRY_S
            if not self._told:
                logger.warning(
                    "The draft window's counts cannot reach /metrics; serving goes on, and it is tried again: %s",
                    error,
                )
            self._told = True

    def close(self) -> None:
        """Remove the report."""
        remove_report(self.path)

    def _replace(self, text: str) -> None:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{self.path.name}.", dir=self.path.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
                stream.write(text)
            Path(temporary).replace(self.path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def begin_report(path: Path) -> None:
    """The reader's side: an empty file says that somebody reads; what an earlier server left there is gone."""
    remove_report(path)
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600))
    except OSError as error:
        logger.warning("The draft window's counts cannot reach /metrics; serving goes on: %s", error)


def remove_report(path: Path) -> None:
    """Remove a report, if it is there and ours; that it stays stops nothing."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def read_report(path: Path) -> dict[str, Any] | None:
    """The newest report; None if there is none that this user wrote in this format."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as stream:
        facts = os.fstat(stream.fileno())
        if facts.st_uid != os.geteuid() or not stat.S_ISREG(facts.st_mode) or facts.st_size > _LARGEST:
            return None
        try:
            report = json.loads(stream.read())
        except ValueError:
            return None
    return report if isinstance(report, dict) and report.get("format") == FORMAT else None
