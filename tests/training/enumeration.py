"""Speculative decoding on a vocabulary so small that every draft, every target path and every coin can be enumerated.

Slow loops in double precision, written from the definition of rejection sampling alone: the oracle of the acceptance
maths. Left out: everything under test.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import torch


@dataclasses.dataclass(frozen=True)
class Tables:
    """Conditional distributions of target and draft, one row of logits per prefix.

    Attributes:
        target_logits, draft_logits: for each step t a float64 tensor [V, …, V] with t + 1 dimensions; the draft's last
            dimension is D if it can draft D of the V tokens only.
        draftable: the D tokens, in the order of that dimension; None for all of them.
    """

    target_logits: list[torch.Tensor]
    draft_logits: list[torch.Tensor]
    draftable: tuple[int, ...] | None = None

    @property
    def vocab_size(self) -> int:
        return len(self.target_logits[0])

    @property
    def num_speculative_tokens(self) -> int:
        return len(self.target_logits)

    @property
    def draft_tokens(self) -> tuple[int, ...]:
        """Tokens that can be drafted, by their column in `draft_logits`."""
        return self.draftable or tuple(range(self.vocab_size))

    def paths(self) -> Iterator[tuple[int, ...]]:
        """Every window that the target may write."""
        return itertools.product(range(self.vocab_size), repeat=self.num_speculative_tokens)

    def drafts(self) -> Iterator[tuple[int, ...]]:
        """Every window that may be drafted."""
        return itertools.product(self.draft_tokens, repeat=self.num_speculative_tokens)

    def along(self, path: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Target logits [K, V] and draft logits [K, D] along a window."""
        steps = range(self.num_speculative_tokens)
        return (
            torch.stack([self.target_logits[t][path[:t]] for t in steps]),
            torch.stack([self.draft_logits[t][path[:t]] for t in steps]),
        )

    def chances(self, path: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """p and q of each token of a window, [K] each."""
        p, q = (logits.softmax(-1) for logits in self.along(path))
        tokens = self.draft_tokens
        q_of_path = [
            row[tokens.index(token)] if token in tokens else row.new_zeros(())
            for row, token in zip(q, path, strict=True)
        ]
        return p[range(self.num_speculative_tokens), path], torch.stack(q_of_path)


def random_tables(
    vocab_size: int,
    num_speculative_tokens: int,
    seed: int,
    by_path: bool = True,
    draftable: tuple[int, ...] | None = None,
) -> Tables:
    """Tables of random logits; with `by_path` False they depend on the step only."""
    generator = torch.Generator().manual_seed(seed)

    def one(step: int, columns: int) -> torch.Tensor:
        rows = [vocab_size] * step if by_path else [1] * step
        logits = torch.randn(*rows, columns, generator=generator, dtype=torch.float64) * 1.5
        return logits.expand(*[vocab_size] * step, columns).clone()

    steps = range(num_speculative_tokens)
    columns = len(draftable or range(vocab_size))
    return Tables(
        [one(t, vocab_size) for t in steps], [one(t, columns).requires_grad_() for t in steps], draftable
    )


def accepted_length_distribution(tables: Tables) -> torch.Tensor:
    """P(k = 0), …, P(k = K) of rejection sampling: sum over all drafts and all K coins, [K + 1], differentiable."""
    length = tables.num_speculative_tokens
    total = [torch.zeros((), dtype=torch.float64)] * (length + 1)
    for draft in tables.drafts():
        p, q = tables.chances(draft)
        keep = torch.minimum(p / q, torch.ones_like(p))
        for coins in itertools.product((True, False), repeat=length):
            chance = q.prod()
            for t, kept in enumerate(coins):
                chance = chance * (keep[t] if kept else 1 - keep[t])
            k = coins.index(False) if False in coins else length
            total[k] = total[k] + chance
    return torch.stack(total)


def survival(tables: Tables) -> torch.Tensor:
    """P(first i accepted) for i = 1..K, [K], differentiable."""
    return accepted_length_distribution(tables).flip(0).cumsum(0).flip(0)[1:]


def agreement_survival(tables: Tables) -> torch.Tensor:
    """P(first i drafts are accepted with probability p), i = 1..K, [K]: sum over all drafts, differentiable."""
    total = torch.zeros(tables.num_speculative_tokens, dtype=torch.float64)
    for draft in tables.drafts():
        p, q = tables.chances(draft)
        total = total + q.prod() * p.cumprod(0)
    return total


def greedy_draft(tables: Tables) -> tuple[int, ...]:
    """The one window that a greedy drafter drafts."""
    draft: tuple[int, ...] = ()
    for logits in tables.draft_logits:
        draft += (tables.draft_tokens[int(logits[draft].argmax())],)
    return draft


def greedy_path(tables: Tables) -> tuple[int, ...]:
    """The one window that the target writes at temperature 0."""
    path: tuple[int, ...] = ()
    for logits in tables.target_logits:
        path += (int(logits[path].argmax()),)
    return path
