"""How much memory an update takes, and how many of its windows fit at once: a small model of the shapes.

Counted are the tensors that live at the peak of one forward and backward; which ones, and how many copies of each, was
found by following every tensor of small updates, and tests/training/test_memory.py holds the model to 0.8 to 1.25 times
what is measured there (on the CPU; CUDA uses the same model, unverified). Left out: the weights, which are loaded
already; attention scores, which scaled dot product attention does not keep; what kernels allocate inside of themselves
and what the allocator wastes, for which `SHARE` leaves room.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ppow_train.errors import UserError
from ppow_train.machine import gib
from ppow_train.objectives.names import parts_of
from ppow_train.rollout import LOGITS_AT_ONCE, WindowRunner
from ppow_train.shapes import Shapes, padded_tokens, pass_bytes_per_token, tokens_at_once
from ppow_train.target_cache import cache_bytes, fill_bytes, resolve_kind
from ppow_train.walk import walk_bytes

if TYPE_CHECKING:
    from ppow_train.config import PPOWConfig
    from ppow_train.selection import Judge

SHARE = 0.8  # of the available memory that an update may take
# [N, K, columns] float32 tensors alive at the peak: p and q, as they come and gathered, their softmaxes, a gradient.
_LOGIT_COPIES = {"overlap": 5, "exact": 6, "drafts": 7, "ppow": 5} | {
    f"cst:{loss}": copies for loss, copies in (("tv", 5), ("nla", 5), ("ce", 5), ("kl_div", 7), ("rkl", 7))
}
_MOST_LOGIT_COPIES = 9  # of the library's other losses, and of what is not listed
_CRITICALITY_COPIES = 9  # the same where criticality is computed, of at most LOGITS_AT_ONCE numbers each
_BYTES_PER_LORA_WEIGHT = 16  # float32 weight, gradient and AdamW's two moments


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of an update by the windows of its forwards.

    Attributes:
        window_bytes: of one window.
        prefix_bytes: of one trajectory, the longest one.
        fixed_bytes: LoRA with its optimizer, criticality, the target's states as far as they are kept.
        windows_per_trajectory: windows that share a prefix where all of them are in one forward.
        pass_bytes: of the largest pass over whole trajectories without gradients, which comes before or after.
    """

    window_bytes: float
    prefix_bytes: float
    fixed_bytes: float
    windows_per_trajectory: int
    pass_bytes: float = 0.0

    def of(self, windows: int) -> float:
        """Bytes of an update whose forwards have this many windows; those of a trajectory may be torn apart."""
        each = self.windows_per_trajectory
        if windows % each == 0 or each % windows == 0:
            trajectories = math.ceil(windows / each)
        else:
            trajectories = (windows + each - 2) // each + 1  # at most: it may begin and end within one
        # Packing pads every trajectory to as many windows as the first one has.
        padded = trajectories * min(each, windows)
        update = trajectories * self.prefix_bytes + padded * self.window_bytes
        return self.fixed_bytes + max(update, self.pass_bytes)


def estimate_memory(runner: WindowRunner, config: PPOWConfig, judges: Sequence[Judge] = ()) -> MemoryEstimate:
    """Memory of an update of this pair on these trajectories, if all were as long as the longest (ours).

    Args:
        runner: pair and trajectories.
        config: windows, objective, LoRA.
        judges: on the run's held-out trajectories.
    """
    length = int(runner.trajectories.lengths.max())
    each = config.windows_per_step // config.trajectories_per_step
    prefix = _prefix_bytes(runner, config, length, each)
    window = _logit_bytes(runner, config) + _chain_bytes(runner, config, length, each)
    fixed = _lora_weights(runner, config) * _BYTES_PER_LORA_WEIGHT
    if math.isfinite(config.adaptive_from):
        logits = config.trajectories_per_step * length * runner.target.vocab_size
        fixed += _CRITICALITY_COPIES * 4 * min(LOGITS_AT_ONCE, logits)
    fixed += sum(judge.kept_bytes for judge in judges)
    passes = [walk_bytes(judge.runner) for judge in judges]
    kind = resolve_kind(runner.target, runner.trajectories, config)
    if kind != "none":
        passes.append(fill_bytes(runner.target, runner.trajectories))
    on_cpu = runner.target.model.device.type == "cpu"  # states kept in memory are in main memory
    if on_cpu and kind == "memory":
        fixed += cache_bytes(runner.target, runner.trajectories)
    if math.isfinite(config.adaptive_from):
        tokens = padded_tokens([length] * config.trajectories_per_step, tokens_at_once(runner.target))
        passes.append(tokens * pass_bytes_per_token(runner.target))
    return MemoryEstimate(window, prefix, fixed, each, max(passes, default=0.0))


def _prefix_bytes(runner: WindowRunner, config: PPOWConfig, length: int, each: int) -> float:
    """Of one trajectory: the target's keys and values, what the drafter reads of it, the drafter's own pass."""
    target, drafter = Shapes.of(runner.target.model), Shapes.of(runner.drafter.model)
    taps = len(runner.target.tap_layers)
    kept = running = target.states(taps)
    if resolve_kind(runner.target, runner.trajectories, config) == "none":
        kept += target.cached
        running = kept + target.at_work(taps)  # while the target runs
    steps = config.num_speculative_tokens
    own = drafter.activations + _lora_activations(runner, config)
    if taps:  # every step of a chain keeps the prefix's keys and values, repeated for every head
        own += (steps - 1) * 2 * drafter.layers * drafter.queries * drafter.element
    along_path = not taps and not config.is_rollout  # a causal LM reads its windows where it reads the prefix
    slots = length if along_path else length - steps
    read = min(slots, each * steps if along_path else each)
    pass_bytes = slots * own - (slots - read) * drafter.last_feed_forward
    return max(length * running, length * kept + pass_bytes)


def _logit_bytes(runner: WindowRunner, config: PPOWConfig) -> float:
    """Of one window: distributions over the draft columns, and of the target's full ones before they are reduced."""
    vocabulary, full = runner.drafter.vocabulary, runner.target.vocab_size
    columns = len(vocabulary.target_ids) + 1 if vocabulary.target_ids is not None else full
    # The parts of a sum share p and q.
    copies = 2 + sum(_LOGIT_COPIES.get(name, _MOST_LOGIT_COPIES) - 2 for name in parts_of(config.objective))
    reducing = 0.0
    if vocabulary.is_reduced:
        reducing = 5 * full if config.is_rollout else 3 * full + columns
    return 4 * config.num_speculative_tokens * max(copies * columns, reducing)


def _chain_bytes(runner: WindowRunner, config: PPOWConfig, length: int, each: int) -> float:
    """Of one window: the layers that its drafted tokens run through; a causal LM has run along the path already."""
    drafter, steps = Shapes.of(runner.drafter.model), config.num_speculative_tokens - 1
    if not runner.target.tap_layers and not config.is_rollout:
        return 0.0
    keys = length + steps * each / 2
    own = drafter.activations + _lora_activations(runner, config)
    # The mask, as it is made and as it is read.
    return steps * (own + 2 * keys * drafter.element)


def _lora_activations(runner: WindowRunner, config: PPOWConfig) -> int:
    """Bytes that a token leaves for the backward pass between A and B of all LoRA pairs, float32."""
    return 4 * config.lora_rank * len(_adapted(runner, config))


def _lora_weights(runner: WindowRunner, config: PPOWConfig) -> int:
    return config.lora_rank * sum(
        layer.in_features + layer.out_features for layer in _adapted(runner, config)
    )


def _adapted(runner: WindowRunner, config: PPOWConfig) -> list[torch.nn.Linear]:
    """Layers that LoRA adapts, whether it is there already or not."""
    names = tuple(f".{name}" for name in config.lora_targets or runner.drafter.lora_targets)
    return [
        module
        for name, module in runner.drafter.model.named_modules()
        if isinstance(module, torch.nn.Linear) and f".{name}".removesuffix(".base_layer").endswith(names)
    ]


def windows_that_fit(estimate: MemoryEstimate, available: float, windows: int) -> int:
    """The most windows whose forward and backward fit in `SHARE` of what is available.

    Args:
        available: bytes.
        windows: of a process's share of an update; forwards of a divisor of them are all alike.

    Raises:
        UserError: not even one window fits.
    """
    room = SHARE * available
    for size in range(windows, 0, -1):
        if windows % size == 0 and estimate.of(size) <= room:
            return size
    raise UserError(
        f"One window with its prefix needs about {gib(estimate.of(1))} of memory, {gib(room)} of {gib(available)} "
        "may be used: lower num_speculative_tokens or --max-new-tokens, drop long prompts, free memory, give "
        "--target-cache none, or set windows_per_forward, which is not checked."
    )
