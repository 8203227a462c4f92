"""Several processes: the packed forward inside the wrapped module, and who does what only one process may do.

accelerate wraps a model (DDP, autocast) around its `forward`, and TRL splits the rows of an update in the order of the
processes. Left out: the split of an update into forwards (microbatches.py), launching.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from ppow_train.rollout import Run

# What torchrun and `accelerate launch` tell a process about its group.
_GROUP_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE",
                    "ROLE_RANK", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # fmt: skip


def admit_computations(model: torch.nn.Module) -> None:
    """Let `model(compute=f)` run f, which reads the model's layers one by one, in place of its own forward.

    Packed windows are no forward that a model offers, but DDP synchronises gradients, and accelerate switches autocast
    on, only around the model's own. Done on the instance, as TRL does with its fused head; undone by `del
    model.forward`.

    Dropout is off in f, as it is in serving: the distribution that drafts is the one that is trained, and neither the
    number of forwards nor that of processes changes it.
    """
    own = model.forward

    def forward(*args: Any, compute: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        if compute is None:
            return own(*args, **kwargs)
        model.eval()  # a trainer turns it off before every update
        return compute()

    model.forward = forward


def inside(model: torch.nn.Module) -> Run:
    """Run the drafter's part within `model`'s forward, whatever is wrapped around it (see `admit_computations`)."""
    return lambda compute: model(compute=compute)


def leave_group() -> None:
    """Take this process out of its group: an engine that it starts afterwards must not think itself a part of it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name in [*os.environ]:
        if name in _GROUP_VARIABLES or name.startswith("TORCHELASTIC_"):
            del os.environ[name]
