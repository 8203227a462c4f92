"""What drafts of another length would get accepted, from what drafts of one length were.

How long drafts are decides where the next ones start. One that ends in a rejection is followed by a draft that starts
behind a token that was hard to guess; one that is accepted whole, by one in the midst of text that is easy. Long drafts
skip easy text in a few steps, so that most of them start in hard text; short ones start in easy text again and again.
The first K positions of long drafts therefore undervalue drafts of K tokens, on the tiny pair by 6 to 13 % of the
accepted tokens (examples/benchmarks/draft_lengths.py).

What shorter drafts would have made of the same text can be counted, though: where j tokens were accepted, drafts of K
tokens would have been whole every K + 1 tokens, and the last one of them ended with the long one. Pure Python, some
twenty microseconds. Left out: counting (acceptance.py), what steps cost (step_cost.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def accepted_by_length(survival: Sequence[float], counted: float) -> list[float]:
    """E[accepted tokens] of drafts of K = 0, 1, …, each length kept for good (ours).

    Of K <= n, where drafts of n tokens were counted, the larger of two lower bounds:

    - Σ_{i<=K} S_i, as if drafts of K tokens started where those of n did: they start in easier text, see above;
    - (1 + Σ_{i<=n} S_i) / D_K − 1, with D_K drafts of K tokens over the text of one of n: a token that was accepted
      deep in a long draft would have been at the start of a fresh one, which knows more of the text before it.

    Of K > n it is 1 + Σ_{i<=K} S_i scaled, so that these rules, applied from K to n, give what was counted at n.

    Args:
        survival: S_i = P(first i drafted tokens accepted), i = 1..maximum, never rising; beyond n as good as known.
        counted: n, the length of the drafts that it was counted on (a mean, between lengths if need be; >= 1).

    Returns:
        maximum + 1 numbers, never falling, from 0.
    """
    sums = [0.0, *itertools.accumulate(survival)]
    known = min(max(counted, 1.0), float(len(survival)))
    below = int(known)
    found = _from(survival, sums, below)
    if share := known - below:
        above = _from(survival, sums, below + 1)
        found = [low + share * (high - low) for low, high in zip(found, above, strict=True)]
    return list(itertools.accumulate(found, max))


def _from(survival: Sequence[float], sums: Sequence[float], counted: int) -> list[float]:
    """`accepted_by_length` of drafts of a whole number of tokens; `sums` are those of `survival`, from 0 on."""
    own = sums[counted]
    shorter = [_shorter(survival, sums, counted, length) for length in range(counted)]
    longer = [
        (1.0 + sums[length]) * (1.0 + own) / (1.0 + _shorter(survival, sums, length, counted)) - 1.0
        for length in range(counted + 1, len(sums))
    ]
    return [*shorter, own, *longer]


def _shorter(survival: Sequence[float], sums: Sequence[float], counted: int, length: int) -> float:
    """E[accepted tokens] of drafts of `length` tokens, fewer than `counted`; no more than the counted ones get."""
    if not length:
        return 0.0
    tokens = 1.0 + sums[counted]  # with the target's own at the end
    return min(sums[counted], max(sums[length], tokens / _drafts(survival, counted, length) - 1.0))


def _drafts(survival: Sequence[float], counted: int, length: int) -> float:
    """D_K: drafts of K tokens over the text of one of n: one, and another behind every K + 1 accepted tokens.

    Behind an n-draft that was accepted whole, the last of them would have gone on, over text of the next n-draft. It
    counts by its share of tokens in this one; it is taken to go on as the last position does.
    """
    whole = survival[counted - 1]
    inside, chance = counted % (length + 1), _last_chance(survival, counted)
    left = length - inside
    goes_on = chance * (1.0 - chance**left) / (1.0 - chance) if chance < 1.0 else float(left)
    share = (inside + 1.0) / (1.0 + inside + goes_on)
    return 1.0 + sum(survival[length : counted : length + 1]) + whole * (share - 1.0)


def _last_chance(survival: Sequence[float], counted: int) -> float:
    """P(the last of n tokens accepted | those before it were)."""
    before = survival[counted - 2] if counted > 1 else 1.0
    return survival[counted - 1] / before if before > 0 else 0.0
