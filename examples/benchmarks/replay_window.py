"""The adaptive window replayed on real texts at measured step times: what its choices are worth beyond luck.

In serve_within.py a load is measured once, within some percent. Here its step times, how they wander, and how many
tokens of a draft are accepted at every place of real texts are put together again (replay_engine.py) many times over,
with the window that is served. Texts come from the tiny pair with an adapter (replay_texts.py), times from what
serve_within.py wrote, the drafter's share of them from a cost profile: with one, drafts are trimmed by request as well.
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from replay_engine import Engine, Machine, Made
from replay_texts import MAX_TOKENS, Text, load_texts
from serve_sweep import machine_facts
from sweep_table import length_of
from within_table import seconds_per_prompt_token

from ppow_train.report import write_json
from vllm_ppow.acceptance import AcceptanceEstimate, TrimmedAcceptance
from vllm_ppow.cost_profile import CostProfile, read_cost_profile
from vllm_ppow.isotonic import isotonic
from vllm_ppow.request_window import RequestWindow
from vllm_ppow.step_cost import StepCost
from vllm_ppow.window import DraftWindow

FIXED_STEPS = 40_000  # request-steps that tell what a fixed length makes

# What serves: a window, and what trims its drafts by request, if anything.
Policy = tuple[DraftWindow, RequestWindow | None]


def machine_of(
    line: dict[str, Any], warm_rotations: int, longest: int, profile: CostProfile | None = None
) -> Machine:
    """The step times of one load, and how they wandered, from the turns of fixed lengths and none.

    Args:
        line: of serve_within.py's results.
        longest: draft length up to which times are interpolated; beyond measured ones they go on as they rise last.
        profile: tells what of a step is the drafter's; without it nothing is.
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
    lengths = range(longest + 1)
    batch = line["concurrency"]
    drafting = [profile.drafting_seconds(batch, n) if profile else 0.0 for n in lengths]
    return Machine(
        batch=batch,
        step_seconds=_filled(
            known, isotonic([each[length] for length in known], [1.0] * len(known)), longest
        ),
        draft_seconds=tuple(isotonic(drafting, [1.0] * len(drafting))),
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


def fixed_speeds(machine: Machine, texts: Sequence[Text]) -> list[float]:
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
        worths: of its choices, by seed; none where drafts were trimmed.
        speeds: tokens per second that it made itself over the best fixed length's, by seed.
        drafted: share of steps by draft length, all seeds together; by their maximum where drafts were trimmed.
        verified: draft tokens per request and step.
    """

    worths: tuple[float, ...]
    speeds: tuple[float, ...]
    drafted: tuple[float, ...]
    verified: float


def replay(
    machine: Machine,
    texts: Sequence[Text],
    make_policy: Callable[[], Policy],
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
        engine, (window, trimming) = Engine(machine, texts, seed), make_policy()
        engine.adaptive(window, warm, trimming)
        runs.append(engine.adaptive(window, steps, trimming))
    times = [sum(column) for column in zip(*(run.drafted for run in runs), strict=True)]
    return Replayed(
        worths=() if trimming else tuple(worth(run, machine, speeds) for run in runs),
        speeds=tuple(run.tokens / run.seconds / max(speeds) for run in runs),
        drafted=tuple(time / sum(times) for time in times),
        verified=sum(run.verified for run in runs) / (machine.batch * sum(times)),
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


def make_policies(longest: int, profile: CostProfile | None) -> dict[str, Callable[[Machine], Policy]]:
    """What to compare, by name: windows as served, and one that knows step times.

    With a cost profile, without, and with one that also trims drafts by request.
    """

    def whole(cost: StepCost, prior: Sequence[float] = ()) -> Policy:
        return DraftWindow(range(longest + 1), AcceptanceEstimate(longest, prior), cost), None

    def trimmed(profile: CostProfile) -> Policy:
        estimate = AcceptanceEstimate(longest, profile.acceptance_per_position)
        window = DraftWindow([0, longest], estimate, StepCost(), TrimmedAcceptance(), by_request=True)
        return window, RequestWindow(longest, profile=profile)

    policies: dict[str, Callable[[Machine], Policy]] = {}
    if profile is not None:
        policies["cost profile"] = lambda machine: whole(StepCost(profile), profile.acceptance_per_position)
        policies["by request"] = lambda machine: trimmed(profile)
    policies["clock"] = lambda machine: whole(StepCost())
    policies["step times known"] = lambda machine: whole(KnownCost(machine))
    return policies


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| concurrency | window | best fixed | its choices ÷ best: mean, least | tokens per second ÷ best: mean, least "
        "| verified | drafted |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        worths, speeds = row["worths"], row["speeds"]
        error = statistics.stdev(speeds) / len(speeds) ** 0.5
        of_choices = f"{statistics.mean(worths):.3f}, {min(worths):.3f}" if worths else "trimmed"
        shares = ", ".join(f"{k}: {share:.0%}" for k, share in enumerate(row["drafted"]) if share >= 0.02)
        lines.append(
            f"| {row['concurrency']} | {row['window']} | K={row['best']} | {of_choices} "
            f"| {statistics.mean(speeds):.3f} ± {error:.3f}, {min(speeds):.3f} | {row['verified']:.2f} | {shares} |"
        )
    return "\n".join(lines)


@click.command()
@click.option(
    "--turns", required=True, type=click.Path(path_type=Path), help="results.jsonl of serve_within.py"
)
@click.option("--output", required=True, type=click.Path(path_type=Path), help="directory for what is found")
@click.option(
    "--adapter", type=click.Path(path_type=Path), help="adapter directory whose drafts are replayed"
)
@click.option(
    "--texts",
    "texts_file",
    type=click.Path(path_type=Path),
    help="texts.json of an earlier run, for --adapter",
)
@click.option(
    "--profile",
    "profile_directory",
    type=click.Path(path_type=Path),
    help="directory with the windows' cost_profile.json",
)
@click.option("--prompts", default="tests_report", show_default=True, help="file of the tiny pair's prompts")
@click.option("--num-prompts", default=224, show_default=True, help="of that file")
@click.option("--seeds", default=24, show_default=True, type=click.IntRange(2), help="runs of every window")
@click.option("--warm-seconds", default=12.0, show_default=True, help="before what counts")
@click.option("--seconds", default=40.0, show_default=True, help="that count")
def main(
    turns: Path, output: Path, adapter: Path | None, texts_file: Path | None, profile_directory: Path | None,
    prompts: str, num_prompts: int, seeds: int, warm_seconds: float, seconds: float,
) -> None:  # fmt: skip
    """Replay the adaptive window at the loads of a serve_within.py run."""
    facts, *lines = map(json.loads, turns.read_text().splitlines())
    texts = load_texts(adapter, texts_file, prompts, num_prompts)
    profile = None if profile_directory is None else read_cost_profile(profile_directory)
    output.mkdir(parents=True, exist_ok=True)
    if texts_file is None:
        texts.write(output / "texts.json")
    longest = texts.num_speculative_tokens
    rows: list[dict[str, Any]] = []
    for line in sorted(lines, key=lambda line: line["concurrency"]):
        machine = machine_of(line, facts["facts"]["warm_rotations"], longest, profile)
        speeds = fixed_speeds(machine, texts.texts)
        for name, make in make_policies(longest, profile).items():
            found = replay(
                machine,
                texts.texts,
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
