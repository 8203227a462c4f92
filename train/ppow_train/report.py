"""Tables, JSON and the plot of a benchmark, and the plot of a training run. Left out: measuring."""

from __future__ import annotations

import importlib.util
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ppow_train.benchmark import ArmResult
from ppow_train.errors import UserError
from ppow_train.identity import Comparison
from ppow_train.serving_eval import ADAPTER, ADAPTIVE, BASE

CURVE = "selection.png"  # beside the adapter

_TABLE_WIDTH = 125  # characters; at 8 positions nothing wraps
_CAPTION = (
    "T: temperature · length: tokens per target step that verified a draft, as vLLM counts them · accepted up to "
    "position: share of drafts · drafted, accepted: tokens · ÷ none, ÷ base: output tokens/s over that arm's, median "
    "± half the range · same: greedy output token-identical to no speculation (n ties: but for n texts, which part "
    "where the target's two best tokens were within rounding) · adaptive: as served by default, K chosen at every "
    "step where the server can"
)
_COLOURS = {BASE: "#888888", ADAPTER: "#d1495b", ADAPTIVE: "#e8a0a9"}


def print_table(
    results: Sequence[ArmResult], title: str, console: Console, *, with_caption: bool = True
) -> None:
    """One row per arm and temperature; wide enough for nobody to have to guess a column.

    Args:
        with_caption: say what the columns are; once for tables that follow each other.
    """
    table = Table(title=title, caption=_CAPTION if with_caption else None, box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("T", no_wrap=True)
    table.add_column("arm", no_wrap=True)
    columns = ("length", "accepted up to position 1, 2, …", "drafted", "accepted", "÷ none", "÷ base", "same")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        table.add_row(*_cells(result))
    if console.width < _TABLE_WIDTH:
        console = Console(file=console.file, width=_TABLE_WIDTH)
    console.print(table)


def _cells(result: ArmResult) -> list[str]:
    row = result.as_json()
    speeds = [
        f"{s['median']:.2f}" + (f" ±{(s['max'] - s['min']) / 2:.2f}" if len(result.speed_ratios) > 1 else "")
        for s in (row["speed_ratio"], row["speed_over_base"])
    ]
    shown = [f"{result.temperature:g}", result.arm]
    counts = result.counts
    if counts is None or not counts.num_drafts:
        shown += ["–"] * 4
    else:
        shown += [
            f"{counts.acceptance_length:.3f}",
            " ".join(f"{share:.2f}".removeprefix("0") for share in counts.acceptance_per_position),
            f"{counts.num_draft_tokens:,}",
            f"{counts.num_accepted_tokens:,}",
        ]
    return [*shown, *speeds, _sameness(result.greedy)]


def _sameness(greedy: Comparison | None) -> str:
    if greedy is None:
        return "–"
    if not greedy.holds:
        return "NO"
    return "yes" if greedy.is_exact else f"{greedy.ties} ties"


def as_json(results: Sequence[ArmResult], facts: dict[str, Any]) -> dict[str, Any]:
    """Machine-readable result with what is needed to repeat it."""
    return {
        **facts,
        "machine": f"{platform.machine()}, {_cores()} cores, Python {platform.python_version()}",
        "arms": [result.as_json() for result in results],
    }


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write JSON under a temporary name, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def _save(figure: Any, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.part")
    figure.savefig(temporary, dpi=120, format="png")
    temporary.replace(path)


def check_plots() -> None:
    """Ask for what `write_plot` needs before a measurement is made that it would draw.

    Raises:
        UserError: it is not installed; serving alone does not bring it.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(
            "--output draws with matplotlib, which is not installed here: pip install matplotlib."
        )


def write_plot(path: Path, results: Sequence[ArmResult], title: str) -> None:
    """Acceptance by position (left) and speed against no speculation (right), a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    temperatures = sorted({result.temperature for result in results})
    styles = dict(zip(temperatures, ("-", "--", ":"), strict=False))
    for result in results:
        if result.arm not in (BASE, ADAPTER) or result.counts is None:
            continue  # drafts of several lengths have no one curve
        shares = result.counts.acceptance_per_position
        left.plot(
            range(1, len(shares) + 1),
            shares,
            styles.get(result.temperature, "-"),
            color=_COLOURS[result.arm],
            marker="o",
            markersize=4,
            label=f"{result.arm}, T = {result.temperature:g}",
        )
    left.set(
        xlabel="position in the draft",
        ylabel="share of drafts accepted",
        ylim=(0, 1),
        title="Acceptance by position",
    )
    left.legend(frameon=False)
    _plot_speed(right, results)
    figure.suptitle(title)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    _save(figure, path)
    plt.close(figure)


def write_curve(path: Path, selection: dict[str, Any]) -> None:
    """Accepted tokens per draft over the updates of a run, and which adapter was written, a PNG.

    Args:
        selection: `BestOnHeldOut.facts()`.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    updates, accepted = zip(*selection["curve"], strict=True)
    written = selection["written_after_updates"]
    axes.axhline(accepted[0], color="#888888", linewidth=0.8, label="untrained drafter")
    axes.plot(updates, accepted, color="#d1495b", marker="o", markersize=4)
    axes.plot(
        [written], [dict(selection["curve"])[written]], "o", color="#d1495b", markersize=9, label="written"
    )
    axes.set(
        xlabel="updates",
        ylabel="accepted tokens per draft",
        title=f"Expected on {selection['prompts']} held-out prompts",
    )
    axes.legend(frameon=False)
    figure.tight_layout()
    _save(figure, path)
    plt.close(figure)


def _plot_speed(axes: Any, results: Sequence[ArmResult]) -> None:
    labels = [f"{result.arm.replace(' ', chr(10), 1)}\nT = {result.temperature:g}" for result in results]
    rows = [result.as_json()["speed_ratio"] for result in results]
    medians = [row["median"] for row in rows]
    errors = [
        [m - row["min"] for m, row in zip(medians, rows, strict=True)],
        [row["max"] - m for m, row in zip(medians, rows, strict=True)],
    ]
    colours = [_COLOURS.get(result.arm, "#cccccc") for result in results]
    axes.bar(range(len(rows)), medians, yerr=errors, color=colours, capsize=3)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(rows)), labels, fontsize=8)
    axes.set(ylabel="output tokens/s ÷ no speculation", title="Speed (median, min–max)")
