"""`ppow demo`: train an adapter for a domain new to the drafter, serve it in vLLM, compare; on the tiny pair.

Two tables: what the tiny target accepts, and what that earns where a target step costs as much more than a draft step
as it does for real targets. Left out: training (training.py), measuring (benchmark.py), the costlier target (tiny/).
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ppow_train.options import PPOWOptions

if TYPE_CHECKING:
    from rich.console import Console

    from ppow_train.benchmark import ArmResult, Work
    from vllm_ppow.artifact import Adapter

COSTLIER_PROMPTS = 8  # served one at a time, where speculation matters most


@click.command()
@click.option(
    "--tiny", default=Path("examples/tiny"), show_default=True, type=click.Path(path_type=Path),
    help="directory of the tiny pair",
)  # fmt: skip
@click.option(
    "--output", default=Path("ppow-demo"), show_default=True, type=click.Path(path_type=Path),
    help="directory for the adapter, demo.json and demo.png",
)  # fmt: skip
@click.option("--drafter", type=click.Choice(["eagle3", "causal_lm"]), default="eagle3", show_default=True)
@click.option(
    "--objective",
    default=PPOWOptions.objective,
    show_default=True,
    help="what is minimised, as in `ppow train`",
)
@click.option("--steps", default=100, show_default=True, help="updates of 128 windows")
@click.option("--prompts", "num_prompts", default=32, show_default=True, help="held-out prompts to serve")
@click.option("--max-tokens", default=64, show_default=True, help="output tokens per prompt")
@click.option("--rounds", default=2, show_default=True, help="passes over the prompts, arms taking turns")
@click.option(
    "--costlier-layers", default=32, show_default=True,
    help="layers of the second table's target, as much deeper than the drafter as real targets are; 0: no such table",
)  # fmt: skip
@click.option("--seed", default=0, show_default=True, help="of trajectories, initialisation and windows")
@click.option("--json", "as_json", is_flag=True, help="print the result as one JSON object on stdout")
def demo(
    tiny: Path,
    output: Path,
    drafter: str,
    objective: str,
    steps: int,
    num_prompts: int,
    max_tokens: int,
    rounds: int,
    costlier_layers: int,
    seed: int,
    as_json: bool,
) -> None:
    """The whole loop once, on a small real pair: train, serve, compare (3 to 6 minutes on 2 cores).

    Exits with 1 when greedy output differs from no speculation or the adapter was not applied.
    """
    from rich.console import Console

    from ppow_train.errors import UserError
    from ppow_train.report import as_json as to_json
    from ppow_train.report import print_table, write_json, write_plot

    if not (tiny / drafter).is_dir():
        raise UserError(
            f"{tiny} does not hold the tiny pair: run from a checkout, give --tiny, or `ppow tiny build`."
        )
    started = time.monotonic()
    console = Console(stderr=as_json)
    console.print(
        f"A target, and a drafter ({drafter}) that never saw test suites: training it for them "
        f"with [bold]{objective}[/].",
        highlight=False,
    )
    adapter = _train(tiny, output, drafter, objective, steps, seed, console)
    work = _work(tiny, num_prompts, max_tokens, rounds)
    results = _serve(adapter, tiny, drafter, work, console)
    value = to_json(
        results, {"demo": drafter, "training": adapter.config.training, "versions": adapter.config.versions}
    )
    title = f"{drafter} drafter on a domain new to it: {num_prompts} held-out prompts × {max_tokens} tokens, in vLLM"
    tables = [(title, "demo.png", results)]
    if costlier_layers:
        worth = _serve_costlier(adapter, tiny, drafter, costlier_layers, work, console)
        value["costlier_target"] = {"layers": costlier_layers, "arms": [arm.as_json() for arm in worth]}
        title = f"The same with a target of {costlier_layers} layers, greedy, one request at a time"
        tables.append((title, "demo-costlier.png", worth))
    write_json(output / "demo.json", value)
    for number, (title, plot, arms) in enumerate(tables, 1):
        write_plot(output / plot, arms, title)
        print_table(arms, title, console, with_caption=number == len(tables))
    console.print(_meaning(value, objective), highlight=False, soft_wrap=True)
    console.print(
        f"Details: {output / 'demo.json'} and the plots beside it ({time.monotonic() - started:.0f} s in all)"
    )
    _next_steps(adapter, tiny, console)
    if as_json:
        click.echo(json.dumps(value))
    for _, _, arms in tables:
        _judge(arms)


def _next_steps(adapter: Adapter, tiny: Path, console: Console) -> None:
    spec = json.dumps({"method": "ppow", "model": str(adapter.directory)})
    console.print("Try next:", style="bold")
    console.print(
        f"  vllm serve {tiny / 'target'} --speculative-config '{spec}'", soft_wrap=True, highlight=False
    )


def _train(
    tiny: Path, output: Path, drafter: str, objective: str, steps: int, seed: int, console: Console
) -> Adapter:
    from ppow_train.config import PPOWConfig
    from ppow_train.pair import load_pair
    from ppow_train.progress import make_progress
    from ppow_train.training import get_trajectories, train_adapter

    with tempfile.TemporaryDirectory() as scratch, make_progress(console) as progress:
        config = PPOWConfig(
            output_dir=scratch,
            objective=objective,
            max_steps=steps,
            seed=seed,
            use_cpu=True,
            save_strategy="no",
        )
        pair = load_pair(str(tiny / "target"), str(tiny / drafter))
        trajectories = get_trajectories(
            pair,
            tiny / "prompts" / "tests_train.jsonl",
            cache=output / "trajectories",
            max_new_tokens=128,
            temperature=1.0,
            seed=seed,
            progress=progress,
        )
        return train_adapter(pair, trajectories, config, output / "adapter", progress=progress).adapter


def _work(tiny: Path, num_prompts: int, max_tokens: int, rounds: int) -> Work:
    from ppow_train.benchmark import Work
    from ppow_train.data import read_prompts
    from ppow_train.generation import load_tokenizer

    texts = read_prompts(tiny / "prompts" / "tests_held_out.jsonl")[:num_prompts]
    prompts = load_tokenizer(tiny / "target")(texts)["input_ids"]
    return Work(prompts, max_tokens, (0.0, 1.0), rounds)


def _serve(
    adapter: Adapter, pair: Path, drafter: str, work: Work, console: Console, concurrency: int = 8
) -> list[ArmResult]:
    """Every arm on a pair whose drafter the adapter fits."""
    import torch

    from ppow_train.benchmark import run_benchmark
    from ppow_train.serving_eval import EngineOptions

    return run_benchmark(
        adapter,
        pair / drafter,
        EngineOptions(str(pair / "target"), max_num_seqs=concurrency),
        work,
        num_speculative_tokens=adapter.config.num_speculative_tokens,
        side_by_side=not torch.cuda.is_available(),
        say=lambda text: console.print(f"  {text}", style="dim", highlight=False),
    )


def _serve_costlier(
    adapter: Adapter, tiny: Path, drafter: str, layers: int, work: Work, console: Console
) -> list[ArmResult]:
    """Every arm with the target that writes the same and costs more; greedy, one request at a time."""
    from ppow_train.tiny.costlier import carry_over, make_costlier
    from vllm_ppow.artifact import read_adapter

    neurons = json.loads((tiny / "target" / "config.json").read_text("utf-8"))["intermediate_size"]
    few = dataclasses.replace(work, prompts=work.prompts[:COSTLIER_PROMPTS], temperatures=(0.0,))
    with tempfile.TemporaryDirectory() as scratch:
        pair = Path(scratch) / "pair"
        make_costlier(tiny, pair, layers, neurons)
        fitting = read_adapter(carry_over(adapter.directory, pair))
        return _serve(fitting, pair, drafter, few, console, concurrency=1)


def _meaning(value: dict[str, Any], objective: str) -> str:
    """The tables in four sentences, whatever they say."""
    rows = {(row["arm"], row["temperature"]): row for row in value["arms"]}
    accepted, speed = [], []
    for temperature in (1.0, 0.0):
        base = rows["base drafter", temperature]["accepted_per_draft"]
        ours = rows["adapter", temperature]
        gain = 100 * (ours["accepted_per_draft"] / base - 1)
        at = f"at temperature {temperature:g}"
        accepted.append(f"{base:.2f} -> {ours['accepted_per_draft']:.2f} ({gain:+.1f} %) {at}")
        speed.append(f"{ours['speed_over_base']['median']:.2f}× {at}")
    tiny = _over_none(row for row in value["arms"] if row["temperature"] == 0)
    sentences = [
        f"Accepted tokens per draft with the adapter ({objective}): {', '.join(accepted)}.",
        f"Output tokens per second over the base drafter's: {', '.join(speed)}.",
        f"Over no speculation, greedy, on the tiny target, whose steps cost little more than a draft step: {tiny}.",
    ]
    if costlier := value.get("costlier_target"):
        sentences.append(
            f"The same with {costlier['layers']} layers, one request at a time: {_over_none(costlier['arms'])}."
        )
    return "\n".join(sentences)


def _over_none(rows: Iterable[dict[str, Any]]) -> str:
    speeds = {row["arm"]: row["speed_ratio"]["median"] for row in rows}
    return (
        f"base drafter {speeds['base drafter']:.2f}×, adapter {speeds['adapter']:.2f}×, "
        f"adapter with the adaptive window {speeds['adapter, adaptive']:.2f}×"
    )


def _judge(results: Sequence[ArmResult]) -> None:
    """Fail where a user must not go on."""
    from ppow_train.serving_eval import ADAPTER, BASE

    if any(result.changes_output for result in results):
        raise click.ClickException("greedy output differs from no speculation.")
    counts = {(result.arm, result.temperature): result.counts for result in results}
    temperatures = {result.temperature for result in results}
    if all(counts[BASE, temperature] == counts[ADAPTER, temperature] for temperature in temperatures):
        raise click.ClickException(
            "the adapter was not applied: vLLM counted exactly what it counts for the base drafter."
        )
