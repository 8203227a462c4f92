"""Windows under load on a machine whose pace wanders: all servers loaded at once, running for a second or two in turn.

serve_sweep.py loads one server after the other; where the machine is a tenth faster or slower a minute later, that is
what it compares. Here every arm is a `vllm serve` with a `vllm bench serve` of its own that keeps its requests coming
throughout, and all but one are stopped (SIGSTOP, server and client): a turn is a few seconds in which one arm runs, a
rotation is one turn of each in a new random order. What an arm made is read from its own counter of output tokens in
each turn, over the seconds that it ran since the reading before, so that a turn may end within a step. Results are
appended level by level, and the same command goes on where it was stopped. Left out: comparing and drawing
(turns_table.py), the arms (serve_sweep.py).

    taskset -c 1 python examples/benchmarks/serve_turns.py --output runs/turns
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import click
import serve_sweep
import sweep_table
import turns_table
from bench_adapters import train_adapter
from bench_server import Server, ServerOptions, named

from ppow_train.progress import make_progress

_TOKENS = "vllm:generation_tokens_total"
RUNNING, _WAITING = "vllm:num_requests_running", "vllm:num_requests_waiting"
LOADED_S, _DRAINED_S = 300, 120


class Metered(Protocol):
    """What is needed of bench_server.Server."""

    def metrics(self) -> dict[str, float]:
        """Samples of /metrics."""

    def cpu_seconds(self) -> float:
        """What its processes have computed."""

    def signal(self, number: int) -> None:
        """Signal every process of it."""


class Client:
    """`vllm bench serve` in a process of its own, forked so that vLLM is imported once for all of them."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        self._process = multiprocessing.get_context("fork").Process(target=_bench, args=(arguments, log))
        self._process.start()
        self._log = log

    def check_alive(self) -> None:
        """Raise a ClickException if it has ended: an arm without requests would be compared with loaded ones."""
        if not self._process.is_alive():
            raise click.ClickException(
                f"The load ended before the turns did: more --requests are needed, or see {self._log}."
            )

    def signal(self, number: int) -> None:
        """Signal it."""
        if self._process.is_alive():
            os.kill(self._process.pid or 0, number)

    def stop(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.join()


def _bench(arguments: Sequence[str], log: Path) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with log.open("a") as stream, contextlib.redirect_stderr(stream):  # the progress bar's place
        serve_sweep.bench(arguments, log)


class Runner:
    """One arm: runs in its turns, and knows how long it has run.

    Args:
        clock: seconds, counting while the arm is stopped as well.
    """

    def __init__(
        self, server: Metered, client: Client, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.server, self.client, self._clock = server, client, clock
        self._ran = 0.0
        self._resumed_at = clock()  # it runs when it is made
        self._read: tuple[float, float, float] | None = None

    def resume(self) -> None:
        """Begin a turn."""
        self.server.signal(signal.SIGCONT)
        self.client.signal(signal.SIGCONT)
        self._resumed_at = self._clock()

    def pause(self) -> None:
        """End a turn."""
        self.client.signal(signal.SIGSTOP)
        self.server.signal(signal.SIGSTOP)
        self._ran += self._clock() - self._resumed_at

    def read(self) -> dict[str, float] | None:
        """Within a turn: what was made since the reading before, in seconds that it ran; None at first."""
        begin = self._clock()
        tokens, busy = self.server.metrics()[_TOKENS], self.server.cpu_seconds()
        now = (self._ran + (begin + self._clock()) / 2 - self._resumed_at, tokens, busy)
        before, self._read = self._read, now
        if before is None:
            return None
        seconds, made, cpu = (new - old for new, old in zip(now, before, strict=True))
        return {"seconds": round(seconds, 6), "tokens": int(made), "server_cpu_s": round(cpu, 3)}


def rotations(arms: Sequence[str], number: int, seed: str) -> list[list[str]]:
    """The order of the turns in each rotation; the same ones whenever it is asked for."""
    draw = random.Random(seed)
    return [draw.sample(arms, len(arms)) for _ in range(number)]


def take_turns(
    runners: Mapping[str, Runner],
    orders: Sequence[Sequence[str]],
    turn_seconds: float,
    on_rotation: Callable[[], None],
    sleep: Callable[[float], None] = time.sleep,
) -> list[dict[str, Any]]:
    """All runners, paused, in turn; one line each but for the first reading of an arm."""
    lines = []
    for number, order in enumerate(orders):
        for position, arm in enumerate(order):
            runner = runners[arm]
            runner.resume()
            sleep(turn_seconds)
            measured = runner.read()
            runner.pause()
            runner.client.check_alive()
            if measured is not None:
                lines.append({"rotation": number, "position": position, "arm": arm, **measured})
        on_rotation()
    return lines


def wait_for(
    server: Server, is_reached: Callable[[dict[str, float]], bool], seconds: float, what: str
) -> None:
    """Block until a server's metrics are so.

    Raises:
        click.ClickException: they were not in time, or the server ended.
    """
    deadline = time.monotonic() + seconds
    while not is_reached(server.metrics()):
        server.check_alive()
        if time.monotonic() > deadline:
            raise click.ClickException(f"The server of {server.name} {what} for {seconds:.0f} s.")
        time.sleep(0.2)


def wait_until_idle(server: Server) -> None:
    """Block until a server has no request any more."""
    wait_for(server, lambda m: not m[RUNNING] + m[_WAITING], _DRAINED_S, "kept its requests")


@contextlib.contextmanager
def loaded(
    servers: Mapping[str, Server], settings: dict[str, Any], concurrency: int, output: Path
) -> Iterator[dict[str, Runner]]:
    """Every server with its load, all of them paused; afterwards running and without requests."""
    load = {
        "concurrency": concurrency,
        "num_prompts": settings["requests"],
        **{key: settings[key] for key in ("temperature", "output_len", "seed")},
    }
    runners: dict[str, Runner] = {}
    try:
        for arm, server in servers.items():
            arguments = serve_sweep.bench_arguments(
                server.url, settings["target"], Path(settings["prompts"]), load
            )
            client = Client(arguments, output / "logs" / f"bench-{arm}.log")
            runners[arm] = Runner(server, client)
            wait_for(server, lambda m: m[RUNNING] >= concurrency, LOADED_S, "had too few requests")
            runners[arm].pause()
        yield runners
    finally:
        for arm, runner in runners.items():
            runner.client.stop()
            servers[arm].signal(signal.SIGCONT)
    for server in servers.values():
        wait_until_idle(server)


def measure_level(
    servers: Mapping[str, Server],
    settings: dict[str, Any],
    concurrency: int,
    output: Path,
    on_rotation: Callable[[], None],
) -> dict[str, Any]:
    """All rotations at one concurrency: the line of results."""
    before = {arm: server.metrics() for arm, server in servers.items()}
    orders = rotations(list(servers), settings["rotations"], f"{settings['seed']} {concurrency}")
    with loaded(servers, settings, concurrency, output) as runners:
        turns = take_turns(runners, orders, settings["turn_seconds"], on_rotation)
    drafts = {
        arm: serve_sweep.drafts_between(before[arm], server.metrics()) for arm, server in servers.items()
    }
    return {"concurrency": concurrency, "drafts_by_length": drafts, "turns": turns}


def run_levels(
    arms: dict[str, dict[str, Any] | None],
    settings: dict[str, Any],
    done: set[int],
    output: Path,
    on_rotation: Callable[[], None],
) -> None:
    """Every concurrency that is not on disk yet."""
    left = [level for level in settings["levels"] if level not in done]
    if not left:
        return
    import vllm.benchmarks.serve  # noqa: F401  # before clients are forked

    options = ServerOptions(
        settings["target"], settings["dtype"], settings["max_model_len"], settings["max_num_seqs"]
    )
    with serve_sweep.running(list(arms), arms, options, output) as servers:
        for level in left:
            line = measure_level(servers, settings, level, output, on_rotation)
            sweep_table.append_block(output / "results.jsonl", [line])


def report(
    levels: Sequence[turns_table.Level],
    facts: dict[str, Any],
    output: Path,
    note: str = "",
    remarks: Sequence[str] = (),
) -> bool:
    """Write table.md and the plots, print the verdicts; whether every aim was met."""
    judged = turns_table.aims(levels)
    verdicts = "\n".join(
        [*(f"- {verdict}: {text}" for verdict, text in judged), *(f"- {r}" for r in remarks)]
    )
    head = f"{facts['machine']}; {facts['versions']}; temperature {facts['temperature']:g}"
    head += f". {note}" if note else ""
    (output / "table.md").write_text(f"{head}\n\n{turns_table.make_table(levels)}\n\n{verdicts}\n")
    for suffix in ("png", "svg"):
        turns_table.write_plot(output / f"turns.{suffix}", levels, facts["temperature"])
    click.echo((output / "table.md").read_text())
    return all(verdict == turns_table.MET for verdict, _ in judged)


def turn_options(command: Callable[..., None]) -> Callable[..., None]:
    """Beyond `common_options`, what both benchmarks in turns can be told (this one and serve_within.py)."""
    options = (
        click.option("--temperature", default=0.0, show_default=True),
        click.option(
            "--rotations", default=40, show_default=True, help="turns of every arm at each concurrency"
        ),
        click.option("--turn-seconds", default=1.5, show_default=True, help="seconds of a turn"),
        click.option(
            "--warm-rotations",
            default=8,
            show_default=True,
            help="rotations that are not judged: first prefills, and the adaptive window has just met the concurrency",
        ),
        click.option(
            "--requests",
            default=4000,
            show_default=True,
            help="requests that a client has ready: must outlast the turns",
        ),
        click.option(
            "--max-num-seqs", default=32, show_default=True, help="requests that a server runs at most"
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def check_options(given: Mapping[str, Any]) -> None:
    """Raise a UsageError for options that cannot be measured or judged."""
    if given["rotations"] < given["warm_rotations"] + turns_table.LEAST_ROTATIONS:
        raise click.UsageError(
            f"--rotations must be at least --warm-rotations and {turns_table.LEAST_ROTATIONS} more."
        )
    if max(given["levels"]) > given["max_num_seqs"]:
        raise click.UsageError(f"--levels above --max-num-seqs {given['max_num_seqs']} would only queue.")


def facts_of(
    given: Mapping[str, Any], adapter: Path | None, training_steps: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what results must have in common to be compared, settings)."""
    settings = {**given, "adapter": str(adapter or f"trained, {training_steps} steps")}
    facts: dict[str, Any] = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
    facts |= serve_sweep.machine_facts()
    facts |= {key: named(facts[key]) for key in ("target", "prompts", "adapter")}
    facts.pop("levels")  # more may follow
    return facts, settings


@click.command()
@serve_sweep.common_options
@turn_options
def main(
    output: Path, adapter: Path | None, training_steps: int, check: bool, report_only: bool, **given: Any
) -> None:
    """Load real servers in turns of a few seconds and compare windows."""
    check_options(given)
    facts, settings = facts_of(given, adapter, training_steps)
    lines = sweep_table.read_lines(output / "results.jsonl", facts)
    if not report_only:
        adapter = adapter or train_adapter(output / "adapter", training_steps)
        arms = serve_sweep.make_arms(settings["windows"], adapter, settings["per_request"])
        with make_progress() as progress:
            total, done = len(settings["levels"]) * settings["rotations"], {x["concurrency"] for x in lines}
            done_turns = len(done & set(settings["levels"])) * settings["rotations"]
            task = progress.add_task("rotations", total=total, note="", completed=done_turns)
            run_levels(arms, settings, done, output, lambda: progress.advance(task))
        lines = sweep_table.read_lines(output / "results.jsonl", facts)
    if not lines:
        raise click.ClickException(f"{output} holds no complete level yet.")
    in_order = sorted(lines, key=lambda line: line["concurrency"])
    levels = [turns_table.judge(line, facts["warm_rotations"]) for line in in_order]
    met = report(levels, facts, output)
    if check and not met:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
