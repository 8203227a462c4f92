"""Names of objectives and their weighted sums, `overlap + 4 * cst:tv`. Left out: what they mean (the other files)."""

from __future__ import annotations

import re

from ppow_train.errors import UserError

WINDOW_OBJECTIVES = ("exact", "overlap", "drafts")
CST_LOSSES = ("ce", "kl_div", "rkl", "jsd", "tv", "nla", "lk_hybrid")
CST_ALIASES = {"kl": "kl_div"}
DPACE_LOSSES = ("ce", "tv")

_TERM = re.compile(r"\s*(?:(?P<weight>[^*\s]+)\s*\*)?\s*(?P<name>[^*\s]*)\s*")
_PLUS = re.compile(r"(?<!\d[eE])\+")  # but not that of 1e+3


def parse_objective(text: str) -> str:
    """Normalise an objective: `ppow`, `exact`, `overlap`, `drafts`, `cst:LOSS`, or a weighted sum of all but the first.

    Parts keep their order, a weight of 1 is left out, and parts of one name are added up.

    Raises:
        UserError: an unknown name, with the known ones; a weight that is no number above 0; `ppow` in a sum.
    """
    if not isinstance(text, str):
        raise UserError(f"objective must be text like 'overlap + 4 * cst:tv', got {text!r}.")
    weights: dict[str, float] = {}
    for term in _PLUS.split(text):
        name, weight = _term(term, text)
        weights[name] = weights.get(name, 0.0) + weight
    if "ppow" in weights and weights != {"ppow": 1.0}:
        raise UserError(
            f"ppow drafts windows of its own and cannot be part of a sum, got {text!r}: "
            "train by ppow alone, or mix exact, overlap, drafts and cst:LOSS."
        )
    return " + ".join(
        name if weight == 1 else f"{str(weight).removesuffix('.0')} * {name}"
        for name, weight in weights.items()
    )


def parts_of(objective: str) -> dict[str, float]:
    """The weight of each part: `overlap + 4 * cst:tv` -> {"overlap": 1, "cst:tv": 4}. Raises as `parse_objective`."""
    return dict(_term(term, objective) for term in _PLUS.split(parse_objective(objective)))


def check_dpace(objective: str) -> None:
    """Refuse D-PACE weights for an objective with a supervised part that they do not fit, or with none.

    Raises:
        UserError: with the losses that they fit.
    """
    losses = [name for name in parts_of(objective) if name.startswith("cst:")]
    fitting = [f"cst:{loss}" for loss in DPACE_LOSSES]
    if not losses or not set(losses) <= set(fitting):
        raise UserError(
            f"position_weights dpace needs a confidence per token, which {' and '.join(fitting)} have, got objective "
            f"{objective!r}: take one of them, or position_weights decay."
        )


def _term(term: str, text: str) -> tuple[str, float]:
    match = _TERM.fullmatch(term)
    if match is None:
        raise UserError(f"objective must be a sum like 'overlap + 4 * cst:tv', got {text!r}.")
    weight = _weight(match["weight"] or "1", text)
    return _name(match["name"], text), weight


def _weight(number: str, text: str) -> float:
    try:
        weight = float(number)
    except ValueError:
        weight = float("nan")
    if not 0 < weight < float("inf"):
        raise UserError(f"objective: a weight must be a number above 0, got {number!r} in {text!r}.")
    return weight


def _name(name: str, text: str) -> str:
    if name in ("ppow", *WINDOW_OBJECTIVES):
        return name
    kind, _, loss = name.partition(":")
    loss = CST_ALIASES.get(loss, loss)
    if kind == "cst" and loss in CST_LOSSES:
        return f"cst:{loss}"
    known = ["ppow", *WINDOW_OBJECTIVES, *(f"cst:{loss}" for loss in (*CST_LOSSES, *CST_ALIASES))]
    where = "" if name == text else f" in {text!r}"
    raise UserError(
        f"objective must be one of {', '.join(known)}, or a sum like 'overlap + 4 * cst:tv', got {name!r}{where}."
    )
