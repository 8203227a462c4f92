"""Options that were given and change nothing in a run, and why: told, not refused, since one file may serve many runs.

Left out: what is refused (config.py, ranges.py); TRL's own options.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from ppow_train.objectives.names import WINDOW_OBJECTIVES, parts_of
from ppow_train.options import PPOWOptions, spelled

_PROXIMITY = ("proximity_weight", "proximity_quantile", "proximity_epsilon")
_CRITICALITY = ("criticality", "criticality_refresh")

# Options and the objectives that use them; a sum uses what any of its parts does.
_USED_BY = {
    ("draft_cost_ratio", "cost_reading"): {"ppow", "exact", "overlap"},
    ("ppow_credit", "num_generations", "beta", *_PROXIMITY): {"ppow"},
    ("position_weights", "position_decay", "dpace_alpha"): {"cst"},
    ("greedy_target", "greedy_sharpness_temperature"): set(WINDOW_OBJECTIVES),
    ("survival_smoothing",): {"drafts"},
}

# Whether something holds, what to say then, and the options that are not used then.
_Rule = tuple[bool, str, tuple[str, ...]]


def unused_options(given: dict[str, Any]) -> dict[str, list[str]]:
    """Those of the given options that change nothing.

    Args:
        given: options that the user set, by name, and no others.

    Returns:
        Their names in the order given, by the reason, such as "by objective cst:jsd".

    Raises:
        UserError: as `parse_objective`.
    """
    known = {option.name for option in dataclasses.fields(PPOWOptions)}
    options = PPOWOptions(**{name: value for name, value in given.items() if name in known})
    options.adaptive_windows = spelled(options.adaptive_windows)
    kinds = {part.partition(":")[0] for part in parts_of(options.objective)}
    rules = [*_of_objective(options, kinds), *_of_temperature(options, kinds), *_of_others(options)]
    unused: dict[str, list[str]] = {}
    for name in given:
        reason = next((reason for holds, reason, names in rules if holds and name in names), None)
        if reason is not None:
            unused.setdefault(reason, []).append(name)
    return unused


def _of_objective(options: PPOWOptions, kinds: set[str]) -> Iterator[_Rule]:
    """What the objective's formula has no place for, and what other options take out of it."""
    for names, users in _USED_BY.items():
        yield not kinds & users, f"by objective {options.objective}", names
    yield options.ppow_credit == "acceptance", "with ppow_credit acceptance", _PROXIMITY
    yield options.proximity_weight == 0, "with proximity_weight 0", _PROXIMITY[1:]
    yield options.proximity_epsilon is not None, "with proximity_epsilon", ("proximity_quantile",)
    is_dpace = options.position_weights == "dpace"
    yield is_dpace, "with position_weights dpace", ("position_decay",)
    yield not is_dpace, f"with position_weights {options.position_weights}", ("dpace_alpha",)


def _of_temperature(options: PPOWOptions, kinds: set[str]) -> Iterator[_Rule]:
    """What is for greedy drafts or a greedy target."""
    temperature = f"at serving_temperature {options.serving_temperature:g}"
    greedy_only = ("greedy_target", "greedy_sampling_temperature")
    yield options.serving_temperature > 0, temperature, greedy_only
    sharpness = ("greedy_sharpness_temperature",)
    is_sampled = options.acceptance_form == "sampled"
    yield is_sampled and options.serving_temperature == 0, "with greedy_target soft", sharpness
    yield is_sampled, f"with draft_sample_method {options.draft_sample_method}", sharpness
    # Sharpness takes its place (forms.py), and nothing else looks at p or q.
    is_replaced = kinds <= set(WINDOW_OBJECTIVES) and options.acceptance_form == "trajectory"
    is_asked = options.continuations > 1 or options.draws_by_criticality
    yield is_replaced and not is_asked, "with greedy_target hard", ("greedy_sampling_temperature",)


def _of_others(options: PPOWOptions) -> Iterator[_Rule]:
    """What hangs on a switch that has nothing to do with the objective."""
    wanted, mixed = options.wants_adaptive_windows, options.uniform_share < 1
    without, switch = "without adaptive_windows true", "adaptive_windows"
    yield not wanted, without, (*_CRITICALITY, "uniform_share", "adaptive_after")
    yield wanted and not mixed, "with uniform_share 1", (*_CRITICALITY, "adaptive_after", switch)
    late = f"with adaptive_after {options.adaptive_after:g} and max_steps {options.max_steps}"
    is_late = wanted and mixed and not options.draws_by_criticality
    yield is_late, late, (*_CRITICALITY, "uniform_share", switch)
    yield options.eval_steps is None, "without eval_steps", ("keep_best",)
    yield not options.push_to_hub, "without push_to_hub", ("hub_model_id", "hub_private_repo")
    yield options.save_strategy == "no", "with save_strategy no", ("save_steps", "save_total_limit")
