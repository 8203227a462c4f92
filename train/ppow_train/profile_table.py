"""What a cost profile says, for people and as JSON: the draft length that pays most at every batch size.

Left out: measuring (profiling.py).
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from vllm_ppow.other_lengths import accepted_by_length
from vllm_ppow.speedup import expected_speedup

if TYPE_CHECKING:
    from rich.console import Console

    from ppow_train.profile_engine import Measured
    from vllm_ppow.cost_profile import CostProfile

_CAPTION = (
    "draft/target: time of one draft step over one target step · K=…: expected speedup of drafts of K tokens "
    "over steps without · best K: of all lengths, measured or between"
)

_QUIET = 0.1  # spread above which figures of neighbouring points cannot be told apart


def speedups(profile: CostProfile, batch: int) -> list[float]:
    """Expected speedup of drafts of K = 0, 1, …, num_speculative_tokens tokens, over none, by `expected_speedup`.

    "None" is a step of the same engine that drafts nothing, which still keeps the drafter's KV cache.
    """
    acceptance = profile.acceptance_per_position
    accepted = accepted_by_length(acceptance, len(acceptance))
    return [1.0] + [
        expected_speedup(accepted[length], length, profile.token_cost_ratio(batch, length))
        for length in range(1, len(accepted))
    ]


def as_json(measured: Measured) -> dict[str, Any]:
    """The profile, its spread, and what follows from it for every batch size."""
    profile = measured.profile
    rows = []
    for batch in profile.batch_sizes:
        gains = speedups(profile, batch)
        rows.append(
            {
                "batch_size": batch,
                "draft_cost_ratio": profile.draft_cost_ratio(batch),
                "expected_speedup": gains,
                "best_num_speculative_tokens": gains.index(max(gains)),
            }
        )
    return {
        "profile": dataclasses.asdict(profile),
        "step_spread": measured.spread,
        "worst_step_spread": measured.worst_spread,
        "most_moved": measured.moved,
        "by_batch_size": rows,
    }


def print_table(measured: Measured, console: Console) -> None:
    """One row per batch size, one column per measured draft length."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    profile = measured.profile
    lengths = [length for length in profile.draft_lengths if length]
    table = Table(title=f"Cost of a draft on {profile.device}", caption=_CAPTION, box=SIMPLE_HEAD)
    for column in ("batch", "draft/target", *(f"K={length}" for length in lengths), "best K"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in as_json(measured)["by_batch_size"]:
        gains = row["expected_speedup"]
        shown = [f"{gains[length]:.2f}" if length < len(gains) else "–" for length in lengths]
        best = row["best_num_speculative_tokens"] if len(gains) > 1 else "–"
        table.add_row(str(row["batch_size"]), f"{row['draft_cost_ratio']:.3f}", *shown, str(best))
    console.print(table)
    accepted = " ".join(f"{share:.3f}" for share in profile.acceptance_per_position)
    console.print(
        f"Accepted up to position 1, 2, …: {accepted or 'nothing was drafted'} ({profile.num_drafts:,} drafts)",
        highlight=False,
    )
    console.print(
        f"Spread of a step (half the range between quartiles): {measured.spread:.1%}, "
        f"at worst {measured.worst_spread:.1%}; figures moved by up to {measured.moved:.1%} to take noise out of them",
        highlight=False,
    )
    if measured.spread > _QUIET:
        console.print(
            "Steps varied a lot: measure again when nothing else runs on the machine.", style="yellow"
        )
