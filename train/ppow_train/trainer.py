"""PPOWTrainer: TRL's GRPOTrainer with the windows of speculative decoding as its completions.

Three methods are overridden, none copied:
- `_generate_and_score_completions`: for ppow it only adds a log line; other objectives draw windows and skip drafting.
- `_get_per_token_logps_and_entropies`: windows of a trajectory in one packed forward; the KL anchor is the TARGET.
- `_compute_loss`: TRL's for ppow, `objectives` for the rest.

A row's "prompt" is `[trajectory]`, and `[trajectory, start]` once its window is drawn; its completion is the drafted
window. Left out: everything else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedTokenizerBase, TrainerCallback

from ppow_train.compat import TargetAnchor, ensure_generation_config, silence_rollout_warning
from ppow_train.config import GRPOTrainer, PPOWConfig
from ppow_train.errors import UserError
from ppow_train.objectives import make_objective
from ppow_train.rewards import ProximityThreshold, make_reward_funcs
from ppow_train.rollout import WindowRunner
from ppow_train.types import Rollout


class PPOWTrainer(GRPOTrainer):
    """Trains a LoRA adapter of a drafter.

    Args:
        runner: target, drafter and trajectories.
        args: configuration.
        processing_class: the target's tokenizer.
        callbacks: as in transformers.
    """

    _tag_names = ["trl", "ppow"]  # noqa: RUF012  (TRL's own attribute)

    def __init__(
        self,
        runner: WindowRunner,
        args: PPOWConfig,
        processing_class: PreTrainedTokenizerBase,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        self.runner = runner
        self._objective = None
        if not args.is_rollout:
            self._objective = make_objective(args.objective, args.draft_cost_ratio, args.position_decay)
        self._proximity = ProximityThreshold(args.proximity_quantile, args.proximity_epsilon)
        self._rollout: Rollout | None = None
        lora = LoraConfig(
            r=args.lora_rank,
            lora_alpha=args.lora_alpha,
            target_modules=args.lora_targets or runner.drafter.lora_targets,
            bias="none",
        )
        _check_lora_targets(runner.drafter.model, lora.target_modules)
        silence_rollout_warning()
        ensure_generation_config(runner.drafter.model)
        super().__init__(
            model=runner.drafter.model,
            reward_funcs=make_reward_funcs(args.draft_cost_ratio, args.proximity_weight),
            args=args,
            train_dataset=trajectory_rows(len(runner.trajectories), args),
            processing_class=processing_class,
            peft_config=lora,
            rollout_func=self._roll_out,
            callbacks=callbacks,
        )
        if args.is_rollout and args.beta:
            self.ref_model = TargetAnchor()  # after super().__init__, so that it wins over the PEFT branch

    # ------------------------------------------------------------ stations 2 to 4

    def _roll_out(self, prompts: list[list[int]], trainer: GRPOTrainer) -> dict[str, Any]:
        """TRL's rollout function: prompts are `[trajectory]`, each repeated G times in a row."""
        groups = self.args.num_generations
        trajectory = torch.tensor([prompt[0] for prompt in prompts[::groups]])
        start = self._draw(trajectory).repeat_interleave(groups)
        trajectory = trajectory.to(start.device).repeat_interleave(groups)
        rollout = self.runner.roll_out(trajectory, start, self._generator(start.device))
        self._rollout = rollout
        epsilon = self._proximity.update(rollout.num_accepted_tokens, rollout.divergence)
        self._log_rollout(rollout, epsilon)
        return {
            "prompt_ids": torch.stack([trajectory, start], dim=1).tolist(),
            "completion_ids": rollout.tokens.tolist(),
            "logprobs": rollout.draft_logps.tolist(),
            "num_accepted_tokens": rollout.num_accepted_tokens.tolist(),
            "divergence": rollout.divergence.tolist(),
            "proximity_epsilon": [epsilon] * len(trajectory),
        }

    def _draw(self, trajectory: torch.Tensor) -> torch.Tensor:
        """One start per row, rows of one trajectory together: int64 [N] on the CPU -> int64 [N] on the device."""
        ids, counts = trajectory.unique_consecutive(return_counts=True)
        windows = int(counts.max())
        adaptive = self.state.global_step >= self.args.adaptive_after * self.args.max_steps
        adaptive = adaptive and self.args.is_rollout and self.args.uniform_share < 1
        starts = self.runner.draw(ids, windows, self._generator(), adaptive, self.args.uniform_share)
        self._metrics["train"]["windows/adaptive"].append(float(adaptive))
        column = torch.cat([torch.arange(int(count)) for count in counts])
        return starts[torch.arange(len(ids)).repeat_interleave(counts), column]

    def _generator(self, device: torch.device | None = None) -> torch.Generator:
        """Randomness of one update, from seed and step alone: a resumed run draws what an unbroken one would.

        Args:
            device: where windows are drafted; without it, on the CPU, the one that chooses their starts.
        """
        rank = self.accelerator.process_index
        seed = (self.args.seed * 1_000_003 + self.state.global_step) * 1_009 + rank
        return torch.Generator(device or "cpu").manual_seed(2 * seed + (device is not None))

    def _log_rollout(self, rollout: Rollout, epsilon: float) -> None:
        metrics = self._metrics["train"]
        accepted = rollout.num_accepted_tokens.float()
        metrics["windows/num_accepted_tokens"].append(accepted.mean().item())
        metrics["windows/nothing_accepted"].append((accepted == 0).float().mean().item())
        metrics["windows/proximity_epsilon"].append(epsilon)

    def log_next(self, name: str, value: float) -> None:
        """Put a figure into the next line of the training log."""
        self._metrics["train"][name].append(value)

    # ------------------------------------------------------------ overridden methods of GRPOTrainer

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        if self._objective is None:
            return super()._generate_and_score_completions(inputs)
        prompts = [row["prompt"] for row in inputs]
        trajectory = torch.tensor([prompt[i % len(prompt)] for i, prompt in enumerate(prompts)])
        start = self._draw(trajectory)
        return {"trajectory": trajectory.to(start.device), "start": start}

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        if isinstance(model, TargetAnchor):
            if self._rollout is None:
                raise RuntimeError("TRL asked for reference log-probabilities before any rollout")
            return self._rollout.target_logps, None, None  # verification has scored these very tokens
        trajectory, start, tokens = input_ids[:, 0], input_ids[:, 1], input_ids[:, 2:]
        logps, entropies = self.runner.draft_logps(trajectory, start, tokens)
        return logps, entropies, None

    def _compute_loss(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        if self._objective is None:
            return super()._compute_loss(model, inputs)
        return self._objective(self.runner.path_windows(inputs["trajectory"], inputs["start"]))


def _check_lora_targets(model: torch.nn.Module, names: Iterable[str]) -> None:
    """PEFT passes over a name that fits nothing as long as another one fits."""
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    for wanted in names:
        if not any(f".{name}".endswith(f".{wanted}") for name in linear):
            known = sorted({name.rpartition(".")[2] for name in linear if not name.startswith("verifier_")})
            raise UserError(
                f"lora_targets must name linear layers of the drafter ({', '.join(known)}), got {wanted!r}."
            )


def trajectory_rows(num_trajectories: int, args: PPOWConfig) -> Dataset:
    """TRL's dataset: for every update of the run its trajectories, each as often as it has windows.

    TRL hands out every row `num_generations` times: to ppow's groups, which share a trajectory. Where nothing is
    drafted there are no groups, so a row lists the trajectory of each of its copies instead.
    Trajectories come in a new random order each time all of them have been used.
    """
    per_step = args.trajectories_per_step
    order = _endless_order(num_trajectories, args.seed)
    share = 1 if args.is_rollout else args.num_generations
    rows: list[list[int]] = []
    for _ in range(args.max_steps):
        chosen = [next(order) for _ in range(per_step)]
        windows = [index for index in chosen for _ in range(args.windows_per_trajectory)]
        rows += [windows[begin : begin + share] for begin in range(0, len(windows), share)]
    return Dataset.from_dict({"prompt": rows})


def _endless_order(count: int, seed: int) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()
