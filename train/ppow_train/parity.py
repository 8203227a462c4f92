"""Does vLLM accept what training thinks it accepts? The trap behind "good validation, useless in serving".

The same adapter, the same prompts, vLLM's own counters against two expectations (walk.py). One is that of training,
along the target's trajectories: other texts than vLLM's where they are sampled, so it is coarse. The other is along the
very texts that vLLM gave, with the adapter and without it: given a text only the acceptance of drafts is random, at
temperature 0 nothing is, so that an adapter that was not applied is seen. Left out: what a difference is due to.
"""

from __future__ import annotations

import dataclasses
import gc
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ppow_train.data import collate
from ppow_train.drafters import load_drafter
from ppow_train.pair import Pair
from ppow_train.rollout import WindowRunner
from ppow_train.serving_eval import ADAPTER, Engine, EngineOptions, model_length, ppow_spec
from ppow_train.types import Trajectories
from ppow_train.walk import ExpectedWalk, expected_walk, serving_tokens
from vllm_ppow.artifact import Adapter, AdapterConfig
from vllm_ppow.metrics import SpecDecodeCounts

FLOOR = 0.03  # of acceptance at a position: bf16 in vLLM against fp32 here, and what ends a text
# Of accepted tokens per draft, or of their number where there are more than one: the same, and what of it may look like
# a drafter without its adapter.
TOTAL_FLOOR, BARE_FLOOR = 0.03, 0.01
REDRAWN = 0.01  # share of drafts that rounding decides otherwise, as if drawn anew: two tokens tie in bf16
STANDARD_ERRORS = 4.0
LIMIT = 64  # prompts served


@dataclasses.dataclass(frozen=True)
class Parity:
    """Simulated and served acceptance of one adapter on the same prompts.

    Attributes:
        simulated: expected along the target's own trajectories.
        served: counted by vLLM.
        expected: expected along the texts that vLLM gave, with its covariance.
        bare: the same without the adapter.
    """

    simulated: ExpectedWalk
    served: SpecDecodeCounts
    expected: ExpectedWalk
    bare: ExpectedWalk

    @property
    def differences(self) -> list[float]:
        """Served minus simulated share of drafts accepted up to each position, [K]."""
        pairs = zip(self.served.acceptance_per_position, self.simulated.acceptance_per_position, strict=True)
        return [served - simulated for served, simulated in pairs]

    @property
    def tolerances(self) -> list[float]:
        """What chance and numerics allow at each position, [K]: FLOOR plus four standard errors of the difference.

        Both sides have texts of their own, as different as those of two prompts at most; served drafts are random, too.
        """
        drafts = max(1, self.served.num_drafts)
        return [
            FLOOR + STANDARD_ERRORS * math.sqrt(2 * texts + share * (1 - share) / drafts)
            for texts, share in zip(
                _variance_over_prompts(self.simulated), self.simulated.acceptance_per_position, strict=True
            )
        ]

    @property
    def tolerance(self) -> float:
        """What chance and numerics allow of accepted tokens per draft on the texts that vLLM gave."""
        return TOTAL_FLOOR * max(1.0, self.expected.mean_accepted) + self._chance

    @property
    def _chance(self) -> float:
        """Of single drafts on given texts, and of rounding, which is all there is at temperature 0."""
        shares = self.expected.acceptance_per_position
        square = sum((2 * position + 1) * share for position, share in enumerate(shares))  # E[k²] of a draft
        rounding = 2 * REDRAWN * (square - self.expected.mean_accepted**2) / max(1, self.served.num_drafts)
        return STANDARD_ERRORS * math.sqrt(self.expected.standard_error**2 + rounding)

    @property
    def problem(self) -> str | None:
        """What does not agree, the end of a sentence; None where all does."""
        if not self.served.num_drafts:
            return "vLLM drafted nothing"
        counted, expected, bare = (one.mean_accepted for one in (self.served, self.expected, self.bare))
        figures = f"{counted:.3f} accepted per draft, expected {expected:.3f} with it and {bare:.3f} without"
        allowed = BARE_FLOOR * max(1.0, expected) + self._chance
        if abs(counted - bare) < abs(counted - expected) and abs(counted - expected) > allowed:
            return f"vLLM serves it as if the adapter had not been applied ({figures})"
        if not abs(counted - expected) <= self.tolerance:
            return f"vLLM does not accept what is expected on its own texts ({figures})"
        if not all(abs(d) <= t for d, t in zip(self.differences, self.tolerances, strict=True)):
            return "vLLM does not accept what training simulates"
        return None

    @property
    def holds(self) -> bool:
        """Whether every position agrees within its tolerance, and all of them together on the texts that vLLM gave."""
        return self.problem is None

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "holds": self.holds,
            "problem": self.problem,
            "simulated_accepted_per_draft": self.simulated.mean_accepted,
            "served_accepted_per_draft": self.served.mean_accepted,
            "expected_on_served_texts": self.expected.mean_accepted,
            "expected_without_adapter": self.bare.mean_accepted,
            "tolerance": self.tolerance,
            "differences": self.differences,
            "tolerances": self.tolerances,
        }


def _variance_over_prompts(walk: ExpectedWalk) -> list[float]:
    """Of each position's share, [K], if the prompts were drawn anew: that of a ratio of sums, or of single drafts.

    The larger of the two, since few prompts may be alike by chance.
    """
    total = walk.num_drafts.sum()
    share = walk.num_accepted_tokens_per_pos.sum(0) / total
    residual = walk.num_accepted_tokens_per_pos - share * walk.num_drafts[:, None]
    count = len(residual)
    over_prompts = residual.square().sum(0) / total**2 * (count / max(1, count - 1))
    return torch.maximum(over_prompts, share * (1 - share) / total).tolist()


def merged_pair(pair: Pair, adapter: Adapter, drafter_directory: Path) -> Pair:
    """The pair with the adapter merged into a fresh copy of its drafter, by PEFT."""
    from peft import PeftModel

    device = str(pair.target.model.device)
    drafter = load_drafter(drafter_directory, device, target=pair.target.directory)
    drafter.model = PeftModel.from_pretrained(drafter.model, str(adapter.directory)).merge_and_unload()
    return dataclasses.replace(pair, drafter=drafter)


def _free_memory() -> None:
    """Give back what nobody uses: a trainer that is done lies in cycles with its callbacks, its optimizer with it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def check_parity(
    pair: Pair,
    adapter: Adapter,
    drafter_directory: Path,
    trajectories: Trajectories,
    *,
    engine_arguments: dict[str, Any] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Parity:
    """Simulate and serve an adapter on the same prompts at the temperature it was trained for.

    Args:
        pair: target and drafter, without the adapter.
        trajectories: held-out prompts with the target's continuations at that temperature; the first LIMIT are used,
            and as many output tokens as leave room for a whole draft.
        engine_arguments: further ones of vLLM's engine, by name.

    Returns:
        What was expected and what was counted; the pair's models are on the CPU afterwards.

    Raises:
        UserError: vLLM did not start.
    """
    config = adapter.config
    _free_memory()
    trajectories = trajectories.select(torch.arange(min(LIMIT, len(trajectories))))
    max_tokens = serving_tokens(trajectories, config.num_speculative_tokens)
    merged = merged_pair(pair, adapter, drafter_directory)
    device = pair.target.model.device
    simulated = _walk(merged, config, trajectories.to(device), max_tokens)
    move_pairs((pair, merged), "cpu")  # vLLM wants the GPU's memory to itself
    say("starting vLLM to count the same prompts")
    prompts = zip(trajectories.input_ids.tolist(), trajectories.prompt_lengths.tolist(), strict=True)
    token_ids = [ids[:length] for ids, length in prompts]
    served, given = _serve(pair, adapter, drafter_directory, token_ids, max_tokens, engine_arguments or {})
    move_pairs((pair, merged), device)
    given = given.to(device)
    expected = _walk(merged, config, given, max_tokens, with_covariance=True)
    bare = _walk(pair, config, given, max_tokens)
    move_pairs((pair, merged), "cpu")
    return Parity(simulated, served, expected, bare)


def _walk(
    pair: Pair, config: AdapterConfig, trajectories: Trajectories, max_tokens: int, **options: Any
) -> ExpectedWalk:
    """What serving the pair as an adapter is to be served is expected to count along given texts."""
    greedy = config.temperature == 0 or config.draft_sample_method == "greedy"
    runner = WindowRunner(
        pair.target,
        pair.drafter,
        trajectories,
        config.num_speculative_tokens,
        config.temperature or 1.0,
    )
    return expected_walk(runner, max_tokens, greedy, **options)


def move_pairs(pairs: Sequence[Pair], device: torch.device | str) -> None:
    """Move models, and give back the memory that they had."""
    for pair in pairs:
        pair.target.model.to(device)
        pair.drafter.model.to(device)
        pair.target.forget()
    _free_memory()


def _serve(
    pair: Pair,
    adapter: Adapter,
    drafter_directory: Path,
    prompts: list[list[int]],
    max_tokens: int,
    engine_arguments: dict[str, Any],
) -> tuple[SpecDecodeCounts, Trajectories]:
    """vLLM's counts, and its texts with what the target says next.

    The last draft of a text may reach past its end, by K − 1 tokens at most, and vLLM counts all of it. What would have
    stood there is drawn in a second pass, uncounted: from the same distribution, behind an end of text as well.
    """
    config = adapter.config
    length = config.num_speculative_tokens
    longest = model_length(prompts, max_tokens, length, pair.target.model.config)
    spec = ppow_spec(adapter, drafter_directory, length)
    options = EngineOptions(str(pair.target.directory), max_model_len=longest, more=engine_arguments)
    with Engine(ADAPTER, options, spec) as engine:
        engine.wait_until_ready()
        run = engine.run(prompts, max_tokens=max_tokens, temperature=config.temperature)
        texts = [[*prompt, *own] for prompt, own in zip(prompts, run.tokens, strict=True)]
        more: list[list[int]] = [[] for _ in texts]
        if length > 1:
            more = engine.run(
                texts, max_tokens=length - 1, temperature=config.temperature, ignore_eos=True
            ).tokens
    if run.counts is None:
        raise RuntimeError("vLLM counted no drafts")
    given = [[*own, *next_ones] for own, next_ones in zip(run.tokens, more, strict=True)]
    return run.counts, collate(prompts, given)
