"""The GPU benchmark's results as Markdown: `python examples/benchmarks/gpu/summary.py DIRECTORY`.

Left out: any judgement beyond ratios of medians; every figure names its card.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any


def main(argv: list[str]) -> int:
    """Print the summary of a directory; exit code 2 without one, 1 when it holds no results."""
    if len(argv) != 1:
        print("Name the directory of results: summary.py DIRECTORY", file=sys.stderr)
        return 2
    results = {
        path.stem: json.loads(path.read_text("utf-8")) for path in sorted(Path(argv[0]).glob("*.json"))
    }
    if not results:
        print(f"Error: {argv[0]} holds no results: run gpu.sh first.", file=sys.stderr)
        return 1
    print(summary(results))
    return 0


def summary(results: dict[str, dict[str, Any]]) -> str:
    """All tables, from step -> result."""
    places = sorted({f"{one['card']}, vLLM {one['vllm']}, {one['date'][:10]}" for one in results.values()})
    lines = ["Ran on: " + "; ".join(places) + "."]
    if any(one["tiny"] for one in results.values()):
        lines.append("**Tiny models: a trial of the steps, which says nothing about speed.**")
    lines += ["", *_identity(results), "", *_arms(results)]
    return "\n".join(lines)


def _identity(results: dict[str, dict[str, Any]]) -> list[str]:
    rows = ["| greedy output | compared | identical | ties | errors |", "|---|---|---|---|---|"]
    for name, one in results.items():
        for what, found in one.get("compared", {}).items():
            verdict = "none" if found["holds"] else f"**{len(found['errors'])}**"
            rows.append(
                f"| {name} | {what} | {found['identical']} of {found['prompts']} | {found['ties']} | {verdict} |"
            )
    return rows if len(rows) > 2 else ["Greedy output: not run."]


def _arms(results: dict[str, dict[str, Any]]) -> list[str]:
    arms = {
        name.removeprefix("arm-"): _rates(one) for name, one in results.items() if name.startswith("arm-")
    }
    if "none" not in arms:
        return ["Speed: arm-none was not run, to which all others are compared."]
    batches = sorted(arms["none"])
    rows = [
        "Output tokens per second over no speculation, by batch size:",
        "",
        "| arm | " + " | ".join(map(str, batches)) + " |",
        "|---" * (len(batches) + 1) + "|",
    ]
    for name, rates in arms.items():
        shown = [f"{rates[b] / arms['none'][b]:.2f}" if b in rates else "–" for b in batches]
        rows.append(f"| {name} | " + " | ".join(shown) + " |")
    fixed = [rates for name, rates in arms.items() if name.startswith("fixed-")]
    if "adaptive" in arms and fixed:
        best = {b: max(rates[b] for rates in fixed if b in rates) for b in batches}
        shown = [f"{arms['adaptive'][b] / best[b]:.2f}" for b in batches]
        rows.append("| adaptive over the best fixed | " + " | ".join(shown) + " |")
    return rows


def _rates(result: dict[str, Any]) -> dict[int, float]:
    return {one["batch"]: statistics.median(one["tokens_per_second"]) for one in result["measured"]}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
