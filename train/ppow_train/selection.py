"""Which adapter of a run is kept, and when to stop: by accepted length on held-out prompts, never by loss.

What is chosen on some prompts looks better on them than it is. So held-out prompts fall into two halves by their hash:
the SELECTION half decides, the REPORT half is looked at before and after training only, and is what parity with vLLM
is checked on. Without selection (no eval_steps) all of them report. Left out: the measure (walk.py).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import TrainerCallback

from ppow_train.errors import UserError
from ppow_train.machine import available_bytes, processes_here
from ppow_train.prompts import prompt_hash
from ppow_train.walk import (
    ExpectedWalk,
    TargetPath,
    expected_walk,
    path_bytes,
    path_rows,
    serving_tokens,
    target_path,
)

if TYPE_CHECKING:
    from ppow_train.config import PPOWConfig
    from ppow_train.rollout import WindowRunner
    from ppow_train.types import Trajectories

STATE = "selection.safetensors"
KEPT_SHARE = 0.1  # of the available memory: what each Judge keeps of the target's states
ACCEPTED = "held_out/accepted_per_draft"  # in the training log


def require_held_out(config: PPOWConfig, has_held_out: bool) -> None:
    """Raise UserError if the best adapter is to be chosen on nothing."""
    if config.eval_steps and not has_held_out:
        raise UserError(
            "eval_steps chooses the best adapter on held-out prompts: give --held-out, or --data with a held-out "
            "split, or drop it."
        )


def split_held_out(held_out: Trajectories) -> tuple[Trajectories, Trajectories]:
    """The selection half and the report half, each prompt by a hash of its ids alone.

    Raises:
        UserError: one of them is empty.
    """
    lengths = held_out.prompt_lengths.tolist()
    prompts = (ids[:length] for ids, length in zip(held_out.unpadded(), lengths, strict=True))
    chosen = torch.tensor([_selects(prompt.tolist()) for prompt in prompts])
    if chosen.all() or not chosen.any():
        raise UserError(
            f"{len(held_out)} held-out prompts do not divide into some to choose the best adapter on and some to "
            "report on: give more of them, or drop eval_steps."
        )
    device = held_out.lengths.device
    return (
        held_out.subset(chosen.nonzero().squeeze(-1).to(device)),
        held_out.subset((~chosen).nonzero().squeeze(-1).to(device)),
    )


def _selects(prompt: list[int]) -> bool:
    # The last byte: the first ones have chosen the held-out split already (trajectory_store.is_held_out).
    return prompt_hash(prompt)[-1] % 2 == 0


class Judge:
    """What serving is expected to accept of a runner's drafter as it is now.

    The target's part is the same every time. What of it is small enough is kept on the target's device; the rest is
    computed anew at each call, with the same numbers.

    Args:
        runner: with held-out trajectories.
        greedy_drafts: as in `walk.expected_walk`.
        keep_bytes: of the target's states that may be kept; without it a share of the memory that is available now.
    """

    def __init__(self, runner: WindowRunner, greedy_drafts: bool, keep_bytes: float | None = None) -> None:
        self.runner, self.greedy_drafts = runner, greedy_drafts
        self.max_tokens = serving_tokens(runner.trajectories, runner.num_speculative_tokens)
        if keep_bytes is None:
            device = runner.target.model.device
            keep_bytes = KEPT_SHARE * available_bytes(device) / processes_here(device)
        self._rows = path_rows(runner)
        sizes = list(itertools.accumulate(path_bytes(runner, rows) for rows in self._rows))
        self._num_kept = sum(size <= keep_bytes for size in sizes)
        self.kept_bytes = sizes[self._num_kept - 1] if self._num_kept else 0
        self._kept: list[TargetPath] = []

    def __call__(self) -> ExpectedWalk:
        """Walk all trajectories, with dropout off."""
        model = self.runner.drafter.model
        training = model.training
        model.eval()
        try:
            return expected_walk(self.runner, self.max_tokens, self.greedy_drafts, self._paths())
        finally:
            model.train(training)

    def _paths(self) -> Iterator[TargetPath]:
        yield from self._kept
        for rows in self._rows[len(self._kept) :]:
            path = target_path(self.runner, rows)
            if len(self._kept) < self._num_kept:
                self._kept.append(path)
            yield path

    def forget(self) -> None:
        """Give back the memory of what is kept; a further call computes it anew."""
        self._kept.clear()

    @property
    def digest(self) -> str:
        """Which trajectories these are."""
        return self.runner.trajectories.digest()


@dataclasses.dataclass
class SelectionState:
    """All that selection remembers.

    Attributes:
        curve: (updates, accepted tokens per draft) at each evaluation, the untrained drafter at 0 first.
        digest: `Judge.digest` of the prompts it was measured on.
        best: the adapter's tensors at the best evaluation after 0, on the CPU.
    """

    curve: list[tuple[int, float]]
    digest: str
    best: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)

    @property
    def best_updates(self) -> int:
        """Updates after which the best adapter stood; of several that are equal the first."""
        return max(self.curve[1:], key=lambda point: _worth(point[1]))[0]

    @property
    def beats_untrained(self) -> bool:
        """Whether any adapter accepted more than the untrained drafter."""
        return max((_worth(value) for _, value in self.curve[1:]), default=-math.inf) > self.curve[0][1]

    def gains(self, updates: int) -> bool:
        """Whether the adapter of this evaluation accepted more than the untrained drafter."""
        return dict(self.curve)[updates] > self.curve[0][1]

    @property
    def evaluations_without_gain(self) -> int:
        """How many evaluations ago the most was accepted, the untrained drafter's included."""
        values = [_worth(value) for _, value in self.curve]
        return len(values) - 1 - values.index(max(values))

    def state_dict(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """JSON values and tensors."""
        return {"curve": [list(point) for point in self.curve], "digest": self.digest}, self.best

    @classmethod
    def load_state_dict(cls, values: dict[str, Any], tensors: dict[str, torch.Tensor]) -> SelectionState:
        """What `state_dict` gave."""
        return cls([(int(updates), float(v)) for updates, v in values["curve"]], values["digest"], tensors)

    def save(self, directory: Path) -> None:
        """Write `STATE`, one file, whole or not at all."""
        values, tensors = self.state_dict()
        temporary = directory / f".{STATE}.part"
        save_file(tensors, temporary, metadata={"selection": json.dumps(values)})
        temporary.replace(directory / STATE)

    @classmethod
    def load(cls, directory: Path) -> SelectionState:
        """Read what `save` wrote."""
        with safe_open(directory / STATE, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
            return cls.load_state_dict(json.loads(file.metadata()["selection"]), tensors)


def _worth(accepted: float) -> float:
    """What an evaluation counts for: nothing is less than one that is no number, of a run about to diverge."""
    return -math.inf if math.isnan(accepted) else accepted


class BestOnHeldOut(TrainerCallback):
    """Evaluates every `eval_steps` updates, keeps the best adapter and stops when nothing better comes.

    Its state is saved into every checkpoint and found there when a run goes on.

    Args:
        judge: on the selection half.
        config: eval_steps, early_stop_patience.
        log: puts a figure into the next line of the training log.

    Attributes:
        state: what it remembers.
        diverged_at: the update that ended the run by making its weights no numbers, or None.
    """

    def __init__(self, judge: Judge, config: PPOWConfig, log: Callable[[str, float], None]) -> None:
        self.judge, self.config, self.log = judge, config, log
        self.state = SelectionState([], judge.digest)
        self.diverged_at: int | None = None
        self._at_stop: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Measure the untrained drafter, or go on from a checkpoint."""
        if state.global_step == 0:
            self._evaluate(0, model)
            return
        directory = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self.state = SelectionState.load(directory)
        if self.state.digest != self.judge.digest:
            raise UserError(
                f"{directory} selected on other held-out prompts: give the same ones, or begin the run again."
            )
        if self._is_over:
            control.should_training_stop = True
            self._at_stop = _copy(model)  # transformers makes one more update, which must not count

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Evaluate when it is time, and after the last update."""
        if self._at_stop:
            return
        if state.global_step % self.config.eval_steps and state.global_step < state.max_steps:
            return
        self.log(ACCEPTED, self._evaluate(state.global_step, model))
        control.should_log = True
        control.should_training_stop |= self._is_over

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the state to the checkpoint that was just written."""
        if state.is_world_process_zero:
            self.state.save(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Nothing is measured any more."""
        self.judge.forget()

    def outlives(self, update: int) -> bool:
        """Whether there is an adapter to write though the weights are no numbers since an update.

        There is one where some evaluation before it accepted more than the untrained drafter.
        """
        if self._at_stop:
            return True  # the run was over, and that update is none of its own
        if self.state.beats_untrained:
            self.diverged_at = update
        return self.diverged_at is not None

    def restore(self, model: torch.nn.Module) -> None:
        """Put the tensors of the adapter that is to be written back into the model."""
        written = self.state.best if self.keeps_best else self._at_stop
        if written:
            with torch.no_grad():
                for name, parameter in _trained(model).items():
                    parameter.copy_(written[name])

    def counted(self, updates: int) -> int:
        """Of the updates made, those of the run: not one made after it had stopped."""
        return self.state.curve[-1][0] if self._at_stop else updates

    @property
    def written_after_updates(self) -> int:
        """Updates after which the adapter stood that is to be written."""
        return self.state.best_updates if self.keeps_best else self.state.curve[-1][0]

    @property
    def gains(self) -> bool:
        """Whether that adapter, not some other of the curve, accepted more than the untrained drafter."""
        return self.state.gains(self.written_after_updates)

    @property
    def keeps_best(self) -> bool:
        """Whether the best adapter is written, not the last one, which of a run that diverged is none."""
        return self.config.keep_best or self.diverged_at is not None

    def facts(self) -> dict[str, Any]:
        """What the adapter records of its selection."""
        return {
            "prompts": len(self.judge.runner.trajectories),
            "curve": [(updates, round(value, 4)) for updates, value in self.state.curve],
            "keep_best": self.keeps_best,
            "written_after_updates": self.written_after_updates,
            "stopped_early": self.diverged_at is None and self.state.curve[-1][0] < self.config.max_steps,
            **({} if self.diverged_at is None else {"diverged_at_update": self.diverged_at}),
        }

    @property
    def _is_over(self) -> bool:
        patience = self.config.early_stop_patience
        return patience is not None and self.state.evaluations_without_gain >= patience

    def _evaluate(self, updates: int, model: torch.nn.Module) -> float:
        # Every process must come to the same decision: the main one's figure counts.
        value = broadcast_object_list([self.judge().mean_accepted])[0]
        self.state.curve.append((updates, value))
        if updates and self.state.best_updates == updates:
            self.state.best = _copy(model)
        return value


def _trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _copy(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """On the CPU."""
    return {name: parameter.detach().cpu().clone() for name, parameter in _trained(model).items()}
