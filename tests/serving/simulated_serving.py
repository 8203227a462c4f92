"""A serving engine in miniature: known costs, known acceptance, noisy clock; what a draft window policy earns on it."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from vllm_ppow.acceptance import AcceptanceEstimate
from vllm_ppow.step_cost import StepCost
from vllm_ppow.window import DraftWindow

Cost = Callable[[int, int, int], float]  # (batch, tokens verified per request, tokens drafted) -> seconds
CONTEXT = 200

NOISE = 0.1  # of one step's clock, log scale
OUTLIERS = 0.02  # share of steps that a pause makes five times as long


def accelerator(batch: int, verified: int, drafted: int) -> float:
    """Verification nearly free, draft steps cheap: long drafts pay."""
    drafting = 0.3e-3 + 0.8e-3 * drafted + 4e-6 * drafted * batch if drafted else 0.5e-3
    return 10e-3 + 20e-6 * batch * (1 + verified) + drafting


def processor(batch: int, verified: int, drafted: int) -> float:
    """Every verified token costs: with a large batch nothing pays. The first draft token is cheaper than the next."""
    return 6.5e-3 + 1e-3 * batch * (1 + verified) + 1.2e-3 * max(0, drafted - 1) + 0.2e-3 * drafted * batch


def falling(first: float, maximum: int = 8) -> list[float]:
    """Conditional acceptance that falls by position, as an EAGLE head's does."""
    return [max(0.0, first - 0.03 * i) for i in range(maximum)]


def fixed_rate(cost: Cost, acceptance: Sequence[float], batch: int, length: int) -> float:
    """Expected tokens per second of a fixed window."""
    tokens = survival = 1.0
    for a in acceptance[:length]:
        survival *= a
        tokens += survival
    return batch * tokens / cost(batch, length, length)


def best_fixed(cost: Cost, acceptance: Sequence[float], batch: int, maximum: int = 8) -> tuple[int, float]:
    """The best fixed draft length and its rate."""
    return max(
        ((k, fixed_rate(cost, acceptance, batch, k)) for k in range(maximum + 1)), key=lambda pair: pair[1]
    )


def new_window(maximum: int = 8, minimum: int = 0, **options: object) -> DraftWindow:
    """A policy that knows nothing yet, or as much as the options say (profile, prior)."""
    prior = options.get("prior", ())
    return DraftWindow(
        range(minimum, maximum + 1), AcceptanceEstimate(maximum, prior), StepCost(options.get("profile"))
    )


def drifting(seed: int, size: float = 0.15, steps: int = 200) -> Iterator[float]:
    """Pace of a shared machine, wandering around one: log-normal of that size, forgotten within so many steps."""
    rng, pace, keep = random.Random(seed), 0.0, 1 - 1 / steps
    while True:
        pace = keep * pace + size * (1 - keep**2) ** 0.5 * rng.gauss(0, 1)
        yield math.exp(pace)


def changing(seed: int, size: float = 0.07, steps: int = 24) -> Iterator[float]:
    """Pace of a machine on which other work comes and goes: log-normal of that size, another every so many steps."""
    rng = random.Random(seed)
    while True:
        pace = rng.lognormvariate(0, size)
        yield from (pace for _ in range(steps))


def stopping(seed: int, share: float = 0.1, times: float = 60.0) -> Iterator[float]:
    """Pace of a machine that stops within a share of the steps, for as long as so many of them take."""
    rng = random.Random(seed)
    while True:
        yield times if rng.random() < share else 1.0


def _noise(rng: random.Random) -> float:
    """What one step's clock is multiplied by."""
    return rng.lognormvariate(0, NOISE) * (5 if rng.random() < OUTLIERS else 1)


def serve(
    window: DraftWindow,
    cost: Cost,
    acceptance: Sequence[float],
    batch: int,
    steps: int,
    seed: int = 0,
    pace: Iterator[float] | None = None,
    first_uses: int = 0,
    pause: float = 0.0,
    prefilling: float = 0.0,
) -> tuple[float, list[int]]:
    """Serve that many steps.

    Args:
        pace: what each step's clock is multiplied by; the rate that is returned is without it.
        first_uses: so many steps of each draft length are half as long again, on the clock only.
        pause: seconds that a step takes besides whose draft is not as long as the one that it verifies.
        prefilling: share of steps that also prefill, of which the policy is told no time.

    Returns:
        Expected tokens per second by the known acceptance (sampling noise of the tokens themselves left out, of what
        the policy sees kept in), and the draft lengths chosen.
    """
    rng, rng_of_changes, rng_of_others = (random.Random(seed + i * 1_000_000) for i in range(3))
    verified, tokens, seconds, chosen = 0, 0.0, 0.0, []
    uses: Counter[int] = Counter()
    for _ in range(steps):
        now = 1.0 if pace is None else next(pace)
        prefills = rng_of_others.random() < prefilling
        drafted = window.choose(batch, batch * CONTEXT, not prefills)
        spent = cost(batch, verified, drafted) + (pause if chosen and drafted != verified else 0.0)
        seconds += spent
        survival = earned = 1.0
        for a in acceptance[:verified]:
            survival *= a
            earned += survival
        tokens += batch * earned
        for _ in range(batch):
            accepted = 0
            while accepted < verified and rng.random() < acceptance[accepted]:
                accepted += 1
            window.observe_draft(verified, accepted)
        steady = drafted == verified
        clock = spent * _noise(rng if steady else rng_of_changes) * now if chosen else 0.0
        told = bool(chosen) and not prefills
        if steady and told:
            uses[drafted] += 1
            clock *= 1.5 if uses[drafted] <= first_uses else 1.0
            window.observe_step(clock, batch, drafted, batch * CONTEXT)
        elif told:
            window.observe_change(clock, batch, max(drafted, verified))
        verified = drafted
        chosen.append(drafted)
    return tokens / seconds, chosen
