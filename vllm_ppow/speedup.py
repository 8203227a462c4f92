"""Pure cost and speedup formulas: the one copy that reward, draft window and benchmark share.

No torch, no vLLM: plain floats in, plain floats out. What a token costs is measured elsewhere; here it is only
counted. Left out: anything that samples, verifies or decides.
"""

import itertools


def speedup_reward(
    num_accepted_tokens: float, draft_cost_ratio: float, num_charged_tokens: float | None = None
) -> float:
    """Worth of one window: R_speedup(k) = k / (k·γ + 1), or k / (K·γ + 1) where all K drafted tokens are charged.

    Source: PPOW (arXiv 2605.14978), reward section; its γ is our `draft_cost_ratio` (paper: 0.12). It charges for the
    accepted tokens; charging for the drafted ones is ours: serving pays for K draft steps whatever is accepted.

    Args:
        num_accepted_tokens: k, draft tokens that the target accepted, bonus token excluded (>= 0).
        draft_cost_ratio: γ, time of one draft step divided by the time of one target step (>= 0).
        num_charged_tokens: K, draft tokens to charge for (>= k); k where not given.

    Returns:
        A reward in target steps, increasing in k, 0 at k = 0: as published concave in k and below 1/γ, with K linear.
    """
    charged = num_accepted_tokens if num_charged_tokens is None else num_charged_tokens
    return num_accepted_tokens / (charged * draft_cost_ratio + 1.0)


def speedup_increments(
    num_speculative_tokens: int, draft_cost_ratio: float, num_charged_tokens: float | None = None
) -> list[float]:
    """What accepting one more token adds: f(i) − f(i−1) for i = 1..K, with f = `speedup_reward`.

    With these, E[R] = Σ_i P(first i accepted) · (f(i) − f(i−1)), since Σ_{i<=k} of them is f(k) (ours).

    Returns:
        K floats, positive and decreasing, or all alike with `num_charged_tokens`.
    """
    worth = [
        speedup_reward(k, draft_cost_ratio, num_charged_tokens) for k in range(num_speculative_tokens + 1)
    ]
    return [after - before for before, after in itertools.pairwise(worth)]


def expected_speedup(
    num_accepted_tokens: float, num_speculative_tokens: int, draft_cost_ratio: float
) -> float:
    """Expected tokens per unit of target-step time when every draft is K tokens long (ours).

    (1 + E[accepted(K)]) / (1 + K·γ): what a chain of K buys over one token per target step.
    Unlike in `speedup_reward`, the bonus token counts, and all K drafted tokens are always paid for.

    Args:
        num_accepted_tokens: E[accepted(K)], of drafts of that length (other_lengths.py); >= 0.
        num_speculative_tokens: K >= 0.
        draft_cost_ratio: γ >= 0.
    """
    return (1.0 + num_accepted_tokens) / (1.0 + num_speculative_tokens * draft_cost_ratio)


def tokens_per_second(batch: int, num_accepted_tokens: float, seconds: float) -> float:
    """What a step of a batch produces, B · (1 + E[accepted]) / step_seconds, bonus tokens included (ours).

    Args:
        batch: B requests (>= 1).
        num_accepted_tokens: E[accepted] of one request's draft.
        seconds: of the step (> 0).
    """
    return batch * (1.0 + num_accepted_tokens) / seconds
