"""`ppow demo`: train an adapter for a domain new to the drafter, serve it in vLLM, compare; on the tiny pair.

Left out: training (training.py), measuring (benchmark.py).
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ppow_train.options import PPOWOptions

if TYPE_CHECKING:
    from rich.console import Console

    from ppow_train.benchmark import ArmResult
    from vllm_ppow.artifact import Adapter


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
    seed: int,
    as_json: bool,
) -> None:
    """The whole loop once, on a small real pair, on the CPU: train, serve, compare (2 to 5 minutes on 2 cores).

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
    results = _serve(adapter, tiny, drafter, num_prompts, max_tokens, rounds, console)
    value = to_json(
        results, {"demo": drafter, "training": adapter.config.training, "versions": adapter.config.versions}
    )
    title = f"{drafter} drafter on a domain new to it: {num_prompts} held-out prompts × {max_tokens} tokens, in vLLM"
    write_json(output / "demo.json", value)
    write_plot(output / "demo.png", results, title)
    print_table(results, title, console)
    console.print(_meaning(value, objective), highlight=False, soft_wrap=True)
    spec = json.dumps({"method": "ppow", "model": str(adapter.directory)})
    console.print(
        f"Details: {output / 'demo.json'}, {output / 'demo.png'} ({time.monotonic() - started:.0f} s in all)"
    )
    console.print("Try next:", style="bold")
    console.print(
        f"  vllm serve {tiny / 'target'} --speculative-config '{spec}'", soft_wrap=True, highlight=False
    )
    if as_json:
        click.echo(json.dumps(value))
    _judge(results)


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


def _serve(
    adapter: Adapter,
    tiny: Path,
    drafter: str,
    num_prompts: int,
    max_tokens: int,
    rounds: int,
    console: Console,
) -> list[ArmResult]:
    from ppow_train.benchmark import run_benchmark
    from ppow_train.data import read_prompts
    from ppow_train.generation import load_tokenizer
    from ppow_train.serving_eval import EngineOptions

    prompts = read_prompts(tiny / "prompts" / "tests_held_out.jsonl")[:num_prompts]
    return run_benchmark(
        adapter,
        tiny / drafter,
        load_tokenizer(tiny / "target")(prompts)["input_ids"],
        EngineOptions(str(tiny / "target")),
        num_speculative_tokens=adapter.config.num_speculative_tokens,
        max_tokens=max_tokens,
        temperatures=(0.0, 1.0),
        rounds=rounds,
        say=lambda text: console.print(f"  {text}", style="dim", highlight=False),
    )


def _meaning(value: dict, objective: str) -> str:
    """The table in three sentences, whatever it says."""
    rows = {(row["arm"], row["temperature"]): row for row in value["arms"]}
    accepted, speed = [], []
    for temperature in (1.0, 0.0):
        base = rows["base drafter", temperature]["accepted_per_draft"]
        ours = rows["adapter", temperature]
        gain = 100 * (ours["accepted_per_draft"] / base - 1)
        at = f"at temperature {temperature:g}"
        accepted.append(f"{base:.2f} -> {ours['accepted_per_draft']:.2f} ({gain:+.1f} %) {at}")
        speed.append(f"{ours['speed_over_base']['median']:.2f}× {at}")
    sentences = [
        f"Accepted tokens per draft with the adapter ({objective}): {', '.join(accepted)}.",
        f"Output tokens per second over the base drafter's: {', '.join(speed)}.",
    ]
    if any(rows["adapter", temperature]["speed_ratio"]["median"] < 1 for temperature in (1.0, 0.0)):
        sentences.append(
            "No speculation is faster still on this pair: its target is so small that a draft step costs nearly as "
            "much as a target step, which no target worth speculating for does."
        )
    return "\n".join(sentences)


def _judge(results: Sequence[ArmResult]) -> None:
    """Fail where a user must not go on."""
    from ppow_train.serving_eval import ADAPTER, BASE

    if any(result.identical is False for result in results):
        raise click.ClickException("greedy output differs from no speculation.")
    counts = {(result.arm, result.temperature): result.counts for result in results}
    if all(counts[BASE, temperature] == counts[ADAPTER, temperature] for temperature in (0.0, 1.0)):
        raise click.ClickException(
            "the adapter was not applied: vLLM counted exactly what it counts for the base drafter."
        )
