"""How a target accepts drafts, in the three ways that it is served: what window objectives are made of (ours).

Each form knows two numbers of every position of a window. `acceptance`: the chance that the draft token there is
accepted once it is reached. `survival_on_path`: an estimate of the chance that all up to it are, unbiased over target
paths.

Where drafts are greedy, a = argmax q is accepted with chance p(a) (at temperature 0: if a is the target's own token), a
step function of the weights without a gradient. There q_τ = q^s / Σ q^s stands for the argmax, q at a temperature τ
below that of training, s = training temperature / τ: it becomes the argmax as τ -> 0. Left out: what survival is worth
(window.py).
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch

from ppow_train.objectives.path_windows import PathWindows
from ppow_train.options import PPOWOptions
from ppow_train.verification import agreement, agreement_on_path, overlap, survival_on_path, token_logps


class AcceptanceForm(Protocol):
    """Both numbers, [N, K] in [0, 1], differentiable in the draft."""

    def acceptance(self, windows: PathWindows) -> torch.Tensor:
        """Chance that draft token l is accepted once it is reached."""
        ...

    def survival_on_path(self, windows: PathWindows) -> torch.Tensor:
        """Estimate of P(first i accepted) on the window's trajectory."""
        ...


@dataclasses.dataclass(frozen=True)
class SampledDrafts:
    """Drafts drawn from q and kept with chance min(1, p/q)."""

    def acceptance(self, windows: PathWindows) -> torch.Tensor:
        """Σ_v min(p, q)."""
        return overlap(windows.target_logits, windows.draft_logits)

    def survival_on_path(self, windows: PathWindows) -> torch.Tensor:
        """Π_{t<i} min(1, q/p)(y_t) · Σ_v min(p_i, q_i); see `verification.survival_on_path`."""
        target_logps = token_logps(windows.target_logits, windows.tokens)
        draft_logps = token_logps(windows.draft_logits, windows.tokens)
        return survival_on_path(target_logps, draft_logps, self.acceptance(windows))


@dataclasses.dataclass(frozen=True)
class GreedyDrafts:
    """Drafts a = argmax q at temperature > 0, kept with chance p(a).

    As τ -> 0, E_y of the survival becomes E_y[Π_{t<i} 1[y_t = a_t] · p_i(a_i)]: what greedy drafts survive.

    Attributes:
        sharpening: s = training temperature / τ.
    """

    sharpening: float

    def acceptance(self, windows: PathWindows) -> torch.Tensor:
        """Σ_v p q_τ."""
        return agreement(windows.target_logits, windows.draft_logits * self.sharpening)

    def survival_on_path(self, windows: PathWindows) -> torch.Tensor:
        """Π_{t<i} q_τ(y_t) · Σ_v p_i q_τ,i; see `verification.agreement_on_path`."""
        sharp = windows.draft_logits * self.sharpening
        return agreement_on_path(token_logps(sharp, windows.tokens), agreement(windows.target_logits, sharp))


@dataclasses.dataclass(frozen=True)
class GreedyTarget:
    """Temperature 0: a draft token is kept if it is the target's own, a = argmax p.

    On a greedy trajectory that is y, and nothing is random: survival on the path is the product of the acceptances. On
    a sampled one the product goes on behind the first y that is not a, where prefixes are other ones than serving
    would come to: a surrogate there, as that of `overlap` is.

    Attributes:
        sharpening: s = training temperature / τ.
    """

    sharpening: float

    def acceptance(self, windows: PathWindows) -> torch.Tensor:
        """q_τ(a_l)."""
        return self._logps(windows).exp()

    def survival_on_path(self, windows: PathWindows) -> torch.Tensor:
        """Π_{l<=i} q_τ(a_l)."""
        return self._logps(windows).cumsum(-1).exp()

    def _logps(self, windows: PathWindows) -> torch.Tensor:
        own = windows.tokens if windows.greedy_tokens is None else windows.greedy_tokens
        return token_logps(windows.draft_logits * self.sharpening, own)


def make_form(options: PPOWOptions) -> AcceptanceForm:
    """The form that fits how drafts are served."""
    sharpening = options.training_temperature / options.greedy_sharpness_temperature
    if options.acceptance_form == "trajectory":
        return GreedyTarget(sharpening)
    if options.acceptance_form == "greedy":
        return GreedyDrafts(sharpening)
    return SampledDrafts()
