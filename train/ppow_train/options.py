"""Every default of training, once: unit and range in its help.

Plain Python, so that `ppow train --help` lists them without importing torch or TRL. Left out: what follows from them
(config.py); paths of models and data (the command's arguments).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

# ruff: noqa: RUF009  (`_option` is `field` with its help; every default is immutable)


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


def spelled(choice: str | bool) -> Any:
    """A choice as it is written: YAML reads `true` and `false` as no text."""
    return str(choice).lower() if isinstance(choice, bool) else choice


@dataclass
class PPOWOptions:
    """What can be set in a config file or by a flag; TRL's own fields can stand in the file too."""

    # examples/benchmarks/objectives.md: clear of `cst:tv` in two cells of eight, 0.2 points below it in one; with
    # eight continuations of every prompt clear of it in three of four.
    objective: str = _option(
        "cst:jsd",
        "what is minimised: ppow, exact, overlap, drafts, cst:LOSS (cst:jsd, cst:tv, …), or a weighted sum of these "
        "without ppow, in quotes: 'overlap + 4 * cst:tv'",
    )
    num_speculative_tokens: int = _option(8, "K, tokens per window (>= 1)")
    trajectories_per_step: int = _option(
        16, "trajectories per update (>= 1); fewer than 16 made every objective worse"
    )
    windows_per_step: int = _option(
        128,
        "windows per update: even, a multiple of trajectories_per_step, and with ppow of that times num_generations",
    )
    windows_per_forward: int | None = _option(
        None,
        "windows in one forward and backward of a process at most (>= 1; default: as many as fit in memory, which a "
        "resumed run keeps); memory, not the result",
    )
    continuations: int = _option(
        1,
        "trajectories of each training prompt (>= 1), sampled anew; with more of them longer runs keep gaining. For "
        "serving_temperature 0 the first is greedy, the others have greedy_sampling_temperature",
    )
    serving_temperature: float = _option(1.0, "temperature the drafter is trained to serve (0 = greedy)")
    greedy_sampling_temperature: float = _option(
        0.7, "temperature of p and q in training when serving_temperature is 0 (> 0)"
    )
    draft_sample_method: Literal["probabilistic", "greedy"] = _option(
        "probabilistic",
        "how vLLM will draw drafts at a temperature above 0; exact, overlap and drafts take the form for it",
    )
    greedy_target: Literal["soft", "hard"] = _option(
        "soft",
        "exact, overlap and drafts at serving_temperature 0: p and q at greedy_sampling_temperature (soft), or the "
        "target's own token against q at greedy_sharpness_temperature (hard)",
    )
    greedy_sharpness_temperature: float = _option(
        0.5,
        "exact, overlap and drafts with greedy drafts: temperature of q where it stands for its argmax (> 0; lower is "
        "closer to it, with gradients at fewer tokens)",
    )
    draft_cost_ratio: float = _option(0.12, "time of one draft step / one target step, the paper's γ (>= 0)")
    ppow_credit: Literal["published", "acceptance"] = _option(
        "published",
        "ppow: one standardised advantage for all tokens of a window (published), or each token's own, whose gradient "
        "is that of the expected speedup reward, proximity left out (acceptance)",
    )
    cost_reading: Literal["accepted", "drafted"] = _option(
        "accepted",
        "ppow, exact and overlap: draft tokens that the speedup reward charges for, the k accepted ones as published, "
        "k / (kγ + 1), or all K as serving pays, k / (Kγ + 1)",
    )
    survival_smoothing: float = _option(
        0.5, "drafts: share s of certainty mixed into every acceptance, a -> (1 - s) a + s (0..1, below 1)"
    )
    proximity_weight: float = _option(0.2, "η of the proximity reward, in units of the speedup reward (>= 0)")
    proximity_quantile: float = _option(
        0.25, "share of windows with k = 0 that earn it, sets ε as they come (0..1)"
    )
    proximity_epsilon: float | None = _option(None, "fixed ε in nats instead of the quantile")
    adaptive_windows: Literal["auto", "true", "false"] = _option(
        "auto", "draw windows by criticality: true, false, or auto (only for ppow, as published)"
    )
    criticality: Literal["divergence", "lost_tokens"] = _option(
        "divergence",
        "what makes a window critical: divergence (the paper's, nats) or lost_tokens (K − expected accepted, ours)",
    )
    criticality_refresh: int = _option(
        1, "updates after which the criticality of a trajectory is computed anew (>= 1; 1 = always fresh)"
    )
    uniform_share: float = _option(
        0.3, "share of ordinary windows once adaptive windowing is on (0..1; 1 = never adaptive)"
    )
    adaptive_after: float = _option(
        0.25, "share of the run with ordinary windows before adaptive windowing (0..1)"
    )
    position_weights: Literal["decay", "dpace"] = _option(
        "decay",
        "cst only: weights of positions in the window, fixed (decay) or, by D-PACE, from the drafter's confidence in "
        "each window (dpace; cst:ce and cst:tv)",
    )
    position_decay: float = _option(0.9, "cst only: weight of position i is decay^i (0..1]")
    dpace_alpha: float = _option(0.5, "position_weights dpace: smoothing α of the confidence (0..1]")
    target_cache: Literal["auto", "none", "memory", "disk"] = _option(
        "auto",
        "where the target's states along the training trajectories are kept, not computed at every update: none, "
        "memory, disk (under --cache), or auto (memory if they take 2 GiB at most; ppow, which needs more: none)",
    )
    # objectives.md of the benchmarks ("How large an adapter"): with text enough 128 is clearly above 32, in short
    # runs it cannot be told from it.
    lora_rank: int = _option(
        128, "LoRA rank r (>= 1); costs time and memory in training, none in serving, where it is merged"
    )
    lora_alpha: int | None = _option(
        None, "LoRA α (>= 1; default: twice the rank); deltas are scaled by α / r"
    )
    lora_targets: list[str] | None = _option(
        None,
        "names of the linear layers to adapt, as q_proj,v_proj (default: all but the output layer; that of an EAGLE-3 "
        "head, lm_head, can be named as well)",
    )

    # TRL defaults that PPOW changes; each can still be set.
    learning_rate: float = _option(3e-3, "peak learning rate (> 0)")
    max_steps: int = _option(100, "updates")
    num_generations: int = _option(8, "G, drafted windows per prefix (ppow)")
    beta: float = _option(0.05, "weight of the KL penalty towards the target (ppow; >= 0)")
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
    logging_steps: float = _option(10, "updates between two log lines, or their share of the run if below 1")
    save_strategy: str = _option("steps", "when to save training state: no, steps")
    save_steps: float = _option(
        100, "updates between two savings of training state, or their share of the run if below 1"
    )
    save_total_limit: int | None = _option(2, "newest training states to keep (>= 2)")
    report_to: str | list[str] | None = _option(
        "none", "where to log: none, all, or some of tensorboard, wandb, …"
    )
    bf16: bool | None = _option(False, "autocast of the drafter to bf16; its weights stay float32")
    target_dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option(
        "auto",
        "numbers of the frozen target: auto is the checkpoint's own on a GPU, as vLLM serves it, float32 on a CPU",
    )

    @property
    def resolved_lora_alpha(self) -> int:
        """α, told or twice the rank: a rank that is changed alone leaves the scale of deltas as it is."""
        return 2 * self.lora_rank if self.lora_alpha is None else self.lora_alpha

    @property
    def training_temperature(self) -> float:
        """Temperature of p and q in training."""
        return self.serving_temperature or self.greedy_sampling_temperature

    @property
    def wants_adaptive_windows(self) -> bool:
        """Whether windows are to be drawn by criticality at all."""
        if self.adaptive_windows == "auto":
            return self.objective == "ppow"
        return self.adaptive_windows == "true"

    @property
    def adaptive_from(self) -> float:
        """First update with adaptive windows, inf if there is none."""
        is_on = self.wants_adaptive_windows and self.uniform_share < 1
        return self.adaptive_after * self.max_steps if is_on else math.inf

    @property
    def draws_by_criticality(self) -> bool:
        """Whether the run comes to an update with adaptive windows."""
        return self.adaptive_from <= self.max_steps - 1

    @property
    def acceptance_form(self) -> Literal["trajectory", "greedy", "sampled"]:
        """Form of acceptance in exact, overlap and drafts that fits how drafts are served.

        Against the target's own token (`trajectory`), of a greedy draft (`greedy`) or of a sampled one (`sampled`).
        """
        if self.serving_temperature == 0 and self.greedy_target == "hard":
            return "trajectory"
        return (
            "greedy" if self.serving_temperature > 0 and self.draft_sample_method == "greedy" else "sampled"
        )

    @property
    def needs_argmax(self) -> bool:
        """Whether the target's own token at temperature 0 must be looked up: some trajectories are sampled.

        Otherwise all of them are its greedy ones, whose tokens are it.
        """
        asks = self.objective == "ppow" or self.acceptance_form == "trajectory"
        return self.serving_temperature == 0 and self.continuations > 1 and asks

    @property
    def num_charged_tokens(self) -> int | None:
        """Draft tokens that every window is charged for; None where it is the accepted ones."""
        return self.num_speculative_tokens if self.cost_reading == "drafted" else None


# What an option of few values can be.
CHOICES: dict[str, tuple[str, ...]] = {
    name: get_args(kind) for name, kind in get_type_hints(PPOWOptions).items() if get_origin(kind) is Literal
}
