"""What is minimised when windows lie on the target's own trajectories: window objectives, supervised ones, mixtures.

Published PPOW is not here: its clipped group-relative loss is TRL's own, fed by rollout.py and rewards.py. Every
objective here is a mean over windows and needs no sampling: y is the target's trajectory, p and q the target and
draft distributions along it. Where a head drafts from a reduced vocabulary, what is about acceptance (exact, overlap,
drafts, tv, nla) takes p as it is, what is about likeness (ce, kl_div, rkl, jsd) p renormalised on the draft vocabulary,
and lk_hybrid each of its parts in its own form; vocabulary.py tells why. choose.py chooses; the formulas are in
window.py, forms.py and supervised.py, as text for the model card in formulas.py, the names in names.py. What is given
here is imported when it is asked for, as the command line checks names before torch is loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppow_train.objectives.choose import Objective as Objective
    from ppow_train.objectives.choose import make_objective as make_objective
    from ppow_train.objectives.forms import AcceptanceForm as AcceptanceForm
    from ppow_train.objectives.forms import GreedyDrafts as GreedyDrafts
    from ppow_train.objectives.forms import GreedyTarget as GreedyTarget
    from ppow_train.objectives.forms import SampledDrafts as SampledDrafts
    from ppow_train.objectives.names import CST_LOSSES as CST_LOSSES
    from ppow_train.objectives.names import check_dpace as check_dpace
    from ppow_train.objectives.names import parse_objective as parse_objective
    from ppow_train.objectives.path_windows import PathWindows as PathWindows
    from ppow_train.objectives.supervised import continued_supervised as continued_supervised
    from ppow_train.objectives.supervised import dpace_supervised as dpace_supervised
    from ppow_train.objectives.window import drafts_per_token as drafts_per_token
    from ppow_train.objectives.window import exact as exact
    from ppow_train.objectives.window import overlap_window as overlap_window

_GIVEN_BY = {
    "choose": ("Objective", "make_objective"),
    "forms": ("AcceptanceForm", "GreedyDrafts", "GreedyTarget", "SampledDrafts"),
    "names": ("CST_LOSSES", "check_dpace", "parse_objective"),
    "path_windows": ("PathWindows",),
    "supervised": ("continued_supervised", "dpace_supervised"),
    "window": ("drafts_per_token", "exact", "overlap_window"),
}


def __getattr__(name: str) -> Any:
    for module, names in _GIVEN_BY.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
