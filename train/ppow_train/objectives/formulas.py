"""What an objective minimises in one line of text, for the model card. Left out: computing it (the other files)."""

from __future__ import annotations

from ppow_train.objectives.names import parts_of
from ppow_train.options import PPOWOptions

_FACTOR = {"trajectory": "q_τ(y_l)", "greedy": "Σ_v (p q_τ)_l", "sampled": "Σ_v min(p, q)_l"}
_SURVIVAL = {
    "trajectory": "Π_(l≤i) q_τ(y_l)",
    "greedy": "Π_(t<i) q_τ(y_t) · Σ_v (p q_τ)_i",
    "sampled": "Π_(t<i) min(1, q/p)(y_t) · Σ_v min(p, q)_i",
}
_CREDIT = {
    "published": "one standardised advantage per window",
    "acceptance": "A_t = 1[q < p] · (f(k) − f(t−1)) − baseline for each token",
}


def formula(options: PPOWOptions) -> str:
    """The formula of `options.objective` in the form that the other options give it; parts of a sum by semicolons."""
    text = _formula(options)
    return text.replace("q_τ(y_l)", "q_τ(argmax p_l)") if options.needs_argmax else text


def _formula(options: PPOWOptions) -> str:
    parts = [
        (f"{weight:g} times " if weight != 1 else "") + _part(name, options)
        for name, weight in parts_of(options.objective).items()
    ]
    return "; ".join(parts)


def _part(name: str, options: PPOWOptions) -> str:
    form = options.acceptance_form
    sharp = f", q_τ: q at temperature {options.greedy_sharpness_temperature:g}" if form != "sampled" else ""
    if name.startswith("cst:"):
        return _supervised(name.removeprefix("cst:"), options)
    if name == "drafts":
        s = f"s = {options.survival_smoothing:g}"
        return f"1 / (1 + Σ_i Π_(l≤i) ((1 − s) a_l + s)), a_l = {_FACTOR[form]}, {s}{sharp}"
    charged = "K" if options.cost_reading == "drafted" else "k"
    worth = f"f(k) = k / ({charged}γ + 1), γ = {options.draft_cost_ratio:g}"
    if name == "ppow":
        credit = _CREDIT[options.ppow_credit]
        return (
            f"clipped group-relative loss over G sampled windows (arXiv 2605.14978), reward {worth}, {credit}, and "
            f"{options.beta:g} · KL(q ‖ p)"
        )
    survival = _SURVIVAL[form] if name == "exact" else f"Π_(l≤i) {_FACTOR[form]}"
    return f"−Σ_i S_i · (f(i) − f(i−1)), S_i = {survival}, {worth}{sharp}"


def _supervised(loss: str, options: PPOWOptions) -> str:
    weights = f"w_i ∝ {options.position_decay:g}^i"
    if options.position_weights == "dpace":
        confidence = "q(argmax p)" if loss == "ce" else "Σ_v min(p, q)"
        weights = (
            f"w_i = Σ_(j≥i) Π_(l≤j) ((1 − α) c_l + α), c = {confidence}, α = {options.dpace_alpha:g} "
            "(D-PACE, arXiv 2605.18810)"
        )
    return f"Σ_i w_i · {loss}(p, q)_i over the positions of a window, a loss of the speculators library, {weights}"
