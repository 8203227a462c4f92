"""The GPU benchmark's results as Markdown: `python examples/benchmarks/gpu/summary.py DIRECTORY`.

Left out: any judgement beyond ratios of medians; every figure names its card.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import turns_table
import within_table

NONE, ADAPTIVE = "none", "adaptive"


def main(argv: list[str]) -> int:
    """Print the summary of a directory; exit code 2 without one, 1 when it holds no results."""
    if len(argv) != 1:
        print("Name the directory of results: summary.py DIRECTORY", file=sys.stderr)
        return 2
    folder = Path(argv[0])
    every = {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))}
    results = {
        name: one for name, one in every.items() if "card" in one
    }  # other benchmarks may lie beside them
    if not results:
        print(f"Error: {argv[0]} holds no results: run gpu.sh first.", file=sys.stderr)
        return 1
    figures = []
    for path in sorted(folder.glob("arms-*.jsonl"), key=lambda path: int(path.stem.partition("-")[2])):
        lines = path.read_text("utf-8").splitlines()
        figures += [{"group": path.stem, **json.loads(line)} for line in lines]
    print(summary(results, figures))
    return 0


def summary(results: dict[str, dict[str, Any]], figures: list[dict[str, Any]]) -> str:
    """All tables, from step -> result and from the lines of arms-N.jsonl, each with its "group"."""
    places = sorted({f"{one['card']}, vLLM {one['vllm']}, {one['date'][:10]}" for one in results.values()})
    lines = ["Ran on: " + "; ".join(places) + "."]
    if any(one["tiny"] for one in results.values()):
        lines.append("**Tiny models: a trial of the steps, which says nothing about speed.**")
    lines += [
        "",
        *_training(results),
        "",
        *_identity(results),
        "",
        *_tests(results),
        *_packed(results),
        *_within(results),
        *_arms(figures),
    ]
    return "\n".join(lines)


def _training(results: dict[str, dict[str, Any]]) -> list[str]:
    """Of every run of `ppow train` what its parity gate compared."""
    rows = [
        "| trained | accepted tokens per draft, simulated | counted by vLLM | parity gate |",
        "|---|---|---|---|",
    ]
    for name, one in results.items():
        if "training" in one:
            parity = one["training"]["parity"]
            figures = [parity[f"{who}_accepted_per_draft"] for who in ("simulated", "served")]
            held = "held" if parity["holds"] else "**failed**"
            rows.append(f"| {name} | {figures[0]:.3f} | {figures[1]:.3f} | {held} |")
    return rows if len(rows) > 2 else ["Training: not run."]


def _identity(results: dict[str, dict[str, Any]]) -> list[str]:
    rows = ["| greedy output | compared | identical | ties | errors |", "|---|---|---|---|---|"]
    for name, one in results.items():
        for what, found in one.get("compared", {}).items():
            verdict = "none" if found["holds"] else f"**{len(found['errors'])}**"
            rows.append(
                f"| {name} | {what} | {found['identical']} of {found['prompts']} | {found['ties']} | {verdict} |"
            )
    return rows if len(rows) > 2 else ["Greedy output: not run."]


def _tests(results: dict[str, dict[str, Any]]) -> list[str]:
    rows = ["| tests of serving | pytest | passed | skipped |", "|---|---|---|---|"]
    for name, one in results.items():
        if tests := one.get("tests"):
            rows.append(
                f"| {name} | `{' '.join(tests['arguments'])}` | {tests['passed']} | {tests['skipped']} |"
            )
    return [*rows, ""] if len(rows) > 2 else []


def _packed(results: dict[str, dict[str, Any]]) -> list[str]:
    """Windows per second by wall time, medians over rounds; the ratio with its spread."""
    rows = [
        "| drafter | windows per update | tokens of a trajectory | packed windows per second | one row each | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for one in results.values():
        for drafter, measured in one.get("packed_speed", {}).items():
            for found in measured["results"]:
                packed, unpacked, ratio = (found["wall"][name] for name in ("packed", "unpacked", "ratio"))
                cells = [drafter, str(found["windows_per_step"]), f"{found['mean_tokens']:.0f}"]
                cells += [f"{packed['median']:.1f}", f"{unpacked['median']:.1f}"]
                cells += [f"{ratio['median']:.1f} ({ratio['min']:.1f} to {ratio['max']:.1f})"]
                rows.append(f"| {' | '.join(cells)} |")
    return [*rows, ""] if len(rows) > 2 else []


def _within(results: dict[str, dict[str, Any]]) -> list[str]:
    """The adaptive window against every draft length in the turns of one engine, first rotations left out."""
    levels = [line for one in results.values() for line in one.get("within", [])]
    if not levels:
        return []
    lines = [within_table.comparable(line, _warm(line)) for line in levels]
    judged = [turns_table.judge(line, 0) for line in lines]
    remarks = [f"- {within_table.remark(line, level)}" for line, level in zip(lines, judged, strict=True)]
    head = (
        "Turns of a third of a second in one engine, `none` being a draft length of 0, by requests at a time:"
    )
    return [head, "", turns_table.make_table(judged), "", *remarks, ""]


def _warm(line: dict[str, Any]) -> int:
    """Rotations that are not judged, where there are more than are needed: the window has just met the batch size."""
    return min(8, max(turn["rotation"] for turn in line["turns"]) + 1 - turns_table.LEAST_ROTATIONS)


def _arms(figures: list[dict[str, Any]]) -> list[str]:
    """Ratios within rounds, as median (lowest to highest)."""
    worth = _over_none(figures)
    if not worth:
        return [f"Speed: the arm {NONE} was not run, to which all others are compared."]
    names = list(dict.fromkeys(one["arm"] for one in figures))
    batches = sorted({one["batch"] for one in figures})
    rows = [
        f"Output tokens per second over the arm {NONE} of the same round, median (lowest to highest), by batch size:",
        "",
        "| arm | " + " | ".join(map(str, batches)) + " |",
        "|---" * (len(batches) + 1) + "|",
        *(_row(name, [worth.get((name, b), {}) for b in batches]) for name in names),
    ]
    if _one_at_a_time(figures):
        rows[0] = f"**One engine at a time**, not in turns. {rows[0]}"
    for prefix, shown in (("fixed-", "fixed"), ("v2-fixed-", "fixed on the V2 runner")):
        fixed = [name for name in names if name.startswith(prefix)]
        if ADAPTIVE in names and fixed:
            cells = [_over_best(worth, fixed, batch) for batch in batches]
            rows.append(_row(f"{ADAPTIVE} over the best {shown}", cells))
    return rows


Worth = dict[tuple[str, int], dict[int, float]]  # (arm, batch) -> round -> tokens per second over NONE's


def _one_at_a_time(figures: list[dict[str, Any]]) -> bool:
    """Whether the GPU held one engine only, so that no arm had NONE beside it."""
    beside = {one["group"] for one in figures if one["arm"] == NONE}
    return bool(beside) and {one["arm"] for one in figures if one["group"] in beside} == {NONE}


def _over_none(figures: list[dict[str, Any]]) -> Worth:
    """Over NONE of the same group and round; of the same round where the GPU held one engine only."""
    alone = _one_at_a_time(figures)

    def place(one: dict[str, Any]) -> tuple[Any, ...]:
        return (None if alone else one["group"], one["round"], one["batch"])

    none = {place(one): one["tokens_per_second"] for one in figures if one["arm"] == NONE}
    worth: Worth = {}
    for one in figures:
        if (beside := none.get(place(one))) is not None:
            ratios = worth.setdefault((one["arm"], one["batch"]), {})
            ratios[one["round"]] = one["tokens_per_second"] / beside
    return worth


def _over_best(worth: Worth, fixed: list[str], batch: int) -> dict[int, float]:
    """Round -> the adaptive arm over the fixed one with the best median."""
    there = [name for name in fixed if (name, batch) in worth]
    if not there:
        return {}
    best = worth[max(there, key=lambda name: statistics.median(worth[name, batch].values())), batch]
    ours = worth.get((ADAPTIVE, batch), {})
    return {number: ratio / best[number] for number, ratio in ours.items() if number in best}


def _row(name: str, cells: list[dict[int, float]]) -> str:
    shown = [
        f"{statistics.median(cell.values()):.2f} ({min(cell.values()):.2f} to {max(cell.values()):.2f})"
        if cell
        else "–"
        for cell in cells
    ]
    return f"| {name} | " + " | ".join(shown) + " |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
