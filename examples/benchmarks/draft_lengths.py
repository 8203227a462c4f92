"""Acceptance by draft length: what drafts of every length get, and what drafts of one length tell of the others.

One engine, of the tiny pair, serves the same prompts once for every length. From what it counted at one length,
accepted tokens of shorter drafts are told in two ways: by the first positions of the counted drafts, and by
`accepted_by_length`, which the draft window and `ppow profile` use. Counts only: other work on the machine changes
nothing. Left out: what drafts cost.

    python examples/benchmarks/draft_lengths.py --adapter ppow-demo/adapter --output draft-lengths.json
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from bench_adapters import TINY, prompt_ids
from serve_sweep import machine_facts

from ppow_train.profile_engine import measured_spec
from ppow_train.profiling import ProfileOptions, measure_acceptance
from ppow_train.progress import make_progress
from ppow_train.report import write_json
from ppow_train.serving_eval import EngineOptions, start_engine
from vllm_ppow.artifact import read_adapter
from vllm_ppow.metrics import SpecDecodeCounts
from vllm_ppow.other_lengths import accepted_by_length

MAX_MODEL_LEN = 512


def count(
    adapter_directory: Path,
    lengths: Sequence[int],
    prompts: list[list[int]],
    max_tokens: int,
    temperature: float,
) -> dict[int, SpecDecodeCounts]:
    """What vLLM counted at every draft length, over one continuation of every prompt each time."""
    from vllm_ppow.compat.profiling import StepProfiler

    adapter = read_adapter(adapter_directory)
    options = ProfileOptions((1,), (64,), (0, *lengths), max_tokens=max_tokens, temperature=temperature)
    spec = measured_spec(adapter, TINY / adapter.config.drafter_type, options)
    engine = EngineOptions(str(TINY / "target"), max_model_len=MAX_MODEL_LEN, max_num_seqs=16)
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the length is set in this process
    llm = start_engine(dataclasses.asdict(engine), spec)
    counts = {}
    with StepProfiler(llm, lengths[-1]) as profiler, make_progress() as progress:
        task = progress.add_task("lengths", total=len(lengths), note="")
        for length in lengths:
            at = dataclasses.replace(options, draft_lengths=(0, length))
            counts[length] = measure_acceptance(llm, profiler, at, prompts)
            progress.update(task, advance=1, note=f"K = {length}")
    return counts


def standard_error(counts: SpecDecodeCounts) -> float:
    """Of accepted tokens per draft, as if drafts were independent."""
    shares = [1.0, *counts.acceptance_per_position]
    squares = sum((2 * i - 1) * share for i, share in enumerate(shares) if i)  # E[a²] = Σ (2i − 1) P(a >= i)
    return ((squares - counts.mean_accepted**2) / counts.num_drafts) ** 0.5


def compare(counts: dict[int, SpecDecodeCounts]) -> list[dict[str, Any]]:
    """One row per length: what was counted, and tokens per step told from longer drafts over those counted."""
    rows = []
    for length, found in counts.items():
        told = {}
        for longer in (other for other in counts if other > length):
            shares = counts[longer].acceptance_per_position[:longer]
            told[str(longer)] = {
                "first_positions": (1 + sum(shares[:length])) / found.acceptance_length,
                "accepted_by_length": (1 + accepted_by_length(shares, longer)[length])
                / found.acceptance_length,
            }
        rows.append(
            {
                "length": length,
                "drafts": found.num_drafts,
                "accepted_per_draft": found.mean_accepted,
                "standard_error": standard_error(found),
                "acceptance_per_position": list(found.acceptance_per_position[:length]),
                "told_from": told,
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    longer = [row["length"] for row in rows[1:]]
    lines = [
        "| K | drafts | accepted per draft | " + " | ".join(f"from K = {k}" for k in longer) + " |",
        "|---|---|---|" + "---|" * len(longer),
    ]
    for row in rows:
        cells = [
            "{first_positions:.3f} → {accepted_by_length:.3f}".format(**row["told_from"][str(k)])
            if str(k) in row["told_from"]
            else ""
            for k in longer
        ]
        counted = f"{row['accepted_per_draft']:.3f} ± {row['standard_error']:.3f}"
        lines.append(f"| {row['length']} | {row['drafts']:,} | {counted} | {' | '.join(cells)} |")
    return "\n".join(lines)


@click.command()
@click.option("--adapter", required=True, type=click.Path(path_type=Path), help="directory of an adapter")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="JSON of what was counted")
@click.option("--prompts", default="tests_report", show_default=True, help="file of the tiny pair's prompts")
@click.option("--num-prompts", default=64, show_default=True)
@click.option("--max-tokens", default=64, show_default=True, help="of every continuation")
@click.option("--temperature", default=0.0, show_default=True)
@click.option("--lengths", default="1,2,3,5,10", show_default=True, help="tokens per draft, ascending")
def main(
    adapter: Path, output: Path, prompts: str, num_prompts: int, max_tokens: int, temperature: float, lengths: str
) -> None:  # fmt: skip
    """Count acceptance at every draft length, and judge what is told of it from longer drafts."""
    chosen = sorted({int(length) for length in lengths.split(",")})
    rows = compare(count(adapter, chosen, prompt_ids(prompts, num_prompts), max_tokens, temperature))
    facts = {
        "adapter": read_adapter(adapter).config.adapter_fingerprint,
        "prompts": prompts,
        "num_prompts": num_prompts,
        "max_tokens": max_tokens,
        "temperature": temperature,
        **machine_facts(),
    }
    write_json(output, {**facts, "lengths": rows})
    click.echo(table(rows))
    click.echo(
        "\nTokens per step told from longer drafts, over those counted: by their first positions → by us."
    )


if __name__ == "__main__":
    main()
