"""Windows under load within one server: what the adaptive window's choices are worth, and nothing else.

serve_turns.py has a server for every arm and stops all but one, which is itself a disturbance. Here one `vllm serve` is
loaded by `vllm bench serve`, and its draft length is given by each arm in turn, a few seconds each
(within_scheduler.py): the adaptive window, fixed lengths, and 0; --per-request adds an adaptive window that trims
drafts request by request. What this cannot tell: what a drafter costs that is not used, and what another process does
to a server. Levels are appended to results.jsonl one by one, and the same command goes on where it was stopped.

    taskset -c 1 python examples/benchmarks/serve_within.py --output runs/within
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import serve_sweep
import serve_turns
import sweep_table
import turns_table
import within_table
from bench_adapters import train_adapter
from bench_server import Server, ServerOptions
from serve_turns import Client, wait_for
from sweep_table import ADAPTIVE, NONE
from within_scheduler import VARIABLE, Assignment
from within_table import TRIMMING, check_whole, read_turns, whole_rotations

from ppow_train.progress import make_progress

_POLL_S = 0.5
_PLUGIN = "ppow_benchmark_turns"


def write_plugin(directory: Path) -> None:
    """What Python and vLLM need to find the plugin in a directory of their search path."""
    found = directory / f"{_PLUGIN}-0.dist-info"
    found.mkdir(parents=True, exist_ok=True)
    (found / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {_PLUGIN}\nVersion: 0\n")
    (found / "entry_points.txt").write_text(
        f"[vllm.general_plugins]\n{_PLUGIN} = within_scheduler:register\n"
    )


def lengths_of(settings: dict[str, Any]) -> dict[str, int | None]:
    """Arm -> its draft length, None for an adaptive window."""
    lengths: dict[str, int | None] = {NONE: 0}
    lengths |= {sweep_table.fixed(k): k for k in sorted(set(settings["windows"]))}
    return lengths | ({TRIMMING: None} if settings["per_request"] else {}) | {ADAPTIVE: None}


def environment(output: Path, settings: dict[str, Any]) -> dict[str, str]:
    """Variables that have a server load the plugin; its turns go to a new file."""
    turns = output / "turns.jsonl"
    turns.unlink(missing_ok=True)
    write_plugin(output / "plugin")
    given = Assignment(
        lengths_of(settings),
        settings["turn_seconds"],
        str(settings["seed"]),
        str(turns.resolve()),
        TRIMMING if settings["per_request"] else None,
    )
    here = Path(__file__).resolve().parent
    path = [str((output / "plugin").resolve()), str(here), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {VARIABLE: json.dumps(dataclasses.asdict(given)), "PYTHONPATH": ":".join(path)}


def measure_level(
    server: Server,
    settings: dict[str, Any],
    concurrency: int,
    output: Path,
    on_rotations: Callable[[int], None],
) -> dict[str, Any]:
    """One line of results: load the server until every arm has had its turns."""
    load = {"concurrency": concurrency, "num_prompts": settings["requests"]}
    load |= {key: settings[key] for key in ("temperature", "output_len", "seed")}
    arguments = serve_sweep.bench_arguments(server.url, settings["target"], Path(settings["prompts"]), load)
    client = Client(arguments, output / "logs" / "bench.log")
    arms = len(lengths_of(settings))
    try:
        wait_for(
            server,
            lambda m: m[serve_turns.RUNNING] >= concurrency,
            serve_turns.LOADED_S,
            "had too few requests",
        )
        since = time.time()
        turns: list[dict[str, Any]] = []
        while len(turns) < settings["rotations"] * arms:
            time.sleep(_POLL_S)
            server.check_alive()
            client.check_alive()
            turns = whole_rotations(read_turns(output / "turns.jsonl"), since, arms)
            on_rotations(len(turns) // arms)
    finally:
        client.stop()
    serve_turns.wait_until_idle(server)
    turns = turns[: settings["rotations"] * arms]
    try:
        check_whole(turns)
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    return {"concurrency": concurrency, "turns": turns}


def run_levels(
    adapter: Path,
    settings: dict[str, Any],
    done: set[int],
    output: Path,
    on_rotations: Callable[[int], None],
) -> None:
    """Every concurrency that is not on disk yet."""
    left = [level for level in settings["levels"] if level not in done]
    if not left:
        return
    import vllm.benchmarks.serve  # noqa: F401  # before clients are forked

    per_request = settings["per_request"]
    ours = serve_sweep.make_arms(settings["windows"], adapter, per_request)[ADAPTIVE]
    options = ServerOptions(
        settings["target"],
        settings["dtype"],
        settings["max_model_len"],
        settings["max_num_seqs"],
        arguments=("--no-async-scheduling",) if per_request else (),
        environment=environment(output, settings),
    )
    with serve_sweep.running([ADAPTIVE], {ADAPTIVE: ours}, options, output) as servers:
        for number, level in enumerate(left):
            before = (len(settings["levels"]) - len(left) + number) * settings["rotations"]

            def counted(rotations: int, before: int = before) -> None:
                on_rotations(before + rotations)

            line = measure_level(servers[ADAPTIVE], settings, level, output, counted)
            sweep_table.append_block(output / "results.jsonl", [line])


def judge(lines: list[dict[str, Any]], facts: dict[str, Any]) -> tuple[list[turns_table.Level], list[str]]:
    """What results say, in figures and in words."""
    warm = facts["warm_rotations"]
    found = [within_table.comparable(line, warm) for line in lines]
    levels = [turns_table.judge(line, warm) for line in found]
    remarks = [within_table.remark(*both) for both in zip(found, levels, strict=True)]
    if len(found) > 1:
        remarks.append(within_table.remark_together(found))
    if all(TRIMMING in line["drafts_by_length"] for line in found):
        remarks += within_table.remarks_by_request(found)
    return levels, remarks


@click.command()
@serve_sweep.common_options
@serve_turns.turn_options
def main(
    output: Path, adapter: Path | None, training_steps: int, check: bool, report_only: bool, **given: Any
) -> None:
    """Load one real server whose draft length is given by every window in turn, and compare windows."""
    serve_turns.check_options(given)
    facts, settings = serve_turns.facts_of(given, adapter, training_steps)
    lines = sweep_table.read_lines(output / "results.jsonl", facts)
    if not report_only:
        adapter = adapter or train_adapter(output / "adapter", training_steps)
        with make_progress() as progress:
            task = progress.add_task(
                "rotations", total=len(settings["levels"]) * settings["rotations"], note=""
            )
            done = {line["concurrency"] for line in lines}
            run_levels(adapter, settings, done, output, lambda n: progress.update(task, completed=n))
        lines = sweep_table.read_lines(output / "results.jsonl", facts)
    if not lines:
        raise click.ClickException(f"{output} holds no complete level yet.")
    in_order = sorted(lines, key=lambda line: line["concurrency"])
    levels, remarks = judge(in_order, facts)
    met = serve_turns.report(levels, facts, output, within_table.NOTE, remarks)
    if check and not met:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
