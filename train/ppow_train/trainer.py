"""PPOWTrainer: TRL's GRPOTrainer with the windows of speculative decoding as its completions.

Four methods are overridden, none copied:
- `_generate_and_score_completions`: for ppow it numbers the rows and may give each token its credit; other objectives
  draw windows and skip drafting.
- `_prepare_inputs`: undoes TRL's shuffle, so that windows of one trajectory share a forward.
- `_get_per_token_logps_and_entropies`: windows of a trajectory in one packed forward; the KL anchor is the TARGET.
- `_compute_loss`: TRL's for ppow, `objectives` for the rest.

A row's "prompt" is `[trajectory]`, and `[trajectory, start]` once its window is drawn; its completion is the drafted
window. Where several processes train, each has a slice of an update's rows; what is random is drawn for the whole
update, alike in all of them, so that neither the number of processes nor that of forwards changes what is learned.
Left out: everything else.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedTokenizerBase, TrainerCallback

from ppow_train.compat import (
    TargetAnchor,
    ensure_generation_config,
    keep_embeddings_out,
    output_layer_unnamed,
    silence_rollout_warning,
    silence_telemetry,
)
from ppow_train.config import GRPOTrainer, PPOWConfig
from ppow_train.credit import token_advantages
from ppow_train.distributed import admit_computations, inside
from ppow_train.lora_targets import OUTPUT_LAYER, check_lora_targets
from ppow_train.objectives.choose import make_objective
from ppow_train.objectives.path_windows import PathWindows
from ppow_train.rewards import ProximityThreshold, make_reward_funcs
from ppow_train.rollout import WindowRunner
from ppow_train.sampler import Draw, WindowSampler
from ppow_train.types import Rollout
from ppow_train.window_lines import LOG_NAME
from ppow_train.window_log import WindowLog, counted_acceptance, expected_acceptance


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
            self._objective = make_objective(args)
        self._proximity = ProximityThreshold(args.proximity_quantile, args.proximity_epsilon)
        self._rollout: Rollout | None = None
        self.sampler = make_sampler(runner, args)
        self.window_log = WindowLog(
            Path(args.output_dir) / LOG_NAME, args.criticality, args.num_speculative_tokens
        )
        lora = LoraConfig(
            r=args.lora_rank,
            lora_alpha=args.resolved_lora_alpha,
            target_modules=args.lora_targets or runner.drafter.lora_targets,
            bias="none",
        )
        check_lora_targets(runner.drafter.model, lora.target_modules, runner.drafter.has_own_output)
        silence_rollout_warning()
        silence_telemetry()
        ensure_generation_config(runner.drafter.model)
        with output_layer_unnamed(runner.drafter.model, OUTPUT_LAYER in lora.target_modules):
            super().__init__(
                model=runner.drafter.model,
                reward_funcs=make_reward_funcs(
                    args.draft_cost_ratio, args.proximity_weight, args.num_charged_tokens
                ),
                args=args,
                train_dataset=trajectory_rows(len(runner.trajectories), args),
                processing_class=processing_class,
                peft_config=lora,
                rollout_func=self._roll_out,
                callbacks=[*(callbacks or []), self.window_log],
            )
        keep_embeddings_out(self.model)
        admit_computations(runner.drafter.model)
        if args.is_rollout and args.beta:
            self.ref_model = TargetAnchor()  # after super().__init__, so that it wins over the PEFT branch

    # ------------------------------------------------------------ stations 2 to 4

    def _roll_out(self, prompts: list[list[int]], trainer: GRPOTrainer) -> dict[str, Any]:
        """TRL's rollout function: prompts are `[trajectory]`, each repeated G times in a row."""
        trajectory, mine = self._whole_update([prompt[0] for prompt in prompts])
        groups = self.args.num_generations
        start = self._draw(trajectory[::groups]).repeat_interleave(groups)[mine]
        noise = self.runner.draw_noise(len(trajectory), self._generator(drafting=True))[mine]
        trajectory = trajectory[mine].to(start.device)
        rollout = self._rollout = self._roll_out_in_parts(trajectory, start, noise)
        num_accepted_tokens = self.accelerator.gather(rollout.num_accepted_tokens)
        epsilon = self._proximity.update(num_accepted_tokens, self.accelerator.gather(rollout.divergence))
        self._log_rollout(num_accepted_tokens, epsilon)
        return {
            "prompt_ids": torch.stack([trajectory, start], dim=1).tolist(),
            "completion_ids": rollout.tokens.tolist(),
            "logprobs": rollout.draft_logps.tolist(),
            "num_accepted_tokens": rollout.num_accepted_tokens.tolist(),
            "divergence": rollout.divergence.tolist(),
            "proximity_epsilon": [epsilon] * len(trajectory),
        }

    def _roll_out_in_parts(
        self, trajectory: torch.Tensor, start: torch.Tensor, noise: torch.Tensor
    ) -> Rollout:
        """No more windows at a time than an update's forward has."""
        size = self.args.per_device_train_batch_size
        rows = zip(trajectory.split(size), start.split(size), noise.split(size), strict=True)
        return Rollout.join([self.runner.roll_out(*part, inside(self.model_wrapped)) for part in rows])

    def _whole_update(self, own: list[int]) -> tuple[torch.Tensor, slice]:
        """The trajectories of all processes' rows, int64 [N] on the CPU, and which rows are this process's."""
        everyone = self.accelerator.gather(torch.tensor(own, device=self.accelerator.device)).cpu()
        first = self.accelerator.process_index * len(own)
        return everyone, slice(first, first + len(own))

    def _draw(self, trajectory: torch.Tensor) -> torch.Tensor:
        """One start per row of a whole update, `trajectory_rows`: int64 [N] on the CPU -> int64 [N] on the device.

        A trajectory that comes twice, even twice in a row, is drawn from twice: of few trajectories one may end a
        round and begin the next within an update.
        """
        windows = self.args.windows_per_trajectory
        draw = self.sampler.draw(trajectory[::windows], windows, self.state.global_step, self._generator())
        self._log_draw(draw)
        return draw.starts.flatten()

    def _generator(self, drafting: bool = False) -> torch.Generator:
        """Randomness of one update, from seed and step alone: a resumed run draws what an unbroken one would.

        Args:
            drafting: the one for drafting and accepting windows instead of the one that chooses their starts.
        """
        seed = self.args.seed * 1_000_003 + self.state.global_step
        return torch.Generator().manual_seed(2 * seed + drafting)

    def _log_draw(self, draw: Draw) -> None:
        self.window_log.add_draw(draw)
        metrics = self._metrics["train"]
        metrics["windows/adaptive"].append(float(draw.adaptive))
        if draw.chosen is not None and draw.candidates is not None and draw.staleness is not None:
            metrics["windows/criticality_chosen"].append(draw.chosen.mean().item())
            metrics["windows/criticality_candidates"].append(draw.candidates.mean().item())
            metrics["windows/staleness"].append(draw.staleness.float().mean().item())

    def _log_rollout(self, num_accepted_tokens: torch.Tensor, epsilon: float) -> None:
        metrics = self._metrics["train"]
        accepted = num_accepted_tokens.float()
        metrics["windows/num_accepted_tokens"].append(accepted.mean().item())
        metrics["windows/nothing_accepted"].append((accepted == 0).float().mean().item())
        metrics["windows/proximity_epsilon"].append(epsilon)
        self.window_log.add_accepted(
            counted_acceptance(num_accepted_tokens, self.args.num_speculative_tokens), len(accepted)
        )

    def _log_expected(self, windows: PathWindows) -> None:
        """Expected acceptance, of the updates that are logged only: it takes softmaxes that the loss may not need."""
        if (self.state.global_step + 1) % self.state.logging_steps:
            return
        expected = expected_acceptance(windows.tokens, windows.target_logits, windows.draft_logits)
        expected = self.accelerator.reduce(expected.to(self.accelerator.device)).cpu()
        count = len(windows.tokens) * self.accelerator.num_processes
        self.window_log.add_accepted(expected, count)
        accepted = expected.sum().item() / count
        self._metrics["train"]["windows/expected_accepted_tokens"].append(accepted)

    def log_next(self, name: str, value: float) -> None:
        """Put a figure into the next line of the training log."""
        self._metrics["train"][name].append(value)

    # ------------------------------------------------------------ overridden methods of GRPOTrainer

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        # What it remembers decides what is read together: a resumed run remembers nothing of the update before.
        self.runner.target.forget()
        if self._objective is None:
            batch = super()._generate_and_score_completions(inputs)
            if self.args.ppow_credit == "acceptance":
                assert self._rollout is not None  # _roll_out has run in the line above
                # TRL's loss takes (N, K) as well.
                batch["advantages"] = token_advantages(self._rollout, self.args)
            return {**batch, "row": torch.arange(len(inputs), device=batch["advantages"].device)}
        first = self.accelerator.process_index * len(inputs)
        prompts = [row["prompt"] for row in inputs]
        trajectory, mine = self._whole_update([p[i % len(p)] for i, p in enumerate(prompts, first)])
        start = self._draw(trajectory)[mine]
        row = torch.arange(len(inputs), device=start.device)
        return {"trajectory": trajectory[mine].to(start.device), "start": start, "row": row}

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, torch.Tensor]:
        forward = self._step % self.args.steps_per_generation
        super()._prepare_inputs(generation_batch)
        if forward == 0:
            self._buffered_inputs: Any = _in_row_order(self._buffered_inputs)
        return self._buffered_inputs[forward]

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
        logps, entropies = self.runner.draft_logps(trajectory, start, tokens, inside(model))
        return logps, entropies, None

    def _compute_loss(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        if self._objective is None:
            return super()._compute_loss(model, inputs)
        windows = self.runner.path_windows(inputs["trajectory"], inputs["start"], inside(model))
        self._log_expected(windows)
        # As in TRL's own losses: its `loss_is_scaled_for_ga` keeps transformers from doing it.
        return self._objective(windows) / self.current_gradient_accumulation_steps

    # ------------------------------------------------------------ resuming

    def own_state(self) -> dict[str, Any]:
        """What a run needs to go on beside what transformers saves; JSON."""
        return {
            "proximity": self._proximity.state(),
            "sampler": self.sampler.state_dict(),
            "window_log": self.window_log.state_dict(),
        }

    def restore_own_state(self, state: dict[str, Any]) -> None:
        """Go on from an `own_state`."""
        self._proximity.restore(state["proximity"])
        self.sampler.load_state_dict(state["sampler"])
        self.window_log.load_state_dict(state["window_log"])


def make_sampler(runner: WindowRunner, args: PPOWConfig) -> WindowSampler:
    """The sampler that a configuration asks for."""
    return WindowSampler(
        partial(runner.criticality, kind=args.criticality),
        runner.trajectories,
        args.num_speculative_tokens,
        adaptive_from=args.adaptive_from,
        uniform_share=args.uniform_share,
        refresh=args.criticality_refresh,
    )


def _in_row_order(batches: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """An update's forwards with its rows as they were before TRL shuffled them; scalars stay."""
    order = torch.cat([batch["row"] for batch in batches]).argsort()
    parts = order.chunk(len(batches))

    def joined(name: str) -> torch.Tensor:
        return torch.cat([batch[name] for batch in batches])

    whole = {name: value if value.ndim == 0 else joined(name) for name, value in batches[0].items()}
    return [{name: v if v.ndim == 0 else v[part] for name, v in whole.items()} for part in parts]


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
