"""What values the options of training can have, and the words in which another one is refused.

Plain Python, so that the command line asks before torch is loaded. Left out: what options mean together (config.py);
what they are (options.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ppow_train.errors import UserError
from ppow_train.options import CHOICES

MOST_SEED = 2**32 - 1
MOST_UPDATES = 10_000_000
MOST_CONTINUATIONS = 10_000

_Range = tuple[str, Callable[[Any], bool]]


def _at_least(least: int) -> _Range:
    return f">= {least}", lambda value: least <= value < math.inf


def _from_to(least: int, most: int) -> _Range:
    return f"in {least}..{most}", lambda value: least <= value <= most


_POSITIVE: _Range = ("> 0", lambda value: 0 < value < math.inf)
_SHARE: _Range = ("in 0..1", lambda value: 0 <= value <= 1)
_UP_TO_ONE: _Range = ("in (0, 1]", lambda value: 0 < value <= 1)
# transformers reads steps below 1 as a share of the run.
_STEPS: _Range = ("a whole number >= 1, or a share of the run below 1", lambda v: 0 < v < 1 or _whole(v, 1))

# An option that is None has no value to be wrong.
_RANGES: dict[str, _Range] = {
    "greedy_sharpness_temperature": _POSITIVE,
    "num_speculative_tokens": _at_least(1),
    "continuations": _from_to(1, MOST_CONTINUATIONS),
    "serving_temperature": _at_least(0),
    "greedy_sampling_temperature": _POSITIVE,
    "draft_cost_ratio": _at_least(0),
    "criticality_refresh": _at_least(1),
    "uniform_share": _SHARE,
    "adaptive_after": _SHARE,
    "survival_smoothing": ("in [0, 1)", lambda value: 0 <= value < 1),
    "proximity_quantile": ("in 0..1", lambda value: 0 < value < 1),
    "proximity_weight": _at_least(0),
    "proximity_epsilon": _at_least(0),
    "position_decay": _UP_TO_ONE,
    "dpace_alpha": _UP_TO_ONE,
    "max_steps": _from_to(1, MOST_UPDATES),
    "trajectories_per_step": _at_least(1),
    "windows_per_step": _at_least(1),
    "lora_rank": _at_least(1),
    "lora_alpha": _at_least(1),
    "windows_per_forward": _at_least(1),
    "learning_rate": _POSITIVE,
    "warmup_steps": _at_least(0),
    "beta": _at_least(0),
    "logging_steps": _STEPS,
    "save_steps": _STEPS,
    # While one is being written, the one before it must stay.
    "save_total_limit": _at_least(2),
    "eval_steps": (">= 1, or absent", lambda value: value >= 1),
    "early_stop_patience": _at_least(1),
    # What NumPy takes as a seed, which transformers sets as well.
    "seed": ("in 0..2^32 - 1", lambda value: 0 <= value <= MOST_SEED),
}


def check_ranges(options: Any) -> None:
    """Refuse the first option, an attribute of `options`, whose value cannot be.

    Raises:
        UserError: names it, what it must be and what it is.
    """
    for name, choices in CHOICES.items():
        value = getattr(options, name)
        require(value in choices, name, f"one of {', '.join(choices)}", repr(value))
    for name in _RANGES:
        check_range(name, getattr(options, name))


def check_range(name: str, value: Any) -> None:
    """Refuse a value of an option that cannot be; options without a range have any.

    Raises:
        UserError: names it, what it must be and what it is.
    """
    wanted, holds = _RANGES.get(name, ("", lambda value: True))
    require(value is None or holds(value), name, wanted, value)


def require(holds: bool, name: str, wanted: str, value: Any) -> None:
    """Raise UserError unless it holds."""
    if not holds:
        raise UserError(f"{name} must be {wanted}, got {value}.")


def _whole(value: float, least: int) -> bool:
    return least <= value < math.inf and int(value) == value
