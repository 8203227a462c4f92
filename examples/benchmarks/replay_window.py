"""The adaptive window replayed on real texts at measured step times: what its choices are worth beyond luck.

In serve_within.py a load is measured once, within some percent. Here its step times, how they wander, and how many
tokens of a draft are accepted at every place of real texts are put together again (replay_engine.py) many times over,
with the window that is served. Texts come from the tiny pair with an adapter, times from what serve_within.py wrote.
Runs of a seed are alike on any machine. Left out: what is not in step times and acceptance, such as the window's own
code.

    python examples/benchmarks/replay_window.py --adapter ppow-demo/adapter --turns runs/within/results.jsonl \\
        --profile runs/costlier-32/adapter --output runs/replay
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from bench_adapters import TINY
from replay_engine import Engine, Machine, Made
from serve_sweep import machine_facts
from sweep_table import length_of
from within_table import seconds_per_prompt_token

from ppow_train.generation import Round, load_tokenizer
from ppow_train.pair import load_pair
from ppow_train.parity import merged_pair
from ppow_train.progress import make_progress
from ppow_train.prompts import read_prompts
from ppow_train.report import write_json
from ppow_train.rollout import WindowRunner
from ppow_train.training import get_trajectories
from ppow_train.walk import accepted_at_every_start
from vllm_ppow.acceptance import AcceptanceEstimate
from vllm_ppow.artifact import read_adapter
from vllm_ppow.cost_profile import CostProfile, read_cost_profile
from vllm_ppow.isotonic import isotonic
from vllm_ppow.step_cost import StepCost
from vllm_ppow.window import DraftWindow

MAX_TOKENS = 64  # of every continuation, as in serve_within.py
FIXED_STEPS = 40_000  # request-steps that tell what a fixed length makes


def accepted_lengths(adapter_directory: Path, prompts: str, num_prompts: int) -> list[list[int]]:
    """Of prompts of the tiny pair's file, the tokens of a draft that are accepted at each start; temperature 0."""
    adapter = read_adapter(adapter_directory)
    drafter = TINY / adapter.config.drafter_type
    pair = merged_pair(load_pair(str(TINY / "target"), str(drafter)), adapter, drafter)
    file = TINY / "prompts" / f"{prompts}.jsonl"
    with make_progress() as progress, tempfile.TemporaryDirectory() as cache:
        trajectories = get_trajectories(
            pair,
            file,
            texts=read_prompts(file, load_tokenizer(TINY / "target"))[:num_prompts],
            cache=Path(cache),
            max_new_tokens=MAX_TOKENS + adapter.config.num_speculative_tokens,
            rounds=[Round(0.0, 0)],
            progress=progress,
        )
        runner = WindowRunner(
            pair.target, pair.drafter, trajectories, adapter.config.num_speculative_tokens, 1.0
        )
        task = progress.add_task("drafts at every start", total=len(trajectories), note="")
        accepted = []
        for row in range(len(trajectories)):
            accepted.append(accepted_at_every_start(runner, row, greedy_drafts=True))
            progress.update(task, advance=1)
        return accepted


def machine_of(line: dict[str, Any], warm_rotations: int, longest: int) -> Machine:
    """The step times of one load, and how they wandered, from the turns of fixed lengths and none.

    Args:
        line: of serve_within.py's results.
        longest: draft length up to which times are interpolated; beyond measured ones they go on as they rise last.
    """
    by_length: dict[int, list[dict[str, Any]]] = {}
    for turn in line["turns"]:
        if turn["rotation"] >= warm_rotations and (length := length_of(turn["arm"])) is not None:
            by_length.setdefault(length, []).append(turn)
    turns = [turn for of_length in by_length.values() for turn in of_length]
    prompt_token = seconds_per_prompt_token(turns)
    known = sorted(by_length)
    each = {length: _seconds_per_step(by_length[length], prompt_token) for length in known}
    made, read = (sum(turn[what] for turn in turns) for what in ("tokens", "prefilled"))
    prompt_tokens = round(MAX_TOKENS * read / made)
    logs = [
        (turn["began_at"], math.log(_seconds_per_step([turn], prompt_token) / each[length]))
        for length in known
        for turn in by_length[length]
    ]
    spread, seconds = _pace(sorted(logs))
    return Machine(
        batch=line["concurrency"],
        step_seconds=_filled(
            known, isotonic([each[length] for length in known], [1.0] * len(known)), longest
        ),
        prompt_tokens=prompt_tokens,
        prompt_seconds=prompt_token * prompt_tokens,
        pace_spread=spread,
        pace_seconds=seconds,
    )


def _seconds_per_step(turns: Sequence[dict[str, Any]], prompt_token: float) -> float:
    """Of steps that only decode: what was spent on prompts is taken out."""
    seconds = sum(turn["seconds"] - prompt_token * turn["prefilled"] for turn in turns)
    return seconds / sum(sum(turn["drafted"].values()) for turn in turns)


def _filled(lengths: Sequence[int], times: Sequence[float], longest: int) -> tuple[float, ...]:
    rise = (times[-1] - times[-2]) / (lengths[-1] - lengths[-2])
    between = np.interp(range(lengths[-1] + 1), lengths, times)
    beyond = [times[-1] + rise * (n - lengths[-1]) for n in range(lengths[-1] + 1, longest + 1)]
    return tuple(float(seconds) for seconds in [*between, *beyond][: longest + 1])


def _pace(logs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Of the logarithm of the pace: standard deviation, and seconds after which it has forgotten 63 % (moments, ours).

    What one turn keeps of the one before is taken to be within 0.05 and 0.95: a few turns may say less than none.

    Args:
        logs: (when a turn began, log of what its steps took over what they usually take), ascending.
    """
    when, paces = np.array(logs).T
    paces -= paces.mean()
    kept = float(np.clip((paces[1:] * paces[:-1]).mean() / paces.var(), 0.05, 0.95))
    return float(paces.std()), float(np.median(np.diff(when)) / -math.log(kept))


def fixed_speeds(machine: Machine, texts: Sequence[Sequence[int]]) -> list[float]:
    """Tokens per second at every draft length."""
    steps = FIXED_STEPS // machine.batch
    made = [Engine(machine, texts, 0).fixed(length, steps) for length in range(len(machine.step_seconds))]
    return [one.tokens / one.seconds for one in made]


def worth(made: Made, machine: Machine, speeds: Sequence[float]) -> float:
    """Tokens per second of the lengths that were drafted, each as it is when kept, over the best one's."""
    seconds = [times * each for times, each in zip(made.drafted, machine.step_seconds, strict=True)]
    mean = sum(spent * speed for spent, speed in zip(seconds, speeds, strict=True)) / sum(seconds)
    return mean / max(speeds)


@dataclasses.dataclass(frozen=True)
class Replayed:
    """One window at one load, over seeds.

    Attributes:
        worths: of its choices, by seed.
        speeds: tokens per second that it made itself over the best fixed length's, by seed.
        drafted: share of steps by draft length, all seeds together.
    """

    worths: tuple[float, ...]
    speeds: tuple[float, ...]
    drafted: tuple[float, ...]


def replay(
    machine: Machine,
    texts: Sequence[Sequence[int]],
    make_window: Callable[[], DraftWindow],
    speeds: Sequence[float],
    *,
    seeds: int,
    warm_seconds: float,
    seconds: float,
) -> Replayed:
    """Serve for so long with as many windows as there are seeds."""
    best = speeds.index(max(speeds))
    warm, steps = (max(1, round(time / machine.step_seconds[best])) for time in (warm_seconds, seconds))
    runs = []
    for seed in range(seeds):
        engine, window = Engine(machine, texts, seed), make_window()
        engine.adaptive(window, warm)
        runs.append(engine.adaptive(window, steps))
    times = [sum(column) for column in zip(*(run.drafted for run in runs), strict=True)]
    return Replayed(
        worths=tuple(worth(run, machine, speeds) for run in runs),
        speeds=tuple(run.tokens / run.seconds / max(speeds) for run in runs),
        drafted=tuple(time / sum(times) for time in times),
    )


class KnownCost(StepCost):
    """Step times that need not be learned: what is lost all the same, acceptance and probes cost."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self._machine = machine

    def table(self, batch: int, lengths: Sequence[int], context: int | None = None) -> list[float]:
        """As they are."""
        return [self._machine.step_seconds[length] for length in lengths]

    def is_timed(self, batch: int, num_draft_tokens: int) -> bool:
        """Always."""
        return True

    def wanted(self, batch: int, lengths: Sequence[int]) -> list[int]:
        """None."""
        return []


def make_windows(longest: int, profile: CostProfile | None) -> dict[str, Callable[[Machine], DraftWindow]]:
    """The windows to compare, by name: as served, with a cost profile and without, and one that knows step times."""

    def window(cost: StepCost, prior: Sequence[float] = ()) -> DraftWindow:
        return DraftWindow(range(longest + 1), AcceptanceEstimate(longest, prior), cost)

    windows: dict[str, Callable[[Machine], DraftWindow]] = {}
    if profile is not None:
        windows["cost profile"] = lambda machine: window(StepCost(profile), profile.acceptance_per_position)
    windows["clock"] = lambda machine: window(StepCost())
    windows["step times known"] = lambda machine: window(KnownCost(machine))
    return windows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| concurrency | window | best fixed | its choices ÷ best: mean, least | tokens per second ÷ best | drafted |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        worths, speeds = row["worths"], row["speeds"]
        error = statistics.stdev(speeds) / len(speeds) ** 0.5
        shares = ", ".join(f"{k}: {share:.0%}" for k, share in enumerate(row["drafted"]) if share >= 0.02)
        lines.append(
            f"| {row['concurrency']} | {row['window']} | K={row['best']} | {statistics.mean(worths):.3f}, "
            f"{min(worths):.3f} | {statistics.mean(speeds):.3f} ± {error:.3f} | {shares} |"
        )
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Texts:
    """What is replayed.

    Attributes:
        num_speculative_tokens: of the drafts.
        accepted: of every text, by start.
    """

    num_speculative_tokens: int
    accepted: list[list[int]]

    def write(self, path: Path) -> None:
        """As `load_texts` takes it, a line for each text."""
        rows = ",\n".join(json.dumps(row, separators=(",", ":")) for row in self.accepted)
        head = f'"num_speculative_tokens": {self.num_speculative_tokens}'
        path.write_text(f'{{{head}, "accepted": [\n{rows}\n]}}\n')


def load_texts(adapter: Path | None, accepted: Path | None, prompts: str, num_prompts: int) -> Texts:
    """Accepted lengths: read where they were written before, else made."""
    if accepted is not None:
        return Texts(**json.loads(accepted.read_text()))
    if adapter is None:
        raise click.UsageError("Give --adapter, or --accepted with what an earlier run wrote.")
    longest = read_adapter(adapter).config.num_speculative_tokens
    return Texts(longest, accepted_lengths(adapter, prompts, num_prompts))


@click.command()
@click.option(
    "--turns", required=True, type=click.Path(path_type=Path), help="results.jsonl of serve_within.py"
)
@click.option("--output", required=True, type=click.Path(path_type=Path), help="directory for what is found")
@click.option(
    "--adapter", type=click.Path(path_type=Path), help="adapter directory whose drafts are replayed"
)
@click.option(
    "--accepted", type=click.Path(path_type=Path), help="accepted.json of an earlier run, for --adapter"
)
@click.option(
    "--profile", type=click.Path(path_type=Path), help="directory with the window's cost_profile.json"
)
@click.option("--prompts", default="tests_report", show_default=True, help="file of the tiny pair's prompts")
@click.option("--num-prompts", default=224, show_default=True, help="of that file")
@click.option("--seeds", default=24, show_default=True, type=click.IntRange(2), help="runs of every window")
@click.option("--warm-seconds", default=12.0, show_default=True, help="before what counts")
@click.option("--seconds", default=40.0, show_default=True, help="that count")
def main(
    turns: Path, output: Path, adapter: Path | None, accepted: Path | None, profile: Path | None, prompts: str,
    num_prompts: int, seeds: int, warm_seconds: float, seconds: float,
) -> None:  # fmt: skip
    """Replay the adaptive window at the loads of a serve_within.py run."""
    facts, *lines = map(json.loads, turns.read_text().splitlines())
    texts = load_texts(adapter, accepted, prompts, num_prompts)
    output.mkdir(parents=True, exist_ok=True)
    if accepted is None:
        texts.write(output / "accepted.json")
    longest = texts.num_speculative_tokens
    windows = make_windows(longest, None if profile is None else read_cost_profile(profile))
    rows: list[dict[str, Any]] = []
    for line in sorted(lines, key=lambda line: line["concurrency"]):
        machine = machine_of(line, facts["facts"]["warm_rotations"], longest)
        speeds = fixed_speeds(machine, texts.accepted)
        for name, make in windows.items():
            found = replay(
                machine,
                texts.accepted,
                functools.partial(make, machine),
                speeds,
                seeds=seeds,
                warm_seconds=warm_seconds,
                seconds=seconds,
            )
            rows.append(
                {
                    "concurrency": machine.batch,
                    "window": name,
                    "best": speeds.index(max(speeds)),
                    "machine": dataclasses.asdict(machine),
                    "fixed": [speed / max(speeds) for speed in speeds],
                    **dataclasses.asdict(found),
                }
            )
    settings = {"seeds": seeds, "warm_seconds": warm_seconds, "seconds": seconds, **machine_facts()}
    write_json(output / "replay.json", {**settings, "windows": rows})
    (output / "table.md").write_text(table(rows) + "\n")
    click.echo(table(rows))


if __name__ == "__main__":
    main()
