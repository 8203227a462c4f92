"""Every default of training, once: unit and range in its help. Unknown keys are refused.

`PPOWConfig` extends TRL's GRPOConfig; what PPOW decides about TRL's own fields is set in `__post_init__`, next to the
reason. Left out: paths of models and data (the command's arguments).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ppow_train.compat import silence_version_warning
from ppow_train.errors import UserError
from ppow_train.objectives import parse_objective

silence_version_warning()
from trl import GRPOConfig  # noqa: E402


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class PPOWConfig(GRPOConfig):
    """Configuration of one training run."""

    objective: str = _option(
        "overlap", "what is minimised: ppow, exact, overlap, or cst:LOSS (cst:tv, cst:kl, …)"
    )
    num_speculative_tokens: int = _option(8, "K, tokens per window (>= 1)")
    trajectories_per_step: int = _option(
        16, "trajectories per update (>= 1); fewer than 16 made every objective worse"
    )
    windows_per_step: int = _option(
        128,
        "windows per update; a multiple of trajectories_per_step, and with ppow of that times num_generations",
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
    logging_steps: float = _option(10, "updates between two log lines")
    save_strategy: str = _option("no", "when to save training state: no, steps")
    report_to: str | list[str] | None = _option("none", "where to log: none, tensorboard, wandb, …")
    gradient_checkpointing: bool = _option(
        False, "recompute activations to save memory; the drafter is small"
    )
    bf16: bool | None = _option(False, "autocast to bf16")

    def __post_init__(self) -> None:
        self.objective = parse_objective(self.objective)
        self._check()
        self.max_completion_length = self.num_speculative_tokens  # a completion is one window
        self.temperature = self.training_temperature
        self.loss_type = "dr_grpo"  # windows all have K tokens: no length normalisation
        if not self.is_rollout:
            self.num_generations = 2  # TRL asks for groups; objectives on target paths have none
            self.beta = 0.0
        rows = self.rows_per_step
        self.per_device_train_batch_size = rows
        self.gradient_accumulation_steps = 1
        self.steps_per_generation = 1  # one update per batch: old and current policy agree
        self.generation_batch_size = None
        self.shuffle_dataset = (
            False  # rows of one trajectory stay together; order is drawn when they are built
        )
        self.remove_unused_columns = False
        self.disable_tqdm = True
        super().__post_init__()

    @property
    def is_rollout(self) -> bool:
        """Whether the objective drafts windows (ppow) or works on the target's own paths."""
        return self.objective == "ppow"

    @property
    def training_temperature(self) -> float:
        """Temperature of p and q in training."""
        return self.serving_temperature or self.greedy_sampling_temperature

    @property
    def rows_per_step(self) -> int:
        """Rows that TRL sees per update: one per window."""
        return self.windows_per_step

    @property
    def windows_per_trajectory(self) -> int:
        """Distinct window starts per trajectory and update."""
        groups = self.num_generations if self.is_rollout else 1
        return self.windows_per_step // (self.trajectories_per_step * groups)

    def _check(self) -> None:
        _require(
            self.num_speculative_tokens >= 1, "num_speculative_tokens", ">= 1", self.num_speculative_tokens
        )
        _require(self.serving_temperature >= 0, "serving_temperature", ">= 0", self.serving_temperature)
        _require(
            self.greedy_sampling_temperature > 0,
            "greedy_sampling_temperature",
            "> 0",
            self.greedy_sampling_temperature,
        )
        _require(self.draft_cost_ratio >= 0, "draft_cost_ratio", ">= 0", self.draft_cost_ratio)
        _require(0 <= self.uniform_share <= 1, "uniform_share", "in 0..1", self.uniform_share)
        _require(0 <= self.adaptive_after <= 1, "adaptive_after", "in 0..1", self.adaptive_after)
        _require(0 < self.proximity_quantile < 1, "proximity_quantile", "in 0..1", self.proximity_quantile)
        _require(0 < self.position_decay <= 1, "position_decay", "in (0, 1]", self.position_decay)
        _require(self.max_steps >= 1, "max_steps", ">= 1", self.max_steps)
        groups = self.num_generations if self.is_rollout else 1
        unit = self.trajectories_per_step * groups
        if self.windows_per_step < unit or self.windows_per_step % unit:
            raise UserError(
                f"windows_per_step must be a multiple of {unit} (trajectories_per_step {self.trajectories_per_step}"
                + (f" × num_generations {groups}" if groups > 1 else "")
                + f"), got {self.windows_per_step}."
            )


def _require(holds: bool, name: str, wanted: str, value: Any) -> None:
    if not holds:
        raise UserError(f"{name} must be {wanted}, got {value}.")


def read_config_file(path: Path) -> dict[str, Any]:
    """Read a YAML mapping of `PPOWConfig` fields.

    Raises:
        UserError: unreadable, not a mapping, or unknown keys.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"Config {path} is not readable YAML ({error}): fix it or drop --config.") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"Config {path} must be a mapping of names to values, got {type(values).__name__}.")
    check_keys(values, str(path))
    return values


def check_keys(values: dict[str, Any], source: str) -> None:
    """Refuse keys that `PPOWConfig` does not have.

    Raises:
        UserError: with the nearest known names.
    """
    import difflib

    known = {f.name for f in dataclasses.fields(PPOWConfig) if f.init}
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=3)
            hint = f": did you mean {' or '.join(near)}?" if near else ": see `ppow train --help`."
            raise UserError(f"{source} has the unknown key {key!r}{hint}")
