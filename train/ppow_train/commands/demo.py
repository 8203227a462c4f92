"""`ppow demo`: train an adapter for a domain new to the drafter, serve it in vLLM, compare; on the tiny pair.

Two tables: what the tiny target accepts, and what that earns where a target step costs as much more than a draft step
as it does for real targets. Left out: training (training.py), measuring (benchmark.py), the costlier target (tiny/).
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ppow_train.commands.engine_arguments import engine_argument_option
from ppow_train.commands.options import SEED, ObjectiveName
from ppow_train.options import PPOWOptions
from ppow_train.ranges import MOST_UPDATES

if TYPE_CHECKING:
    from rich.console import Console

    from ppow_train.benchmark import ArmResult, Work
    from ppow_train.serving_eval import EngineOptions
    from vllm_ppow.artifact import Adapter

COSTLIER_PROMPTS = 4  # served one at a time, where speculation matters most


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
    type=ObjectiveName(),
    default=PPOWOptions.objective,
    show_default=True,
    help="what is minimised, as in `ppow train`",
)
@click.option(
    "--steps", type=click.IntRange(1, MOST_UPDATES), default=100, show_default=True, help="updates of 128 windows"
)  # fmt: skip
@click.option(
    "--prompts", "num_prompts", type=click.IntRange(1), default=32, show_default=True,
    help="held-out prompts to serve",
)  # fmt: skip
@click.option(
    "--max-tokens", type=click.IntRange(2), default=64, show_default=True,
    help="output tokens per prompt; the first of them is never drafted",
)  # fmt: skip
@click.option(
    "--rounds",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="passes of the second table, which is about speed, arms taking turns",
)
@click.option(
    "--costlier-layers", type=click.IntRange(0), default=32, show_default=True,
    help="layers of the second table's target, as much deeper than the drafter as real targets are; 0: no such table",
)  # fmt: skip
@click.option(
    "--seed", type=SEED, default=0, show_default=True, help="of trajectories, initialisation and windows"
)
@engine_argument_option()
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
    engine_arguments: dict[str, Any],
    as_json: bool,
) -> None:
    """The whole loop once, on a small real pair: train, serve, compare (4 to 9 minutes on 2 cores).

    Exits with 1 when greedy output differs from no speculation or the adapter was not applied.
    """
    _check(tiny, drafter, costlier_layers, output)
    from rich.console import Console

    from ppow_train.report import as_json as to_json
    from ppow_train.report import write_json
    from ppow_train.serving_eval import ADAPTER, BASE, NONE, EngineOptions

    started = time.monotonic()
    console = Console(stderr=as_json)
    console.print(
        f"A target, and a drafter ({drafter}) that never saw test suites: training it for them "
        f"with [bold]{objective}[/].",
        highlight=False,
    )
    adapter = _train(tiny, output, drafter, objective, steps, seed, console)
    work = _work(tiny, num_prompts, max_tokens)
    engine = EngineOptions(str(tiny / "target"), max_num_seqs=8, more=engine_arguments)
    accepted = _run(adapter, tiny / drafter, engine, work, (NONE, BASE, ADAPTER), console)
    value = to_json(
        accepted, {"demo": drafter, "training": adapter.config.training, "versions": adapter.config.versions}
    )
    write_json(output / "demo.json", value)  # now: it is not lost where the second table fails
    earned = _serve_costlier(adapter, tiny, drafter, costlier_layers, engine, _few(work, rounds), console)
    if earned:
        value["costlier_target"] = {"layers": costlier_layers, "arms": [arm.as_json() for arm in earned]}
        write_json(output / "demo.json", value)
    title = f"{drafter} drafter on a domain new to it: {num_prompts} held-out prompts, in vLLM"
    _show(accepted, title, output / "demo.png", console, with_caption=not earned)
    if earned:
        title = f"The same, greedy, one request at a time, target of {costlier_layers} layers"
        _show(earned, title, output / "demo-costlier.png", console)
    console.print(_meaning(value, objective), highlight=False, soft_wrap=True)
    console.print(
        f"Details: {output / 'demo.json'} and the plots beside it ({time.monotonic() - started:.0f} s in all)"
    )
    _next_steps(adapter, tiny, console)
    if as_json:
        click.echo(json.dumps(value))
    for arms in filter(None, (accepted, earned)):
        _judge(arms)


def _check(tiny: Path, drafter: str, costlier_layers: int, output: Path) -> None:
    """Refuse before the training what would be refused after it.

    Raises:
        UserError: no tiny pair, a second table's target that would be smaller than the pair's, or nothing can be
            written to `output`.
    """
    from ppow_train.errors import UserError
    from ppow_train.preflight import check_writable

    check_writable(output)
    if not ((tiny / drafter).is_dir() and (tiny / "target" / "config.json").is_file()):
        raise UserError(
            f"{tiny} does not hold the tiny pair: run from a checkout, give --tiny, or `ppow tiny build`."
        )
    layers = _target_config(tiny)["num_hidden_layers"]
    if 0 < costlier_layers < layers:
        raise UserError(
            f"--costlier-layers must be 0 or at least the tiny target's {layers}, got {costlier_layers}."
        )


def _target_config(tiny: Path) -> dict[str, Any]:
    return json.loads((tiny / "target" / "config.json").read_text("utf-8"))


def _show(
    arms: Sequence[ArmResult], title: str, plot: Path, console: Console, with_caption: bool = True
) -> None:
    from ppow_train.report import print_table, write_plot

    write_plot(plot, arms, title)
    print_table(arms, title, console, with_caption=with_caption)


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
            rounds=config.continuation_rounds(),
            progress=progress,
        )
        return train_adapter(pair, trajectories, config, output / "adapter", progress=progress).adapter


def _work(tiny: Path, num_prompts: int, max_tokens: int) -> Work:
    from ppow_train.benchmark import Work
    from ppow_train.data import read_prompts
    from ppow_train.generation import load_tokenizer
    from ppow_train.prompts import text_ids

    tokenizer = load_tokenizer(tiny / "target")
    texts = read_prompts(tiny / "prompts" / "tests_held_out.jsonl", tokenizer)[:num_prompts]
    prompts = text_ids(texts, tokenizer)
    return Work(prompts, max_tokens, (0.0, 1.0), rounds=1)


def _few(work: Work, rounds: int) -> Work:
    """The second table's share of the work: it is about speed."""
    return dataclasses.replace(
        work, prompts=work.prompts[:COSTLIER_PROMPTS], temperatures=(0.0,), rounds=rounds
    )


def _serve_costlier(
    adapter: Adapter,
    tiny: Path,
    drafter: str,
    layers: int,
    engine: EngineOptions,
    work: Work,
    console: Console,
) -> list[ArmResult]:
    """What drafts earn with a target that writes the same and costs more, one request at a time; none with 0 layers.

    In float32, which every CPU computes natively, and in which two tokens are hardly ever within rounding.
    """
    from ppow_train.benchmark import ARMS
    from ppow_train.tiny.costlier import carry_over, make_costlier
    from vllm_ppow.artifact import read_adapter

    if not layers:
        return []
    neurons = _target_config(tiny)["intermediate_size"]
    with tempfile.TemporaryDirectory() as scratch:
        pair = Path(scratch) / "pair"
        make_costlier(tiny, pair, layers, neurons)
        fitting = read_adapter(carry_over(adapter.directory, pair))
        options = dataclasses.replace(engine, target=str(pair / "target"), max_num_seqs=1, dtype="float32")
        return _run(fitting, pair / drafter, options, work, ARMS, console)


def _run(
    adapter: Adapter, base: Path, options: EngineOptions, work: Work, arms: Sequence[str], console: Console
) -> list[ArmResult]:
    import torch

    from ppow_train.benchmark import run_benchmark

    return run_benchmark(
        adapter,
        base,
        options,
        work,
        num_speculative_tokens=adapter.config.num_speculative_tokens,
        side_by_side=not torch.cuda.is_available(),
        arms=arms,
        say=lambda text: console.print(f"  {text}", style="dim", highlight=False),
    )


def _meaning(value: dict[str, Any], objective: str) -> str:
    """The tables in four sentences, whatever they say."""
    rows = {(row["arm"], row["temperature"]): row for row in value["arms"]}
    accepted, speed = [], []
    for temperature in (1.0, 0.0):
        base, ours = rows["base drafter", temperature], rows["adapter", temperature]
        at = f"at temperature {temperature:g}"
        accepted.append(f"{_gain(base.get('accepted_per_draft'), ours.get('accepted_per_draft'))} {at}")
        speed.append(f"{ours['speed_over_base']['median']:.2f}× {at}")
    sentences = [
        f"Accepted tokens per draft with the adapter ({objective}): {', '.join(accepted)}.",
        f"Output tokens per second over the base drafter's: {', '.join(speed)}.",
    ]
    if costlier := value.get("costlier_target"):
        worth = {row["arm"]: row["speed_ratio"]["median"] for row in costlier["arms"]}
        sentences.append(
            "The tiny target's step costs hardly more than a draft step. With one of "
            f"{costlier['layers']} layers, output tokens per second over no speculation: base drafter "
            f"{worth['base drafter']:.2f}×, adapter {worth['adapter']:.2f}×, adapter as served by default "
            f"{worth['adapter, adaptive']:.2f}×."
        )
    return "\n".join(sentences)


def _gain(base: float | None, ours: float | None) -> str:
    """Accepted per draft without and with the adapter; "–" where nothing was drafted, or there is none to divide by."""
    before, after = ("–" if value is None else f"{value:.2f}" for value in (base, ours))
    gain = f"{100 * (ours / base - 1):+.1f} %" if base and ours is not None else "–"
    return f"{before} -> {after} ({gain})"


def _judge(results: Sequence[ArmResult]) -> None:
    """Fail where a user must not go on."""
    import torch

    from ppow_train.serving_eval import ADAPTER, BASE

    def differs(result: ArmResult) -> bool:
        if torch.cuda.is_available():
            return result.changes_output
        return result.greedy is not None and not result.greedy.is_exact  # no ties on a CPU, for these prompts

    if any(map(differs, results)):
        raise click.ClickException("greedy output differs from no speculation.")
    counts = {(result.arm, result.temperature): result.counts for result in results}
    temperatures = {result.temperature for result in results}
    if all(counts[BASE, temperature] == counts[ADAPTER, temperature] for temperature in temperatures):
        raise click.ClickException(
            "the adapter was not applied: vLLM counted exactly what it counts for the base drafter."
        )
