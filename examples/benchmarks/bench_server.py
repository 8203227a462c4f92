"""A real `vllm serve` for benchmarks: started on a free port, watched until healthy, read through /metrics, stopped.

Left out: loading it (serve_sweep.py, soak.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import psutil

TINY = Path(__file__).resolve().parents[1] / "tiny"
REPOSITORY = TINY.parent.parent
MODEL_NAME = "target"  # under which every arm serves
START_UP_S = 600
_STOP_S = 60


def named(path: str) -> str:
    """How a path is written into results: one inside the repository as seen from there, wherever that lies."""
    found = Path(path)
    return str(found.relative_to(REPOSITORY)) if found.is_relative_to(REPOSITORY) else path


@dataclasses.dataclass(frozen=True)
class ServerOptions:
    """What all servers of a benchmark have in common.

    Attributes:
        target: directory or Hub repo id.
        dtype: as in vLLM.
        max_model_len: tokens of prompt and continuation at most.
        max_num_seqs: requests that run at the same time.
        arguments: further arguments of `vllm serve`.
        environment: variables on top of this process's own.
    """

    target: str
    dtype: str = "auto"
    max_model_len: int = 512
    max_num_seqs: int = 32
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Server:
    """One `vllm serve` in a process group of its own; its log is a file."""

    def __init__(
        self, name: str, options: ServerOptions, speculative_config: dict[str, Any] | None, log: Path
    ) -> None:
        self.name, self.log = name, log
        # A benchmark that is told to end must get to `stop`: its servers are in sessions of their own.
        signal.signal(signal.SIGTERM, _end)
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as stream:
            self._process = subprocess.Popen(
                serve_command(options, speculative_config, port),
                env={**os.environ, **_DEFAULTS, **options.environment},
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_until_healthy(self, seconds: float = START_UP_S) -> None:
        """Block until /health answers.

        Raises:
            click.ClickException: the server ended, or did not answer in time; with the end of its log.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.check_alive()
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5):
                return
            time.sleep(0.5)
        raise click.ClickException(
            f"The server of {self.name} was not healthy after {seconds:.0f} s: {self.tail()}"
        )

    def check_alive(self) -> None:
        """Raise a ClickException with the end of the log if the server has ended."""
        if self._process.poll() is not None:
            raise click.ClickException(
                f"The server of {self.name} ended with {self._process.returncode}: {self.tail()}"
            )

    def processes(self) -> list[psutil.Process]:
        """The API server and every process that it started."""
        parent = psutil.Process(self._process.pid)
        return [parent, *parent.children(recursive=True)]

    def cpu_seconds(self) -> float:
        """What all its processes have computed, on any core: for machines on which other jobs run."""
        times = [process.cpu_times() for process in self.processes()]
        return sum(spent.user + spent.system for spent in times)

    def metrics(self) -> dict[str, float]:
        """Samples of /metrics summed over engines: `name` or `name{label=value}` for the labels beyond those."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            return parse_metrics(answer.read().decode())

    def tail(self, lines: int = 12) -> str:
        """The last lines of the log, errors first if there are any."""
        found = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in found if "Error" in line and " WARNING " not in line]
        return "\n".join((errors or found)[-lines:])

    def signal(self, number: int) -> None:
        """Signal the API server and every process that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def stop(self) -> None:
        """Ask it to end, then make it; nothing of its process group stays."""
        self._process.terminate()  # the API server alone, which shuts its engine down: told at once, both complain
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def _end(_number: int, _frame: Any) -> None:
    raise SystemExit(1)


_DEFAULTS = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
}


def serve_command(
    options: ServerOptions, speculative_config: dict[str, Any] | None, port: int
) -> Sequence[str]:
    """The command line of a server, with prefix caching off: the same prompts come again and again."""
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", options.target]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", MODEL_NAME]
    command += ["--dtype", options.dtype, "--enforce-eager", "--no-enable-prefix-caching"]
    command += ["--max-model-len", str(options.max_model_len), "--max-num-seqs", str(options.max_num_seqs)]
    if speculative_config is not None:
        command += ["--speculative-config", json.dumps(speculative_config)]
    return [*command, *options.arguments]


def parse_metrics(text: str) -> dict[str, float]:
    """Prometheus text to samples, summed over `engine` and `model_name`."""
    from prometheus_client.parser import text_string_to_metric_families

    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("engine", "model_name")}
            inside = ",".join(f"{key}={value}" for key, value in sorted(labels.items()))
            name = f"{sample.name}{{{inside}}}" if inside else sample.name
            found[name] = found.get(name, 0.0) + sample.value
    return found


def free_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
