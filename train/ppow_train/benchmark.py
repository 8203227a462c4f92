"""The comparison that the user cares about: no speculation, base drafter, adapter, on the same prompts in vLLM.

Left out: engines (serving_eval.py), how it is shown (report.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ppow_train.serving_eval import ADAPTER, BASE, NONE, Engine, EngineOptions, Run, native_spec, ppow_spec
from vllm_ppow.artifact import Adapter
from vllm_ppow.metrics import SpecDecodeCounts


@dataclasses.dataclass(frozen=True)
class ArmResult:
    """What one arm did at one temperature.

    Attributes:
        arm: its name.
        temperature: of sampling.
        counts: vLLM's counters, summed over the rounds; None without speculation.
        num_tokens: output tokens of one round.
        speed_ratios: output tokens per second over those of the no-speculation run next to it, one per round.
        speed_over_base: the same over those of the base drafter's run.
        identical: greedy output equal to no speculation, token by token; None when sampling.
    """

    arm: str
    temperature: float
    counts: SpecDecodeCounts | None
    num_tokens: int
    speed_ratios: list[float]
    speed_over_base: list[float]
    identical: bool | None

    def as_json(self) -> dict[str, Any]:
        """Plain values, with the ratios that people read."""
        row: dict[str, Any] = {
            "arm": self.arm,
            "temperature": self.temperature,
            "output_tokens": self.num_tokens,
            "speed_ratio": _spread(self.speed_ratios),
            "speed_over_base": _spread(self.speed_over_base),
            "greedy_output_identical": self.identical,
        }
        if self.counts is not None:
            row |= {
                "acceptance_length": self.counts.acceptance_length,
                "accepted_per_draft": self.counts.mean_accepted,
                "acceptance_rate": self.counts.acceptance_rate,
                "acceptance_per_position": list(self.counts.acceptance_per_position),
                **dataclasses.asdict(self.counts),
            }
        return row


def _spread(ratios: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def run_benchmark(
    adapter: Adapter,
    base_drafter: Path,
    prompts: Sequence[Sequence[int]],
    options: EngineOptions,
    *,
    num_speculative_tokens: int,
    max_tokens: int,
    temperatures: Sequence[float],
    rounds: int,
    say: Callable[[str], None] = lambda text: None,
) -> list[ArmResult]:
    """Run every arm on every prompt, in turn, `rounds` times per temperature.

    Args:
        prompts: token ids.
        rounds: passes over the prompts; the first pass of each arm at each temperature is preceded by a short warm-up.
        say: told what is happening.
    """
    specs = {
        NONE: None,
        BASE: native_spec(adapter, base_drafter, num_speculative_tokens),
        ADAPTER: ppow_spec(adapter, base_drafter, num_speculative_tokens),
    }
    with contextlib.ExitStack() as stack:
        engines = {}
        for arm, spec in specs.items():
            say(f"starting vLLM: {arm}")
            engines[arm] = stack.enter_context(Engine(arm, options, spec))
            engines[arm].wait_until_ready()
        results = []
        for temperature in temperatures:
            runs = _take_turns(engines, prompts, max_tokens, temperature, rounds, say)
            results += [_summarise(arm, temperature, runs) for arm in specs]
    return results


def _take_turns(
    engines: dict[str, Engine],
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    temperature: float,
    rounds: int,
    say: Callable[[str], None],
) -> dict[str, list[Run]]:
    for engine in engines.values():
        engine.run(prompts[:4], max_tokens=16, temperature=temperature)
    runs: dict[str, list[Run]] = {arm: [] for arm in engines}
    for round_number in range(rounds):
        for arm, engine in engines.items():
            say(f"temperature {temperature:g}, round {round_number + 1} of {rounds}: {arm}")
            runs[arm].append(engine.run(prompts, max_tokens=max_tokens, temperature=temperature))
    return runs


def _summarise(arm: str, temperature: float, runs: dict[str, list[Run]]) -> ArmResult:
    own, plain = runs[arm], runs[NONE]
    counted = [run.counts for run in own if run.counts is not None]
    return ArmResult(
        arm=arm,
        temperature=temperature,
        counts=sum_counts(counted) if counted else None,
        num_tokens=own[0].num_tokens,
        speed_ratios=_ratios(own, plain),
        speed_over_base=_ratios(own, runs[BASE]),
        identical=all(run.tokens == plain[0].tokens for run in own) if temperature == 0 else None,
    )


def _ratios(own: Sequence[Run], other: Sequence[Run]) -> list[float]:
    """Speed of each run over its neighbour's in the same round."""
    return [a.tokens_per_second / b.tokens_per_second for a, b in zip(own, other, strict=True)]


def sum_counts(counts: Sequence[SpecDecodeCounts]) -> SpecDecodeCounts:
    """Counts of several runs together."""
    return SpecDecodeCounts(
        sum(c.num_drafts for c in counts),
        sum(c.num_draft_tokens for c in counts),
        sum(c.num_accepted_tokens for c in counts),
        tuple(sum(column) for column in zip(*(c.num_accepted_tokens_per_pos for c in counts), strict=True)),
    )
