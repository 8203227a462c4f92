"""The picture of a log of windows: criticality of what was chosen, over a run, and accepted tokens by position.

Left out: gathering the numbers (window_log.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

_CHOSEN, _CANDIDATES = "#d1495b", "#888888"


def write_window_plot(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """A PNG of three panels from lines of `windows.jsonl`; the first two say so where windows were ordinary."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.2))
    adaptive = [line for line in lines if "criticality" in line]
    left.set_title("Criticality of windows")
    middle.set_title("Mean criticality over the run")
    if adaptive:
        _plot_histogram(left, [line["criticality"] for line in adaptive])
        _plot_means(middle, adaptive)
    else:
        for axes in (left, middle):
            axes.text(0.5, 0.5, "ordinary windows only", ha="center", transform=axes.transAxes)
    _plot_accepted(right, [line for line in lines if "accepted" in line])
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    figure.savefig(temporary, dpi=120, format="png")
    temporary.replace(path)
    plt.close(figure)


def _unit(criticality: dict[str, Any]) -> str:
    return {"divergence": "criticality (nats)", "lost_tokens": "expected lost tokens"}[criticality["kind"]]


def _plot_histogram(axes: Any, criticality: Sequence[dict[str, Any]]) -> None:
    edges = criticality[0]["edges"]
    for name, colour in (("candidates", _CANDIDATES), ("chosen", _CHOSEN)):
        counts = [sum(column) for column in zip(*(entry[name] for entry in criticality), strict=True)]
        shares = [count / sum(counts) for count in counts]
        axes.stairs(shares, edges, color=colour, label="could be drawn" if name == "candidates" else name)
    if criticality[0]["kind"] == "divergence":
        axes.set_xscale("symlog", linthresh=edges[1])
    axes.set(xlabel=_unit(criticality[0]), ylabel="share of windows")
    axes.legend(frameon=False)


def _plot_means(axes: Any, lines: Sequence[dict[str, Any]]) -> None:
    steps = [line["step"] for line in lines]
    for name, colour in (("candidates", _CANDIDATES), ("chosen", _CHOSEN)):
        means = [line["criticality"][f"{name}_mean"] for line in lines]
        label = "could be drawn" if name == "candidates" else name
        axes.plot(steps, means, color=colour, marker="o", markersize=4, label=label)
    axes.set(xlabel="updates", ylabel=_unit(lines[0]["criticality"]), ylim=(0, 1.1 * axes.get_ylim()[1]))
    axes.legend(frameon=False)


def _plot_accepted(axes: Any, lines: Sequence[dict[str, Any]]) -> None:
    """First and last interval; with one of them only once."""
    for line, style in zip([*lines[:1], *lines[1:][-1:]], ("--", "-"), strict=False):
        shares = line["accepted"]["per_position"]
        label = f"after {line['step']} updates"
        axes.plot(
            range(1, len(shares) + 1), shares, style, color=_CHOSEN, marker="o", markersize=4, label=label
        )
    axes.set(xlabel="position in the window", ylabel="share of windows accepted", ylim=(0, 1))
    axes.set_title("Acceptance by position, windows trained on")
    if lines:
        axes.legend(frameon=False)
