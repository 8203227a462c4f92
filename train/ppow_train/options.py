"""Every default of training, once: unit and range in its help.

Plain Python, so that `ppow train --help` lists them without importing torch or TRL. Left out: what follows from them
(config.py); paths of models and data (the command's arguments).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# ruff: noqa: RUF009  (`_option` is `field` with its help; every default is immutable)


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class PPOWOptions:
    """What can be set in a config file or by a flag; TRL's own fields can stand in the file too."""

    # The winner of the README's table ("Which objective"), not of our hopes.
    objective: str = _option(
        "cst:tv", "what is minimised: ppow, exact, overlap, or cst:LOSS (cst:tv, cst:kl, …)"
    )
    num_speculative_tokens: int = _option(8, "K, tokens per window (>= 1)")
    trajectories_per_step: int = _option(
        16, "trajectories per update (>= 1); fewer than 16 made every objective worse"
    )
    windows_per_step: int = _option(
        128,
        "windows per update: even, a multiple of trajectories_per_step, and with ppow of that times num_generations",
    )
    serving_temperature: float = _option(1.0, "temperature the drafter is trained to serve (0 = greedy)")
    greedy_sampling_temperature: float = _option(
        0.5, "temperature of p and q in training when serving_temperature is 0 (> 0)"
    )
    draft_cost_ratio: float = _option(0.12, "time of one draft step / one target step, the paper's γ (>= 0)")
    proximity_weight: float = _option(0.2, "η of the proximity reward, in units of the speedup reward (>= 0)")
    proximity_quantile: float = _option(
        0.25, "share of windows with k = 0 that earn it, sets ε as they come (0..1)"
    )
    proximity_epsilon: float | None = _option(None, "fixed ε in nats instead of the quantile")
    uniform_share: float = _option(
        0.3, "share of ordinary windows once adaptive windowing is on (0..1; 1 = never adaptive)"
    )
    adaptive_after: float = _option(
        0.25, "share of the run with ordinary windows before adaptive windowing (0..1)"
    )
    position_decay: float = _option(0.7, "cst only: weight of position i is decay^i (0..1]")
    lora_rank: int = _option(32, "LoRA rank r (>= 1)")
    lora_alpha: int = _option(64, "LoRA α; deltas are scaled by α / r")
    lora_targets: list[str] | None = _option(
        None, "names of the linear layers to adapt (default: all of the drafter's layers)"
    )

    # TRL defaults that PPOW changes; each can still be set.
    learning_rate: float = _option(3e-3, "peak learning rate")
    max_steps: int = _option(100, "updates")
    num_generations: int = _option(8, "G, drafted windows per prefix (ppow)")
    beta: float = _option(0.05, "weight of the KL penalty towards the target (ppow)")
    warmup_steps: float = _option(0.1, "updates of warm-up, or their share of the run if below 1")
    eval_steps: int | None = _option(
        None, "updates between two evaluations on one half of the held-out prompts (>= 1; default: none)"
    )
    early_stop_patience: int | None = _option(
        None,
        "evaluations without a gain in accepted length after which training stops (>= 1; default: never)",
    )
    keep_best: bool = _option(
        True, "with eval_steps: write the adapter that accepted most on that half, not the last one"
    )
    push_to_hub: bool = _option(
        False, "upload the adapter to the Hugging Face Hub when it is finished and parity holds"
    )
    hub_model_id: str | None = _option(
        None, "repo to upload to (default: named as the output directory, in your own namespace)"
    )
    hub_private_repo: bool | None = _option(True, "make the repo private if it is new")
    logging_steps: float = _option(10, "updates between two log lines")
    save_strategy: str = _option("no", "when to save training state: no, steps")
    report_to: str | list[str] | None = _option("none", "where to log: none, tensorboard, wandb, …")
    gradient_checkpointing: bool = _option(
        False, "recompute activations to save memory; the drafter is small"
    )
    bf16: bool | None = _option(False, "autocast to bf16")
