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
from ppow_train.generation import Round, continuation_rounds
from ppow_train.microbatches import divide_step, num_processes
from ppow_train.objectives.names import check_dpace, parse_objective
from ppow_train.options import PPOWOptions, spelled
from ppow_train.ranges import check_ranges, require
from ppow_train.yaml_file import read_yaml

silence_import_warnings()
from trl import GRPOConfig, GRPOTrainer  # noqa: E402, F401  (trainer.py takes it from here: TRL is imported in one place)

# TRL's fields that `__post_init__` or the command sets, with what to do instead of setting them.
_DECIDED = {
    "max_completion_length": "set num_speculative_tokens",
    "temperature": "set serving_temperature",
    "per_device_train_batch_size": "set windows_per_step",
    "generation_batch_size": "set windows_per_step",
    "gradient_accumulation_steps": "set windows_per_forward",
    "steps_per_generation": "drop it, there is one update per batch",
    "num_iterations": "drop it, there is one update per batch",
    "gradient_checkpointing": "packed windows read the cache that it would drop, set windows_per_forward",
    "loss_type": "drop it, windows all have the same length",
    "use_bias_correction_kl": "drop it, the penalty is KL(q ‖ p), set beta",
    "use_vllm": "drop it, windows are drafted in this process",
    "shuffle_dataset": "set seed",
    "remove_unused_columns": "drop it",
    "disable_tqdm": "drop it",
    "output_dir": "give --output and --checkpoints",
    "use_cpu": "give --device",
}

# TRL's fields that would do harm, or nothing, without a word, unless they are left alone.
_NOT_DRAWN = "windows are drawn from the drafter's whole distribution, which is the one that is served"
_NO_VLLM = "windows are drafted in this process"
_NOT_EVALUATED = "held-out prompts are no dataset of TRL: give --held-out and eval_steps"
_UNFIT = {
    "mask_truncated_completions": "windows end after K tokens, not at an end token, and would hardly be trained on",
    "entropy_coef": "entropies are only logged, so it would change the logged loss and no gradient",
    "use_adaptive_entropy": "entropies are only logged, so it would change the logged loss and no gradient",
    "top_p": _NOT_DRAWN,
    "top_k": _NOT_DRAWN,
    "min_p": _NOT_DRAWN,
    "repetition_penalty": _NOT_DRAWN,
    "generation_kwargs": _NOT_DRAWN,
    "num_train_epochs": "max_steps says how long a run is",
    "eval_strategy": _NOT_EVALUATED,
    "eval_on_start": _NOT_EVALUATED,
    "load_best_model_at_end": "keep_best does that, by acceptance",
    "sync_ref_model": "the penalty is towards the target, which stays as it is",
    "save_only_model": "without the optimizer's state a run does not go on where it stopped: set save_strategy",
    "ignore_data_skip": "a resumed run would begin with the first trajectories again",
    "pad_to_multiple_of": "windows all have K tokens, and rows name a trajectory and a start",
    "reward_weights": "rewards have weights of their own: set proximity_weight",
    "use_liger_kernel": "logits of windows are not made by the model's own forward",
}


@dataclass
class PPOWConfig(PPOWOptions, GRPOConfig):
    """Configuration of one training run."""

    def __post_init__(self) -> None:
        self.objective = parse_objective(self.objective)
        self.adaptive_windows = spelled(self.adaptive_windows)
        self._check()
        self.lora_alpha = self.resolved_lora_alpha  # as it is recorded
        self.max_completion_length = self.num_speculative_tokens  # a completion is one window
        self.temperature = self.training_temperature
        # On policy, TRL's estimate then has the gradient of KL(q ‖ p), which it is an estimate of; without, as the
        # tokens' own chances would go undifferentiated, that of KL(p ‖ q).
        self.use_bias_correction_kl = True
        self.loss_type = "dr_grpo"  # windows all have K tokens: no length normalisation
        if not self.is_rollout:
            self.num_generations = 2  # TRL asks for groups; objectives on target paths have none
            self.beta = 0.0
        if self.ppow_credit == "acceptance":
            self.proximity_weight = 0.0  # credit.py: the gradient of E[R_speedup], of which R_dist is no part
        # Undivided until what fits in memory is known (training.py).
        divide_step(self, self.windows_per_forward or self.windows_per_step)
        self.generation_batch_size = None
        self.gradient_checkpointing = False
        self.shuffle_dataset = (
            False  # rows of one trajectory stay together; order is drawn when they are built
        )
        self.remove_unused_columns = False
        self.disable_tqdm = True
        # None too: every window runs through every layer.
        self.ddp_find_unused_parameters: bool | None = bool(self.ddp_find_unused_parameters)
        try:
            super().__post_init__()
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"TRL refuses these options ({reason}): change or drop them.") from error
        if self.world_size != num_processes():
            raise UserError(
                f"{self.world_size} processes were found where WORLD_SIZE says {num_processes()}: start them with "
                "torchrun or `accelerate launch`."
            )
        # Several GPUs take several processes; DataParallel would copy the drafter in every forward.
        self._n_gpu: int = min(self.n_gpu, 1)

    @property
    def is_rollout(self) -> bool:
        """Whether the objective drafts windows (ppow) or works on the target's own paths."""
        return self.objective == "ppow"

    @property
    def windows_per_trajectory(self) -> int:
        """Distinct window starts per trajectory and update."""
        groups = self.num_generations if self.is_rollout else 1
        return self.windows_per_step // (self.trajectories_per_step * groups)

    def passes(self, tokens: int, updates: int) -> float:
        """How often so many updates train on each of so many tokens of trajectories."""
        windows = self.windows_per_trajectory * self.trajectories_per_step
        return updates * windows * self.num_speculative_tokens / tokens

    def continuation_rounds(self) -> tuple[Round, ...]:
        """Seeds and temperatures at which the target continues the training prompts."""
        return continuation_rounds(
            self.seed, self.serving_temperature, self.continuations, self.greedy_sampling_temperature
        )

    def _check(self) -> None:
        check_ranges(self)
        if self.position_weights == "dpace":
            check_dpace(self.objective)
        named = self.lora_targets is None or isinstance(self.lora_targets, list)
        require(named, "lora_targets", "a list of names", repr(self.lora_targets))
        greedy_drafts = self.draft_sample_method == "greedy" and self.serving_temperature > 0
        if self.ppow_credit == "acceptance" and greedy_drafts:
            raise UserError(
                "ppow_credit acceptance follows sampled drafts, but draft_sample_method is greedy: "
                "set probabilistic, or objective exact, which has a form for greedy drafts."
            )
        if self.is_rollout and self.target_cache in ("memory", "disk"):
            raise UserError(
                f"target_cache {self.target_cache} keeps too little for ppow, whose drafts the target reads: drop it."
            )
        if self.is_rollout:
            require(self.num_generations >= 2, "num_generations", ">= 2", self.num_generations)
        self._check_fit()
        self._check_windows()
        self._check_keeping()

    def _check_fit(self) -> None:
        """Whether TRL's options that would do harm or nothing are left alone."""
        for option in dataclasses.fields(self):
            why = _UNFIT.get(option.name) or (_NO_VLLM if option.name.startswith("vllm_") else None)
            if why is not None and getattr(self, option.name) != option.default:
                raise UserError(f"{option.name} {getattr(self, option.name)} does not fit ({why}): drop it.")

    def _check_keeping(self) -> None:
        """What is saved, evaluated and told on the way."""
        require(
            self.save_strategy in ("no", "steps"), "save_strategy", "no or steps", repr(self.save_strategy)
        )
        _check_reporters(self.report_to)
        if self.early_stop_patience is not None:
            require(
                self.eval_steps is not None, "eval_steps", "set with early_stop_patience", self.eval_steps
            )
        if self.push_to_hub:  # transformers would upload training state; `ppow train` takes the option away
            raise UserError(
                "push_to_hub is an option of `ppow train`: call ppow_train.push.push_adapter instead."
            )

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


def _check_reporters(names: str | list[str] | None) -> None:
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for name in [names] if isinstance(names, str) else names or []:
        if name not in (*INTEGRATION_TO_CALLBACK, "none", "all"):
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise UserError(f"report_to must name none, all, or some of {known}, got {name!r}.")
        if name in INTEGRATION_TO_CALLBACK and name not in get_available_reporting_integrations():
            raise UserError(
                f"report_to {name!r} needs a package that is not installed: pip install it, or drop it."
            )


def read_config_file(path: Path) -> dict[str, Any]:
    """Read a YAML mapping of `PPOWConfig` fields.

    Raises:
        UserError: unreadable, not a mapping, or unknown keys.
    """
    try:
        values = read_yaml(path)
    except ValueError as error:
        raise UserError(f"Config {path} is not readable YAML ({error}): fix it or drop --config.") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"Config {path} must be a mapping of names to values, got {type(values).__name__}.")
    check_keys(values, str(path))
    fields = {field.name: field for field in dataclasses.fields(PPOWConfig)}
    return {name: typed_value(value, fields[name], str(path)) for name, value in values.items()}


def typed_value(value: Any, field: dataclasses.Field[Any], source: str) -> Any:
    """A number where a number belongs: YAML reads `3e-3` as text, and TRL would fail on it late."""
    # Our own annotations are text, most of TRL's are types: "<class 'int'>", "float | None".
    written = str(field.type).removeprefix("<class '").removesuffix("'>")
    kinds = {kind.strip() for kind in written.split("|")}
    if (value is None and "None" in kinds) or not kinds - {"None"} <= {"int", "float", "bool"}:
        return value
    if "bool" in kinds:
        if not isinstance(value, bool):
            raise UserError(f"{source}: {field.name} must be true or false, got {value!r}.")
        return value
    is_whole = "float" not in kinds
    try:
        number = float(value) if isinstance(value, str) else value
        if isinstance(number, bool) or (is_whole and int(number) != number):
            raise ValueError
        return int(number) if is_whole else number + 0
    except (TypeError, ValueError, OverflowError) as error:
        wanted = "a whole number" if is_whole else "a number"
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
