"""The comparison that the user cares about: no speculation, base drafter, adapter, on the same prompts in vLLM.

Base drafter and adapter draft K tokens at every step, so that acceptance compares like with like; the last arm is the
adapter as it is served by default, its draft length chosen at every step. Left out: engines (serving_eval.py), what
counts as the same output (identity.py), how it is shown (report.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ppow_train.identity import Comparison, compare
from ppow_train.serving_eval import (
    ADAPTER,
    ADAPTIVE,
    BASE,
    NONE,
    Engine,
    EngineOptions,
    Run,
    native_spec,
    ppow_spec,
)
from vllm_ppow.artifact import Adapter
from vllm_ppow.metrics import SpecDecodeCounts

ARMS = (NONE, BASE, ADAPTER, ADAPTIVE)

_Runs = dict[str, list[Run]]  # of every arm at one temperature, one run per round


@dataclasses.dataclass(frozen=True)
class Work:
    """What every arm does.

    Attributes:
        prompts: token ids.
        max_tokens: output tokens per prompt at most.
        temperatures: of sampling, one after the other.
        rounds: passes over the prompts at each temperature; an untimed one over as many prompts as run at the same
            time, the same for every arm, precedes the first.
    """

    prompts: Sequence[Sequence[int]]
    max_tokens: int
    temperatures: Sequence[float]
    rounds: int


@dataclasses.dataclass(frozen=True)
class ArmResult:
    """What one arm did at one temperature.

    Attributes:
        arm: its name.
        temperature: of sampling.
        counts: vLLM's counters, summed over the rounds; None without speculation.
        num_tokens: output tokens of one round.
        speed_ratios: output tokens per second over those of the no-speculation run of the same round, one per round.
        speed_over_base: the same over those of the base drafter's run.
        greedy: its greedy output of all rounds against no speculation; None when sampling.
    """

    arm: str
    temperature: float
    counts: SpecDecodeCounts | None
    num_tokens: int
    speed_ratios: list[float]
    speed_over_base: list[float]
    greedy: Comparison | None

    @property
    def changes_output(self) -> bool:
        """Whether greedy output differs from no speculation by more than the target's own ties."""
        return self.greedy is not None and not self.greedy.holds

    def as_json(self) -> dict[str, Any]:
        """Plain values, with the ratios that people read."""
        row: dict[str, Any] = {
            "arm": self.arm,
            "temperature": self.temperature,
            "output_tokens": self.num_tokens,
            "speed_ratio": _spread(self.speed_ratios),
            "speed_over_base": _spread(self.speed_over_base),
            "greedy_output_identical": None if self.greedy is None else self.greedy.is_exact,
            "greedy_output": None if self.greedy is None else dataclasses.asdict(self.greedy),
        }
        if self.counts is not None and self.counts.num_drafts:  # an adaptive window may have drafted nothing
            row |= {
                "acceptance_length": self.counts.acceptance_length,
                "accepted_per_draft": self.counts.mean_accepted,
                "acceptance_rate": self.counts.acceptance_rate,
                "acceptance_per_position": list(self.counts.acceptance_per_position),
            }
        return row | (dataclasses.asdict(self.counts) if self.counts is not None else {})


def _spread(ratios: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def run_benchmark(
    adapter: Adapter,
    base_drafter: Path,
    options: EngineOptions,
    work: Work,
    *,
    num_speculative_tokens: int,
    side_by_side: bool,
    arms: Sequence[str] = ARMS,
    allow_target_mismatch: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> list[ArmResult]:
    """Run every arm on every prompt, `rounds` times per temperature.

    Args:
        num_speculative_tokens: K; where the window is adaptive the longest.
        side_by_side: all engines are up and take turns, so that runs that are compared are neighbours in time; else
            one after the other, so that memory for one is enough.
        arms: of ARMS; the first two, which the others are compared with, are always among them.
        allow_target_mismatch: the target may be another than the one the adapter was trained for.
        say: told what is happening.
    """
    ours = functools.partial(
        ppow_spec, adapter, base_drafter, num_speculative_tokens, allow_target_mismatch=allow_target_mismatch
    )
    every = {
        NONE: None,
        BASE: native_spec(adapter, base_drafter, num_speculative_tokens),
        ADAPTER: ours(),
        ADAPTIVE: ours("auto"),  # as served by default
    }
    specs = {arm: every[arm] for arm in arms}
    options = dataclasses.replace(
        options, sampled_drafts=adapter.config.draft_sample_method == "probabilistic"
    )
    groups = [specs] if side_by_side else [{arm: spec} for arm, spec in specs.items()]
    runs: dict[float, _Runs] = {temperature: {} for temperature in work.temperatures}
    reference = None
    for group in groups:
        with _started(group, options, say) as engines:
            for temperature in work.temperatures:
                runs[temperature] |= _take_turns(engines, work, temperature, options.max_num_seqs, say)
            # Last: no arm is warmer than another when it is timed.
            if NONE in engines and 0 in work.temperatures:
                say("greedy output without speculation, and how clear each choice was")
                reference = engines[NONE].run(
                    work.prompts, max_tokens=work.max_tokens, temperature=0.0, with_gaps=True
                )
    return [_summarise(arm, t, runs[t], reference if t == 0 else None) for t in runs for arm in specs]


@contextlib.contextmanager
def _started(
    specs: Mapping[str, dict[str, Any] | None], options: EngineOptions, say: Callable[[str], None]
) -> Iterator[dict[str, Engine]]:
    """Engines that are up at the same time, by arm."""
    options = dataclasses.replace(options, neighbours=len(specs) - 1)
    on_gpu = torch.cuda.is_available()
    with contextlib.ExitStack() as stack:
        engines = {}
        for arm, spec in specs.items():
            say(f"starting vLLM: {arm}")
            engines[arm] = stack.enter_context(Engine(arm, options, spec))
            # vLLM measures the GPU's memory while it starts: nothing else may claim some meanwhile.
            if on_gpu:
                engines[arm].wait_until_ready()
        if not on_gpu:
            for engine in engines.values():
                engine.wait_until_ready()
        yield engines


def _take_turns(
    engines: Mapping[str, Engine],
    work: Work,
    temperature: float,
    concurrency: int,
    say: Callable[[str], None],
) -> _Runs:
    say(f"temperature {temperature:g}, warm-up")
    # To the end: every batch size and context that is timed, kernels chosen and compiled.
    for engine in engines.values():
        engine.run(work.prompts[:concurrency], max_tokens=work.max_tokens, temperature=temperature)
    runs: _Runs = {arm: [] for arm in engines}
    for round_number in range(work.rounds):
        for arm, engine in engines.items():
            say(f"temperature {temperature:g}, round {round_number + 1} of {work.rounds}: {arm}")
            runs[arm].append(engine.run(work.prompts, max_tokens=work.max_tokens, temperature=temperature))
    return runs


def _summarise(arm: str, temperature: float, runs: _Runs, reference: Run | None) -> ArmResult:
    own = runs[arm]
    counted = [run.counts for run in own if run.counts is not None]
    return ArmResult(
        arm=arm,
        temperature=temperature,
        counts=sum_counts(counted) if counted else None,
        num_tokens=own[0].num_tokens,
        speed_ratios=_ratios(own, runs[NONE]),
        speed_over_base=_ratios(own, runs[BASE]),
        greedy=None if reference is None else _compare_all(reference, own),
    )


def _compare_all(reference: Run, own: Sequence[Run]) -> Comparison:
    """Every round's output against the reference's, as one comparison."""
    assert reference.gaps is not None
    tokens = [ids for run in own for ids in run.tokens]
    limits = None if reference.ties_up_to is None else reference.ties_up_to * len(own)
    return compare(reference.tokens * len(own), reference.gaps * len(own), tokens, limits)


def _ratios(own: Sequence[Run], other: Sequence[Run]) -> list[float]:
    """Speed of each run over that of the other arm in the same round."""
    return [a.tokens_per_second / b.tokens_per_second for a, b in zip(own, other, strict=True)]


def sum_counts(counts: Sequence[SpecDecodeCounts]) -> SpecDecodeCounts:
    """Counts of several runs together."""
    return SpecDecodeCounts(
        sum(c.num_drafts for c in counts),
        sum(c.num_draft_tokens for c in counts),
        sum(c.num_accepted_tokens for c in counts),
        tuple(sum(column) for column in zip(*(c.num_accepted_tokens_per_pos for c in counts), strict=True)),
    )
