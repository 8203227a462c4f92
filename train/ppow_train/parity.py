"""Does vLLM accept what training thinks it accepts? The trap behind "good validation, useless in serving".

The same adapter, the same prompts: acceptance by position as simulated along the target's trajectories, against vLLM's
own counters. Left out: what a difference is due to.
"""

from __future__ import annotations

import dataclasses
import gc
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ppow_train.drafters import load_drafter
from ppow_train.pair import Pair
from ppow_train.rollout import WindowRunner
from ppow_train.serving_eval import ADAPTER, Engine, EngineOptions, ppow_spec
from ppow_train.types import Trajectories
from ppow_train.walk import serving_tokens, simulate_walk
from vllm_ppow.artifact import Adapter
from vllm_ppow.metrics import SpecDecodeCounts

FLOOR = 0.03  # of acceptance at a position: bf16 in vLLM against fp32 here, and what ends a text
STANDARD_ERRORS = 4.0
LIMIT = 64  # prompts served


@dataclasses.dataclass(frozen=True)
class Parity:
    """Simulated and served acceptance of one adapter on the same prompts."""

    simulated: SpecDecodeCounts
    served: SpecDecodeCounts

    @property
    def differences(self) -> list[float]:
        """Served minus simulated share of drafts accepted up to each position, [K]."""
        pairs = zip(self.served.acceptance_per_position, self.simulated.acceptance_per_position, strict=True)
        return [served - simulated for served, simulated in pairs]

    @property
    def tolerances(self) -> list[float]:
        """What chance and numerics allow at each position, [K]: FLOOR plus four standard errors of the difference."""
        return [
            FLOOR
            + STANDARD_ERRORS
            * math.sqrt(_variance(served, self.served) + _variance(simulated, self.simulated))
            for served, simulated in zip(
                self.served.acceptance_per_position, self.simulated.acceptance_per_position, strict=True
            )
        ]

    @property
    def holds(self) -> bool:
        """Whether every position agrees within its tolerance."""
        return all(abs(d) <= t for d, t in zip(self.differences, self.tolerances, strict=True))

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "holds": self.holds,
            "simulated_accepted_per_draft": self.simulated.mean_accepted,
            "served_accepted_per_draft": self.served.mean_accepted,
            "differences": self.differences,
            "tolerances": self.tolerances,
        }


def _variance(share: float, counts: SpecDecodeCounts) -> float:
    return share * (1.0 - share) / counts.num_drafts


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
    say: Callable[[str], None] = lambda text: None,
) -> Parity:
    """Simulate and serve an adapter on the same prompts at the temperature it was trained for.

    Args:
        pair: target and drafter, without the adapter.
        trajectories: held-out prompts with the target's continuations at that temperature; the first LIMIT are used,
            and as many output tokens as leave room for a whole draft.

    Returns:
        The two counts; the pair's models are on the CPU afterwards.
    """
    config = adapter.config
    _free_memory()
    trajectories = trajectories.select(torch.arange(min(LIMIT, len(trajectories))))
    max_tokens = serving_tokens(trajectories, config.num_speculative_tokens)
    greedy = config.temperature == 0 or config.draft_sample_method == "greedy"
    merged = merged_pair(pair, adapter, drafter_directory)
    runner = WindowRunner(
        pair.target,
        merged.drafter,
        trajectories.to(pair.target.model.device),
        config.num_speculative_tokens,
        config.temperature or 1.0,
    )
    simulated = simulate_walk(runner, max_tokens, greedy)
    for model in (pair.target.model, pair.drafter.model, merged.drafter.model):
        model.to("cpu")  # vLLM wants the GPU's memory to itself
    pair.target.forget()
    _free_memory()
    say("starting vLLM to count the same prompts")
    prompts = zip(trajectories.input_ids.tolist(), trajectories.prompt_lengths.tolist(), strict=True)
    token_ids = [ids[:length] for ids, length in prompts]
    # Room to spare: with less than two drafts of it before max_model_len, vLLM's acceptance was seen to fall.
    longest = max(map(len, token_ids)) + max_tokens + 4 * (config.num_speculative_tokens + 1)
    spec = ppow_spec(adapter, drafter_directory, config.num_speculative_tokens)
    with Engine(ADAPTER, EngineOptions(str(pair.target.directory), max_model_len=longest), spec) as engine:
        engine.wait_until_ready()
        served = engine.run(token_ids, max_tokens=max_tokens, temperature=config.temperature).counts
    if served is None:
        raise RuntimeError("vLLM counted no drafts")
    return Parity(simulated, served)
