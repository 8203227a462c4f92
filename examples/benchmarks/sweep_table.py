"""Results of a load sweep: read back, compared within blocks, judged by the aims, drawn. Left out: measuring.

A block is one concurrency in one round with every server of one group, each loaded in turn: arms are only ever compared
inside a block, where they are neighbours in time. Ratios over blocks are given as median ± half the range.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

NONE, ADAPTIVE = "none", "adaptive"
# The server without speculation, loaded a second time in the block: what chance alone does.
CONTROL = "none again"
MIN_OF_BEST, MIN_OF_NONE = 0.98, 0.97  # the aims: ours over the best fixed K, and over no speculation

Series = dict[str, list[tuple[int, float, float, float]]]  # arm -> (concurrency, ratio, low, high)
Block = tuple[float, tuple[str, ...], int, int]  # temperature, arms of the group, round, concurrency


@dataclasses.dataclass(frozen=True)
class Spread:
    """Ratios of some blocks: their median, half of their range, the smallest of them, and how many they are."""

    median: float
    half_range: float
    smallest: float
    count: int

    def __str__(self) -> str:
        return f"{self.median:.2f} ±{self.half_range:.2f}"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Ours at one concurrency, against the fixed K that is best there, no speculation, and every fixed K.

    `over_chosen` is against the K that a user would have fixed who measured before: in each round the one that was best
    in the other rounds. None with one round. `control` is no speculation over itself; None where it was not measured.
    """

    concurrency: int
    best_fixed: str
    over_best: Spread
    over_chosen: Spread | None
    over_none: Spread
    over_every_fixed: dict[str, Spread]
    control: Spread | None = None

    def beside_chance(self, median: float, aim: float) -> str:
        """What to say of a figure that is no further from its aim than no speculation is from itself."""
        if self.control is None or abs(median - aim) > self.control.half_range:
            return ""
        return f"; not resolved: no speculation came to {self.control} of itself there"

    @property
    def is_strictly_better(self) -> bool:
        """Above every fixed K in every block, of which there are at least two: more than one lucky run."""
        return all(spread.smallest > 1 and spread.count > 1 for spread in self.over_every_fixed.values())


def fixed(num_speculative_tokens: int) -> str:
    """Name of the arm with a fixed window."""
    return f"K={num_speculative_tokens}"


def is_fixed(arm: str) -> bool:
    """Whether an arm has a fixed window."""
    return arm.startswith("K=")


def length_of(arm: str) -> int | None:
    """Draft length of an arm that has one: 0 for none; None: a window chooses."""
    if arm == NONE:
        return 0
    return int(arm.removeprefix("K=")) if is_fixed(arm) else None


# ---------------------------------------------------------------- the file


def block_of(line: dict[str, Any]) -> Block:
    """The block that a line of results belongs to."""
    return (line["temperature"], tuple(line["group"]), line["round"], line["concurrency"])


def read_results(path: Path, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Lines of the complete blocks that are on disk; otherwise as `read_lines`."""
    return complete_blocks(read_lines(path, facts))


def read_lines(path: Path, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Whole lines that are on disk; the file is begun if there is none.

    Raises:
        click.UsageError: the file is of another sweep; ratios of both together would mean nothing.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"facts": facts}) + "\n")
        return []
    text = path.read_text()
    lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    if not text.endswith("\n"):  # killed while it wrote: what follows must not be glued to the torn line
        path.write_text(text[: text.rfind("\n") + 1])
    if not lines or lines[0].get("facts") != facts:
        known = lines[0].get("facts", {}) if lines else {}
        differing = sorted(key for key in {*facts, *known} if facts.get(key) != known.get(key))
        raise click.UsageError(
            f"{path} holds a sweep with other {', '.join(differing)}: give another --output, or the same options."
        )
    return lines[1:]


def complete_blocks(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of the blocks in which no arm is missing."""
    blocks: dict[Block, dict[str, dict[str, Any]]] = {}
    for line in lines:
        blocks.setdefault(block_of(line), {})[line["arm"]] = line
    return [line for block, arms in blocks.items() if set(block[1]) == set(arms) for line in arms.values()]


def append_block(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Write a block at once, so that a kill leaves whole blocks behind, or a torn line that is not read."""
    with path.open("a") as stream:
        stream.write("".join(json.dumps(line) + "\n" for line in lines))


# ---------------------------------------------------------------- comparing


def ratios(
    lines: Sequence[dict[str, Any]], arm: str, reference: str, temperature: float, concurrency: int
) -> Spread | None:
    """Output tokens per second of an arm over a reference's, in the blocks that have both; None without any."""
    speed = {
        (block_of(line), line["arm"]): line["output_tokens_per_second"]
        for line in lines
        if line["temperature"] == temperature and line["concurrency"] == concurrency
    }
    return _spread(
        value / speed[block, reference]
        for (block, name), value in speed.items()
        if name == arm and (block, reference) in speed
    )


def over_chosen(lines: Sequence[dict[str, Any]], temperature: float, concurrency: int) -> Spread | None:
    """Ours in each round over the fixed K that was best in the other rounds; None with one round.

    The best of several noisy medians is partly luck; what it does in a round that had no part in the choice is not.
    """
    here = [x for x in lines if (x["temperature"], x["concurrency"]) == (temperature, concurrency)]
    found = []
    for number in sorted({line["round"] for line in here}):
        others = [line for line in here if line["round"] != number]
        gains = _gains(others, temperature, concurrency)
        if not gains:
            continue
        this = [line for line in here if line["round"] == number]
        chosen = max(gains, key=lambda arm: gains[arm].median)
        if (spread := ratios(this, ADAPTIVE, chosen, temperature, concurrency)) is not None:
            found.append(spread.median)
    return _spread(found)


def _spread(found: Iterable[float]) -> Spread | None:
    values = list(found)
    if not values:
        return None
    return Spread(statistics.median(values), (max(values) - min(values)) / 2, min(values), len(values))


def _gains(lines: Sequence[dict[str, Any]], temperature: float, concurrency: int) -> dict[str, Spread]:
    """Every fixed K over no speculation, in the order of the lengths."""
    arms = order_arms({line["arm"] for line in lines if is_fixed(line["arm"])})
    found = {arm: ratios(lines, arm, NONE, temperature, concurrency) for arm in arms}
    return {arm: gain for arm, gain in found.items() if gain is not None}


def judge(lines: Sequence[dict[str, Any]], temperature: float) -> list[Verdict]:
    """A verdict for every concurrency at which ours, no speculation and a fixed K were measured.

    The best fixed K is chosen by the same figures that it is then judged by, which flatters it: that comparison errs
    against ours, `over_chosen` does not.
    """
    verdicts = []
    for concurrency in sorted({line["concurrency"] for line in lines if line["temperature"] == temperature}):

        def over(reference: str, concurrency: int = concurrency) -> Spread | None:
            return ratios(lines, ADAPTIVE, reference, temperature, concurrency)

        gains = _gains(lines, temperature, concurrency)
        over_none = over(NONE)
        if not gains or over_none is None:
            continue
        best = max(gains, key=lambda arm: gains[arm].median)
        every = {arm: spread for arm in gains if (spread := over(arm))}
        if best in every:
            chosen = over_chosen(lines, temperature, concurrency)
            control = ratios(lines, CONTROL, NONE, temperature, concurrency)
            verdicts.append(Verdict(concurrency, best, every[best], chosen, over_none, every, control))
    return verdicts


def aims(verdicts: Sequence[Verdict]) -> list[tuple[bool, str]]:
    """The three aims, each with whether it was met and by what."""
    if not verdicts:
        return [(False, "Ours was not measured against no speculation and a fixed K.")]
    of_best = min(verdicts, key=lambda v: v.over_best.median)
    of_none = min(verdicts, key=lambda v: v.over_none.median)
    better = [str(v.concurrency) for v in verdicts if v.is_strictly_better]
    return [
        (
            of_best.over_best.median >= MIN_OF_BEST,
            f"at every concurrency at least {MIN_OF_BEST:.0%} of the best fixed K: least is {of_best.over_best} at "
            f"concurrency {of_best.concurrency} (best there {of_best.best_fixed})"
            + of_best.beside_chance(of_best.over_best.median, MIN_OF_BEST),
        ),
        (
            of_none.over_none.median >= MIN_OF_NONE,
            f"never below {MIN_OF_NONE:.0%} of no speculation: least is {of_none.over_none} at concurrency "
            f"{of_none.concurrency}" + of_none.beside_chance(of_none.over_none.median, MIN_OF_NONE),
        ),
        (
            bool(better),
            "strictly better than every fixed K, in every block of two or more: "
            + (f"at concurrency {', '.join(better)}" if better else "nowhere"),
        ),
    ]


# ---------------------------------------------------------------- showing


def order_arms(arms: Iterable[str]) -> list[str]:
    """No speculation (and again), fixed K by length, others, ours."""

    def place(arm: str) -> tuple[int, int, str]:
        if is_fixed(arm):
            return 1, int(arm[2:]), arm
        return {NONE: 0, CONTROL: 0, ADAPTIVE: 3}.get(arm, 2), 0, arm

    return sorted(arms, key=place)


def make_table(lines: Sequence[dict[str, Any]], temperature: float) -> str:
    """Markdown: output tokens/s over no speculation by arm and concurrency, and what ours is over the best fixed K.

    "Best of the other rounds": in each round the K that was best in the others, as of one who measured before.
    """
    lines = [line for line in lines if line["temperature"] == temperature]
    arms = [arm for arm in order_arms({line["arm"] for line in lines}) if arm != NONE]
    verdicts = {verdict.concurrency: verdict for verdict in judge(lines, temperature)}
    head = [
        "concurrency",
        "none, tok/s",
        *(f"{arm} ÷ none" for arm in arms),
        "best fixed",
        "ours ÷ best",
        "ours ÷ best of the other rounds",
        "blocks",
    ]
    rows = [head, ["---"] * len(head)]
    for concurrency in sorted({line["concurrency"] for line in lines}):
        speeds = [
            line["output_tokens_per_second"]
            for line in lines
            if line["arm"] == NONE and line["concurrency"] == concurrency
        ]
        row = [str(concurrency), f"{statistics.median(speeds):.0f}" if speeds else "–"]
        row += [str(ratios(lines, arm, NONE, temperature, concurrency) or "–") for arm in arms]
        verdict = verdicts.get(concurrency)
        row += (
            [
                verdict.best_fixed,
                str(verdict.over_best),
                str(verdict.over_chosen or "–"),
                str(verdict.over_best.count),
            ]
            if verdict
            else ["–"] * 4
        )
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def write_plot(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Output tokens/s over no speculation by concurrency, one panel per temperature; the kind follows the suffix."""
    panels = {}
    for temperature in sorted({line["temperature"] for line in lines}):
        here = [line for line in lines if line["temperature"] == temperature]
        series: Series = {}
        for arm in order_arms({line["arm"] for line in here} - {NONE}):
            for concurrency in sorted({line["concurrency"] for line in here}):
                if (found := ratios(here, arm, NONE, temperature, concurrency)) is not None:
                    low, high = found.median - found.half_range, found.median + found.half_range
                    series.setdefault(arm, []).append((concurrency, found.median, low, high))
        panels[f"temperature {temperature:g}"] = series
    draw(path, panels)


def draw(path: Path, panels: Mapping[str, Series]) -> None:
    """Ratios over no speculation by concurrency, with their spreads; the kind of file follows the suffix.

    Args:
        panels: of each title, every arm's points (concurrency, ratio, low, high), ours last.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(6.5 * len(panels), 4.6), squeeze=False)
    for panel, (title, series) in zip(axes[0], panels.items(), strict=True):
        _draw_panel(panel, title, series)
    figure.tight_layout()
    temporary = path.with_name(f".{path.name}.part")
    figure.savefig(temporary, dpi=130, format=path.suffix.removeprefix("."))
    temporary.replace(path)
    plt.close(figure)


def _draw_panel(axes: Any, title: str, series: Series) -> None:
    from matplotlib import colormaps

    for index, (arm, points) in enumerate(series.items()):
        ours = arm == ADAPTIVE
        axes.errorbar(
            [concurrency for concurrency, *_ in points],
            [value for _, value, _, _ in points],
            # a resampled interval need not hold the value itself
            yerr=[
                [max(0.0, value - low) for _, value, low, _ in points],
                [max(0.0, high - value) for _, value, _, high in points],
            ],
            color="#d1495b" if ours else colormaps["viridis"](index / max(1, len(series) - 1)),
            linewidth=2.5 if ours else 1.2,
            marker="o",
            markersize=5 if ours else 3,
            capsize=2,
            label="ours, adaptive" if ours else arm,
        )
    axes.axhline(1.0, color="black", linewidth=0.8, label="no speculation")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="concurrency", ylabel="output tokens/s ÷ no speculation", title=title)
    axes.legend(frameon=False, fontsize=8)
