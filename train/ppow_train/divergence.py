"""Ends a run whose weights are no numbers any more, at the update that made them so.

One loss that is not finite turns every trained tensor into NaN, by clipping and AdamW, and transformers logs it as 0.
All processes hold the same weights, so all of them end. Left out: why a loss is not finite; which adapter of such a
run is kept, if one is (selection.py).
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback

from ppow_train.errors import UserError


class Diverged(UserError):
    """The weights are no numbers any more.

    Attributes:
        update: that made them so, counted from 1.
    """

    def __init__(self, message: str, update: int) -> None:
        super().__init__(message)
        self.update = update


class Divergence(TrainerCallback):
    """Looks at the trained weights after every update, before anything of it is saved."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise Diverged if one of them is not finite."""
        trained = [weight for weight in kwargs["model"].parameters() if weight.requires_grad]
        if bool(torch.stack([weight.isfinite().all() for weight in trained]).all()):  # one wait for a GPU
            return
        unfinished = (
            f" and delete {args.output_dir}, its unfinished run" if args.save_strategy != "no" else ""
        )
        raise Diverged(
            f"Training diverged at update {state.global_step}: weights are no numbers any more, and no adapter was "
            f"written. Lower --learning-rate, or give --target-dtype float32{unfinished}.",
            state.global_step,
        )
