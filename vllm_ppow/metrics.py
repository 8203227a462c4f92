"""Acceptance counters of a running vLLM, under vLLM's names, as counts that are divided only when read.

Left out: collecting them (vLLM does), and Prometheus scraping.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable
from typing import Any

_PREFIX = "vllm:spec_decode_"


@dataclasses.dataclass(frozen=True)
class SpecDecodeCounts:
    """Counts since the engine started, or between two moments (`after - before`).

    Attributes:
        num_drafts: proposals verified; steps in which nothing was drafted are not among them.
        num_draft_tokens: tokens drafted.
        num_accepted_tokens: drafted tokens accepted, bonus tokens excluded.
        num_accepted_tokens_per_pos: accepted tokens by position in the draft, [num_speculative_tokens].
    """

    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    num_accepted_tokens_per_pos: tuple[int, ...]

    @classmethod
    def from_metrics(cls, metrics: Iterable[Any]) -> SpecDecodeCounts:
        """Read them from what `LLM.get_metrics()` returns, summed over engines.

        Raises:
            ValueError: there are none, because statistics are off or nothing speculates.
        """
        found = [metric for metric in metrics if metric.name.startswith(_PREFIX)]
        counters = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
        by_name = {name: [m.value for m in found if m.name == _PREFIX + name] for name in counters}
        if not all(by_name.values()):
            raise ValueError(
                f"No {_PREFIX}* metrics among the engine's: start it with a speculative_config and "
                "disable_log_stats=False."
            )
        vectors = [m.values for m in found if m.name == _PREFIX + "num_accepted_tokens_per_pos"]
        return cls(
            **{name: sum(values) for name, values in by_name.items()},
            num_accepted_tokens_per_pos=_add(vectors),
        )

    def __sub__(self, before: SpecDecodeCounts) -> SpecDecodeCounts:
        """The counts that were added since `before`."""
        return SpecDecodeCounts(
            self.num_drafts - before.num_drafts,
            self.num_draft_tokens - before.num_draft_tokens,
            self.num_accepted_tokens - before.num_accepted_tokens,
            _add([self.num_accepted_tokens_per_pos, [-n for n in before.num_accepted_tokens_per_pos]]),
        )

    @property
    def acceptance_length(self) -> float:
        """Tokens a verified draft yields, as vLLM reports it: accepted per draft + 1; nan without drafts."""
        return 1 + self.mean_accepted

    @property
    def mean_accepted(self) -> float:
        """Accepted tokens per draft, bonus excluded; nan without drafts."""
        return self.num_accepted_tokens / self.num_drafts if self.num_drafts else math.nan

    @property
    def acceptance_rate(self) -> float:
        """Accepted / drafted, in [0, 1]; nan without drafted tokens."""
        return self.num_accepted_tokens / self.num_draft_tokens if self.num_draft_tokens else math.nan

    @property
    def acceptance_per_position(self) -> tuple[float, ...]:
        """Share of drafts whose token at a position was accepted, [num_speculative_tokens]; unconditional."""
        if not self.num_drafts:
            return tuple(math.nan for _ in self.num_accepted_tokens_per_pos)
        return tuple(accepted / self.num_drafts for accepted in self.num_accepted_tokens_per_pos)


def _add(vectors: Iterable[Iterable[int]]) -> tuple[int, ...]:
    """Sum by position; a shorter vector counts as zero beyond its end."""
    return tuple(sum(values) for values in itertools.zip_longest(*vectors, fillvalue=0))
