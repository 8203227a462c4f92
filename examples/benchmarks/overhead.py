"""What the plugin itself costs: per engine step with a fixed window, and at start-up with an adapter to merge.

Both arms serve the same drafter with the same drafts: vLLM's own `eagle3` without this plugin (VLLM_PLUGINS= ), and
`ppow` with an adapter whose deltas are zero, merged all the same. Steps: two engines stay up and take turns over the
same prompts (A B B A …); outputs and drafts must be equal in every round, or the times would be of different work. A
pass has two times, that on the wall and the CPU time of its engine; a third figure looks at what was not disturbed:
every engine step of a pass comes again in every round, the same work for both arms, and of each the fastest tenth of
its rounds counts. Two engines differ by chance, so several pairs of them are started, and each gives one cost (of its
rounds the median). Start-up: pairs of fresh processes, each running a quarter of a second while the other is stopped,
by the seconds that they ran and by CPU time. All figures are medians over pairs of engines or of starts with their
95 % intervals by order statistics, which assume nothing of their distribution. Left out: the adaptive window, which
drafts otherwise (serve_sweep.py).

    OMP_NUM_THREADS=1 python examples/benchmarks/overhead.py --output overhead.json
"""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from bench_adapters import TINY, make_adapter, prompt_ids
from paired_starts import StartPlan, time_pair

from ppow_train.progress import make_progress
from ppow_train.report import write_json
from ppow_train.serving_eval import Engine, EngineOptions, Run, native_spec
from vllm_ppow.artifact import Adapter

BARE, OURS = "eagle3", "ppow"
MAX_STEP_COST, MAX_START_COST = 0.01, 0.05  # the aims, over the bare drafter
UNDISTURBED = 0.1  # share of its rounds that counts of every step
_NO_PLUGIN = {"VLLM_PLUGINS": ""}


def speculative_configs(adapter: Adapter, num_speculative_tokens: int) -> dict[str, dict[str, Any]]:
    """Both arms' speculative configs."""
    bare = native_spec(adapter, Path(adapter.config.base_drafter.name_or_path), num_speculative_tokens)
    ours = {"method": "ppow", "model": str(adapter.directory), "ppow": {"window": "fixed"}}
    return {BARE: bare, OURS: {**ours, "num_speculative_tokens": num_speculative_tokens}}


def environment_of(arm: str) -> dict[str, str]:
    """Variables of an arm's processes: the bare one is without this plugin."""
    return _NO_PLUGIN if arm == BARE else {}


def start_engine(arm: str, options: EngineOptions, spec: dict[str, Any]) -> Engine:
    """An arm's engine, with its environment."""
    before = dict(os.environ)
    os.environ.update(environment_of(arm))
    try:
        return Engine(arm, options, spec)
    finally:
        os.environ.clear()
        os.environ.update(before)


def check_same_work(runs: dict[str, Run]) -> None:
    """Both arms must have written and drafted the same.

    Raises:
        click.ClickException: they did not; their times compare nothing.
    """
    bare, ours = runs[BARE], runs[OURS]
    if len(bare.step_seconds) != len(ours.step_seconds):
        steps = f"{len(bare.step_seconds)} and {len(ours.step_seconds)}"
        raise click.ClickException(
            f"Both arms must do the same work, but made {steps} steps: please report it."
        )
    if bare.tokens != ours.tokens or bare.counts != ours.counts:
        raise click.ClickException(
            f"Both arms must do the same work, but drafts were {bare.counts} and {ours.counts}, outputs "
            f"{'equal' if bare.tokens == ours.tokens else 'different'}: please report it."
        )


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """A 95 % interval of the median (order statistics; the sign test turned round); None with fewer than six values.

    The i-th smallest and i-th largest of n values hold the median between them but for 2 · P(Bin(n, 1/2) < i).
    """
    n, below, rank = len(values), 0.0, 0
    while (below := below + math.comb(n, rank) / 2**n) <= 0.025:
        rank += 1
    return (sorted(values)[rank - 1], sorted(values)[n - rank]) if rank else None


def summarise(costs: Sequence[float], most: float, **details: Any) -> dict[str, Any]:
    """Independent measurements of what ours costs over bare: median, its interval, and whether the aim is met.

    It is shown to be met where the whole interval is below the aim.
    """
    interval = median_interval(costs)
    return {
        "cost": statistics.median(costs),
        "cost_interval": interval,
        "aim": most,
        "met": statistics.median(costs) <= most,
        "shown": interval is not None and interval[1] <= most,
        "costs": list(costs),
        **details,
    }


def cost_of(pair: tuple[float, float]) -> float:
    """Of seconds (bare, ours)."""
    return pair[1] / pair[0] - 1


def undisturbed_cost(bare: np.ndarray, ours: np.ndarray) -> float:
    """What ours costs over bare, by the `UNDISTURBED` quantile of every step's rounds, summed over the steps.

    Args:
        bare, ours: seconds [rounds, steps] of the same steps.
    """
    fast = [np.quantile(seconds, UNDISTURBED, axis=0).sum() for seconds in (bare, ours)]
    return float(fast[1] / fast[0] - 1)


@dataclasses.dataclass
class EnginePair:
    """What two engines that stayed up took, pass by pass.

    Attributes:
        walls, cpus: seconds (bare, ours) of every round.
        steps: seconds [rounds][steps] by arm.
        drafts: in one pass.
    """

    walls: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    cpus: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    steps: dict[str, list[list[float]]] = dataclasses.field(default_factory=lambda: {BARE: [], OURS: []})
    drafts: int = 0

    def add(self, runs: dict[str, Run]) -> None:
        """One round."""
        bare, ours = runs[BARE], runs[OURS]
        self.walls.append((bare.seconds, ours.seconds))
        self.cpus.append((bare.cpu_seconds, ours.cpu_seconds))
        for arm, run in runs.items():
            self.steps[arm].append(run.step_seconds)
        self.drafts = bare.counts.num_drafts if bare.counts else 0


def summarise_steps(pairs: Sequence[EnginePair], most: float) -> dict[str, dict[str, Any]]:
    """Three figures, each one cost per pair of engines: what differs between two starts is in their spread."""
    rounds = sum(len(pair.walls) for pair in pairs)

    def figure(costs: Sequence[float], **details: Any) -> dict[str, Any]:
        return summarise(costs, most, rounds=rounds, **details)

    def median_costs(name: str) -> list[float]:
        return [statistics.median(map(cost_of, getattr(pair, name))) for pair in pairs]

    undisturbed = [undisturbed_cost(np.array(pair.steps[BARE]), np.array(pair.steps[OURS])) for pair in pairs]
    walls, cpus = (
        [[list(one) for one in getattr(pair, name)] for pair in pairs] for name in ("walls", "cpus")
    )
    return {
        "step": figure(median_costs("walls"), pairs=walls, drafts_per_pass=pairs[0].drafts),
        "step_cpu": figure(median_costs("cpus"), pairs=cpus),
        "step_undisturbed": figure(undisturbed),
    }


def time_engine_pair(
    options: EngineOptions,
    specs: dict[str, Any],
    prompts: list[list[int]],
    max_tokens: int,
    rounds: int,
    done: Callable[[str], None],
) -> EnginePair:
    """Passes over the prompts by two fresh engines in turns; the first round only warms up.

    Args:
        done: told of every round.
    """
    pair = EnginePair()
    engines = {arm: start_engine(arm, options, spec) for arm, spec in specs.items()}
    try:
        for engine in engines.values():
            engine.wait_until_ready()
        for index in range(rounds + 1):
            order = (BARE, OURS) if index % 2 else (OURS, BARE)
            runs = {arm: engines[arm].run(prompts, max_tokens=max_tokens, temperature=0.0) for arm in order}
            check_same_work(runs)
            if index:
                pair.add(runs)
            done(f"{runs[OURS].seconds / runs[BARE].seconds - 1:+.1%}")
    finally:
        for engine in engines.values():
            engine.close()
    return pair


def time_steps(
    options: EngineOptions,
    specs: dict[str, Any],
    prompts: list[list[int]],
    max_tokens: int,
    rounds: int,
    engine_pairs: int,
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, dict[str, Any]]:
    """As many pairs of engines, one after the other, each for so many rounds.

    Args:
        keep: given the results so far after every pair of engines: several take an hour.
    """
    pairs: list[EnginePair] = []
    results: dict[str, dict[str, Any]] = {}
    with make_progress() as progress:
        task = progress.add_task("steps", total=(rounds + 1) * engine_pairs, note="")
        for _ in range(engine_pairs):
            pairs.append(
                time_engine_pair(
                    options,
                    specs,
                    prompts,
                    max_tokens,
                    rounds,
                    lambda note: progress.update(task, advance=1, note=note),
                )
            )
            results = summarise_steps(pairs, MAX_STEP_COST)
            keep(results)
    return results


def time_starts(
    options: EngineOptions, specs: dict[str, Any], starts: int, keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Pairs of starts; the first pair fills the page cache and is not counted.

    Args:
        keep: given the results so far after every pair.
    """
    base = {"model": options.target, "dtype": options.dtype, "max_model_len": options.max_model_len}
    base |= {"enforce_eager": True, "seed": 0}
    plans = {
        arm: StartPlan(arm, {**base, "speculative_config": spec}, environment_of(arm))
        for arm, spec in specs.items()
    }
    found: dict[str, list[tuple[float, float]]] = {"engine_s": [], "whole_s": [], "whole_cpu_s": []}
    results: dict[str, Any] = {}
    with make_progress() as progress:
        task = progress.add_task("starts", total=starts + 1, note="")
        for index in range(starts + 1):
            order = (BARE, OURS) if index % 2 else (OURS, BARE)
            timed = time_pair([plans[arm] for arm in order])
            if index:
                for name, pairs in found.items():
                    pairs.append((timed[BARE][name], timed[OURS][name]))
                results = {
                    f"start_{name}": summarise(list(map(cost_of, pairs)), MAX_START_COST, pairs=pairs)
                    for name, pairs in found.items()
                }
                keep(results)
            note = f"{timed[OURS]['whole_s'] / timed[BARE]['whole_s'] - 1:+.1%}"
            progress.update(task, advance=1, note=note)
    return results


def show(name: str, result: dict[str, Any]) -> str:
    """One line of the result."""
    verdict = ("met" if result["shown"] else "met, not shown") if result["met"] else "MISSED"
    interval = result["cost_interval"]
    spread = "no interval" if interval is None else "{:+.2%} … {:+.2%}".format(*interval)
    return (
        f"{name}: {result['cost']:+.2%} ({spread}) over the bare drafter "
        f"({len(result['costs'])} pairs), at most {result['aim']:.0%}: {verdict}"
    )


@click.command()
@click.option("--output", required=True, type=click.Path(path_type=Path), help="JSON of every pair")
@click.option("--engine-pairs", default=8, show_default=True, help="pairs of engines that make passes")
@click.option(
    "--rounds",
    default=10,
    show_default=True,
    help="pairs of passes over the prompts by each pair of engines; 0: none",
)
@click.option("--starts", default=5, show_default=True, help="pairs of engine starts; 0: none")
@click.option("--num-prompts", default=32, show_default=True)
@click.option("--max-tokens", default=128, show_default=True)
@click.option("--concurrency", default=8, show_default=True)
@click.option("--num-speculative-tokens", default=5, show_default=True)
@click.option(
    "--dtype", default="auto", show_default=True, help="float32 where a CPU has no bfloat16 of its own"
)
@click.option("--check", is_flag=True, help="exit with 1 if an aim is missed")
def main(
    output: Path, engine_pairs: int, rounds: int, starts: int, num_prompts: int, max_tokens: int, concurrency: int,
    num_speculative_tokens: int, dtype: str, check: bool,
) -> None:  # fmt: skip
    """Measure what the plugin costs per step and at start-up, on the tiny pair."""
    target = str(TINY / "target")
    prompts = prompt_ids("tests_held_out", num_prompts)
    options = EngineOptions(target, max_model_len=512, max_num_seqs=concurrency, dtype=dtype)
    with tempfile.TemporaryDirectory() as scratch:
        specs = speculative_configs(make_adapter(Path(scratch) / "zero", 0.0), num_speculative_tokens)
        results: dict[str, Any] = {}
        if rounds:
            results |= time_steps(
                options,
                specs,
                prompts,
                max_tokens,
                rounds,
                engine_pairs,
                lambda found: write_json(output, found),
            )
        if starts:
            steps = dict(results)
            results |= time_starts(
                options, specs, starts, lambda found: write_json(output, {**steps, **found})
            )
    write_json(output, results)
    for name, result in results.items():
        click.echo(show(name, result))
    if check and not all(result["met"] for result in results.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
