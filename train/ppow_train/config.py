"""One training run's configuration: PPOW's options (options.py) on top of TRL's. Unknown keys are refused.

`PPOWConfig` extends TRL's GRPOConfig; what PPOW decides about TRL's own fields is set in `__post_init__`, next to the
reason. Left out: paths of models and data (the command's arguments).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppow_train.compat import silence_import_warnings
from ppow_train.errors import UserError
from ppow_train.objectives import parse_objective
from ppow_train.options import PPOWOptions

silence_import_warnings()
from trl import GRPOConfig, GRPOTrainer  # noqa: E402, F401  (trainer.py takes it from here: TRL is imported in one place)

# TRL's fields that `__post_init__` sets, with what to do instead of setting them.
_DECIDED = {
    "max_completion_length": "set num_speculative_tokens",
    "temperature": "set serving_temperature",
    "per_device_train_batch_size": "set windows_per_step",
    "generation_batch_size": "set windows_per_step",
    "gradient_accumulation_steps": "set windows_per_step",
    "steps_per_generation": "drop it, there is one update per batch",
    "loss_type": "drop it, windows all have the same length",
    "use_vllm": "drop it, windows are drafted in this process",
    "shuffle_dataset": "set seed",
    "remove_unused_columns": "drop it",
    "disable_tqdm": "drop it",
}


@dataclass
class PPOWConfig(PPOWOptions, GRPOConfig):
    """Configuration of one training run."""

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
        _require(self.trajectories_per_step >= 1, "trajectories_per_step", ">= 1", self.trajectories_per_step)
        named = self.lora_targets is None or isinstance(self.lora_targets, list)
        _require(named, "lora_targets", "a list of names", repr(self.lora_targets))
        _require(self.lora_rank >= 1, "lora_rank", ">= 1", self.lora_rank)
        _require(self.proximity_weight >= 0, "proximity_weight", ">= 0", self.proximity_weight)
        evaluates = self.eval_steps is None or self.eval_steps >= 1
        _require(evaluates, "eval_steps", ">= 1, or absent", self.eval_steps)
        if self.early_stop_patience is not None:
            _require(self.early_stop_patience >= 1, "early_stop_patience", ">= 1", self.early_stop_patience)
            _require(
                self.eval_steps is not None, "eval_steps", "set with early_stop_patience", self.eval_steps
            )
        if self.push_to_hub:  # transformers would upload training state; `ppow train` takes the option away
            raise UserError(
                "push_to_hub is an option of `ppow train`: call ppow_train.push.push_adapter instead."
            )
        if self.is_rollout:
            _require(self.num_generations >= 2, "num_generations", ">= 2", self.num_generations)
        self._check_windows()

    def _check_windows(self) -> None:
        if self.is_rollout:
            unit = self.trajectories_per_step * self.num_generations
            why = (
                f"trajectories_per_step {self.trajectories_per_step} × num_generations {self.num_generations}"
            )
        else:
            unit = math.lcm(self.trajectories_per_step, 2)
            why = f"trajectories_per_step {self.trajectories_per_step}, and even, since TRL wants groups"
        if self.windows_per_step < unit or self.windows_per_step % unit:
            raise UserError(
                f"windows_per_step must be a multiple of {unit} ({why}), got {self.windows_per_step}."
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
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())  # YAML's own runs over several lines
        raise UserError(f"Config {path} is not readable YAML ({reason}): fix it or drop --config.") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"Config {path} must be a mapping of names to values, got {type(values).__name__}.")
    check_keys(values, str(path))
    fields = {field.name: field for field in dataclasses.fields(PPOWConfig)}
    return {name: _typed(value, fields[name], str(path)) for name, value in values.items()}


def _typed(value: Any, field: dataclasses.Field[Any], source: str) -> Any:
    """A number where a number belongs: YAML reads `3e-3` as text, and TRL would fail on it late."""
    is_number = isinstance(field.default, (int, float)) and not isinstance(field.default, bool)
    if not is_number or (value is None and "None" in str(field.type)):
        return value
    wanted = "a whole number" if field.type in ("int", int) else "a number"
    try:
        number = float(value) if isinstance(value, str) else value
        if isinstance(number, bool) or (wanted == "a whole number" and int(number) != number):
            raise ValueError
        return int(number) if wanted == "a whole number" else number + 0
    except (TypeError, ValueError) as error:
        raise UserError(f"{source}: {field.name} must be {wanted}, got {value!r}.") from error


def check_keys(values: dict[str, Any], source: str) -> None:
    """Refuse keys that `PPOWConfig` does not have, or decides itself.

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
        if key in _DECIDED:
            raise UserError(f"{source} sets {key!r}, which follows from other options: {_DECIDED[key]}.")
