"""The function to minimise, by the name of an objective. Left out: names (names.py), formulas (the other files)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from ppow_train.objectives.forms import make_form
from ppow_train.objectives.names import parts_of
from ppow_train.objectives.path_windows import PathWindows
from ppow_train.objectives.supervised import continued_supervised, dpace_supervised
from ppow_train.objectives.window import drafts_per_token, exact, overlap_window
from ppow_train.options import PPOWOptions

Objective = Callable[[PathWindows], torch.Tensor]


def make_objective(options: PPOWOptions) -> Objective:
    """The function to minimise for an objective that works on target paths (all but `ppow`): Σ_j w_j · part_j.

    Raises:
        UserError: unknown name.
    """
    parts = [(weight, _part(name, options)) for name, weight in parts_of(options.objective).items()]

    def objective(windows: PathWindows) -> torch.Tensor:
        return torch.stack([weight * part(windows) for weight, part in parts]).sum()

    return objective


def _part(name: str, options: PPOWOptions) -> Objective:
    if name.startswith("cst:"):
        return _supervised(name.removeprefix("cst:"), options)
    form = make_form(options)
    if name == "drafts":
        return lambda windows: drafts_per_token(form.acceptance(windows), options.survival_smoothing)
    if name not in ("exact", "overlap"):
        raise ValueError(f"{name} is not an objective on target paths")
    return partial(
        exact if name == "exact" else overlap_window,
        draft_cost_ratio=options.draft_cost_ratio,
        num_charged_tokens=options.num_charged_tokens,
        form=form,
    )


def _supervised(loss: str, options: PPOWOptions) -> Objective:
    if options.position_weights == "dpace":
        return partial(dpace_supervised, loss_name=loss, alpha=options.dpace_alpha)
    return partial(continued_supervised, loss_name=loss, position_decay=options.position_decay)
