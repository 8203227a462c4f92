"""Two processes that start an engine beside each other, each running a quarter of a second while the other is stopped.

A start takes some ten seconds of importing and loading, and machines wander by more than the few per cent that are
looked for; in turns both meet the same pace. Left out: what is started, and what the pairs say (overhead.py).
"""

from __future__ import annotations

import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import click

TURN_S = 0.25  # of a process that starts beside another
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
START_ENGINE = """
import json, sys
from vllm import LLM
print("MARK imported", flush=True)
LLM(**json.loads(sys.argv[1]))
print("MARK engine", flush=True)
"""


@dataclasses.dataclass(frozen=True)
class StartPlan:
    """What a process of one arm starts.

    Attributes:
        arm: its name in results.
        options: of vLLM's `LLM`.
        environment: variables on top of this process's own.
        program: Python source that is given the options as JSON, and prints MARK imported and MARK engine.
    """

    arm: str
    options: dict[str, Any]
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    program: str = START_ENGINE


class Start:
    """A fresh process that starts one engine, running in its turns only; made stopped.

    Attributes:
        ran: seconds that it has run.
        marks: what `ran` was when it had imported vLLM (`imported`), and when it had an engine (`engine`).
        cpu_s: what it and its children computed; known once it has ended.
    """

    def __init__(self, plan: StartPlan) -> None:
        self.arm, self.ran, self.cpu_s = plan.arm, 0.0, 0.0
        self.marks: dict[str, float] = {}
        self._text = b""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed by close()
        resumed_at = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-c", plan.program, json.dumps(plan.options)],
            env={**_ENVIRONMENT, **os.environ, **plan.environment},
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
        )
        self._pause(resumed_at)

    def turn(self, seconds: float) -> bool:
        """Run for so long or until it ends; whether it goes on after that.

        Raises:
            click.ClickException: it ended without an engine.
        """
        assert self._process.stdout is not None
        resumed_at = time.perf_counter()
        os.killpg(self._process.pid, signal.SIGCONT)
        while (left := resumed_at + seconds - time.perf_counter()) > 0:
            if not select.select([self._process.stdout], [], [], left)[0]:
                continue
            if not (found := os.read(self._process.stdout.fileno(), 65536)):
                self._end(resumed_at)
                return False
            self._note(found, self.ran + time.perf_counter() - resumed_at)
        self._pause(resumed_at)
        return True

    def seconds(self) -> dict[str, float]:
        """What was measured, of a start that has ended."""
        return {
            "engine_s": self.marks["engine"] - self.marks["imported"],
            "whole_s": self.ran,
            "whole_cpu_s": self.cpu_s,
        }

    def close(self) -> None:
        """End it, whatever it is doing."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._errors.close()

    def _pause(self, resumed_at: float) -> None:
        os.killpg(self._process.pid, signal.SIGSTOP)
        self.ran += time.perf_counter() - resumed_at

    def _note(self, found: bytes, ran: float) -> None:
        *lines, self._text = (self._text + found).split(b"\n")
        for line in lines:
            if line.startswith(b"MARK "):
                self.marks[line.removeprefix(b"MARK ").decode()] = ran

    def _end(self, resumed_at: float) -> None:
        """Its output is closed: it is ending, or has."""
        _, status, used = os.wait4(self._process.pid, 0)
        self._process.returncode = os.waitstatus_to_exitcode(status)
        self.ran += time.perf_counter() - resumed_at
        self.cpu_s = used.ru_utime + used.ru_stime
        if self._process.returncode or "engine" not in self.marks:
            self._errors.seek(0)
            tail = self._errors.read().decode(errors="replace").strip()[-500:]
            raise click.ClickException(f"The engine of arm {self.arm} did not start: {tail}")


def time_pair(plans: Sequence[StartPlan]) -> dict[str, dict[str, float]]:
    """One start of each arm, in turns of `TURN_S`: both meet the machine at the same pace."""
    started: list[Start] = []
    try:
        started.extend(map(Start, plans))  # one by one: the first is closed though the second fails
        going = list(started)
        while going:
            going = [start for start in going if start.turn(TURN_S)]
        return {start.arm: start.seconds() for start in started}
    finally:
        for start in started:
            start.close()
