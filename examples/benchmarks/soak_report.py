"""What a soak found, and whether it may pass: counts, memory, and one sentence per violation. Left out: the load."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Sequence
from typing import Any

WARM_UP_SHARE = 0.25  # of a soak's time; until then caches and allocators fill
MIN_COMPARED_SHARE = 0.5  # of the prompts, that the target itself continues alike alone and in company
_MOST_SHOWN = 5
_MOST_SAMPLES = 60  # of a process in the report


@dataclasses.dataclass
class Findings:
    """Counts of one soak; divided and judged only at the end.

    Attributes:
        completed: requests that ran to their end, by kind ("greedy", "sampled").
        aborted: requests whose connection was closed on purpose while they ran.
        compared: greedy outputs compared token by token with those of no speculation.
        different: prompts whose output differed, by index, and when (seconds).
        errors: requests that failed, and anything else that went wrong, in words.
        swaps: hot swaps that were done.
        unstable_prompts: prompts whose greedy output without speculation already depends on what runs beside them.
        num_prompts: prompts there are.
        preemptions: as vLLM counts them.
        drafts: verified drafts, as vLLM counts them.
        layers: what decided draft lengths -> how often it was found to.
        memory: process name -> (seconds, MiB resident) samples.
    """

    completed: dict[str, int] = dataclasses.field(default_factory=dict)
    aborted: int = 0
    compared: int = 0
    different: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    errors: list[str] = dataclasses.field(default_factory=list)
    swaps: int = 0
    unstable_prompts: list[int] = dataclasses.field(default_factory=list)
    num_prompts: int = 0
    preemptions: int = 0
    drafts: int = 0
    layers: dict[str, int] = dataclasses.field(default_factory=dict)
    memory: dict[str, list[tuple[float, float]]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Demands:
    """What must have happened, for the soak to have tested what it is for.

    Attributes:
        swaps: hot swaps at least; 0 where they are off.
        preemptions: at least.
        aborts: at least.
        max_growth_mib: memory that a process may gain after warming up, by the slope over the whole soak.
    """

    swaps: int
    preemptions: int = 1
    aborts: int = 1
    max_growth_mib: float = 16.0


def growth_mib(samples: Sequence[tuple[float, float]]) -> float:
    """Memory gained after warming up: median slope between samples (Theil and Sen) × the time they span, in MiB.

    The median of all slopes is not moved by single peaks, which a batch of long prompts makes; nan without three
    samples.
    """
    if not samples:
        return float("nan")
    begin = samples[0][0] + WARM_UP_SHARE * (samples[-1][0] - samples[0][0])
    warm = [sample for sample in samples if sample[0] >= begin]
    step = max(1, len(warm) // 400)  # slopes of all pairs: thousands of samples would take minutes
    warm = warm[::step]
    if len(warm) < 3:
        return float("nan")
    slopes = [(m2 - m1) / (t2 - t1) for (t1, m1), (t2, m2) in itertools.combinations(warm, 2) if t2 > t1]
    return statistics.median(slopes) * (warm[-1][0] - warm[0][0])


def violations(found: Findings, demands: Demands) -> list[str]:
    """One sentence for each thing that is wrong; empty if the soak passes."""
    wrong = [f"{len(found.errors)} errors, the first: {found.errors[0]}"] if found.errors else []
    if found.different:
        shown = ", ".join(
            f"prompt {prompt} after {when:.0f} s" for prompt, when in found.different[:_MOST_SHOWN]
        )
        wrong.append(
            f"{len(found.different)} of {found.compared} greedy outputs differ from no speculation: {shown}."
        )
    stable = found.num_prompts - len(found.unstable_prompts)
    if stable < MIN_COMPARED_SHARE * found.num_prompts:
        wrong.append(
            f"Only {stable} of {found.num_prompts} prompts can be compared: the output of the others depends on the "
            "batch without speculation, too; use --dtype float32."
        )
    least = {
        "greedy outputs compared": (found.compared, 1),
        "sampled requests completed": (found.completed.get("sampled", 0), 1),
        "requests aborted": (found.aborted, demands.aborts),
        "verified drafts": (found.drafts, 1),
        "preemptions (give fewer --kv-blocks)": (found.preemptions, demands.preemptions),
        "hot swaps": (found.swaps, demands.swaps),
    }
    wrong += [
        f"Too few {name}: {count}, at least {needed} wanted."
        for name, (count, needed) in least.items()
        if count < needed
    ]
    for process, samples in found.memory.items():
        gained = growth_mib(samples)
        if not gained <= demands.max_growth_mib:
            wrong.append(
                f"Memory of {process} grew by {gained:.0f} MiB after warming up, at most {demands.max_growth_mib:.0f} "
                "allowed."
            )
    return wrong


def as_json(found: Findings, demands: Demands, settings: dict[str, Any]) -> dict[str, Any]:
    """The whole report; memory as first, largest and last MiB, its growth, and a thinned [seconds, MiB] series."""
    memory = {
        process: {
            "samples": len(samples),
            "first_mib": samples[0][1],
            "largest_mib": max(mib for _, mib in samples),
            "last_mib": samples[-1][1],
            "growth_after_warm_up_mib": growth_mib(samples),
            "series": [
                [round(second), round(mib, 1)]
                for second, mib in samples[:: -(-len(samples) // _MOST_SAMPLES)]
            ],
        }
        for process, samples in found.memory.items()
        if samples
    }
    counts = {**dataclasses.asdict(found), "memory": memory}
    wrong = violations(found, demands)
    return {
        "passed": not wrong,
        "violations": wrong,
        **counts,
        "demands": dataclasses.asdict(demands),
        "settings": settings,
    }
