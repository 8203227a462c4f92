"""What a transformer's memory depends on, and how many whole trajectories it reads at once where nothing is learned.

Criticality, held-out prompts and the target's kept states are passes over whole trajectories without gradients. Each is
bounded by the tokens it reads, padding included: by bytes and by the model alone, so that a resumed run, or another
machine, reads the same trajectories together and rounds alike. Left out: updates, which are divided by windows
(microbatches.py); what either takes in all (memory.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ppow_train.errors import UserError

if TYPE_CHECKING:
    from ppow_train.target import Target

# States of one such pass: 8,700 tokens of an 8B target in bfloat16 that a head reads.
PASS_BYTES = 4 * 2**30
_INTERMEDIATE_NAMES = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Sizes of a transformer; `queries` and `keys` are features of a token in all its heads."""

    layers: int
    hidden: int
    intermediate: int
    queries: int
    keys: int
    element: int

    @classmethod
    def of(cls, model: Any) -> Shapes:
        """Those of a model of transformers or of the speculators library.

        Raises:
            UserError: its config does not name them as any model known here does.
        """
        config = getattr(model.config, "transformer_layer_config", None) or model.config.get_text_config()
        try:
            return cls._of(config, next(model.parameters()).element_size())
        except AttributeError as error:
            raise UserError(
                f"The config of {type(model).__name__} does not tell its sizes ({error}): take another model."
            ) from error

    @classmethod
    def _of(cls, config: Any, element: int) -> Shapes:
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        keys = (getattr(config, "num_key_value_heads", None) or heads) * head_dim
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=_intermediate(config),
            queries=heads * head_dim,
            keys=keys,
            element=element,
        )

    @property
    def activations(self) -> float:
        """Bytes that one token leaves for the backward pass in all layers."""
        floats = 9 * self.hidden + 4 * self.intermediate + 2 * (self.queries + self.keys)
        return self.layers * floats * self.element

    @property
    def last_feed_forward(self) -> float:
        """Those of them that the last layer has only where it is read (last_layer.py)."""
        return (4 * self.intermediate + self.hidden) * self.element

    @property
    def cached(self) -> int:
        """Bytes of a token's keys and values in all layers."""
        return 2 * self.layers * self.keys * self.element

    def states(self, taps: int) -> int:
        """Bytes of a token's last hidden state and of its taps."""
        return (taps + 1) * self.hidden * self.element

    def at_work(self, taps: int) -> int:
        """Bytes of a token in a pass without gradients beside what is kept of it: one layer is at work.

        If any residual stream is tapped, all of them are returned.
        """
        streams = self.layers * self.hidden if taps else 0
        return (streams + 3 * self.intermediate) * self.element


def _intermediate(config: Any) -> int:
    """Features between the two halves of a feed-forward layer, under the names that families of models give them.

    Those that give none (Bloom) have four times the hidden size, as in the first Transformer.
    """
    named = (getattr(config, name, None) for name in _INTERMEDIATE_NAMES)
    # Gemma 3n has one for each layer; the largest is counted for all.
    return next((max(n) if isinstance(n, list) else n for n in named if n), 4 * config.hidden_size)


def pass_bytes_per_token(target: Target) -> int:
    """What a token takes while the target reads it and nothing is learned."""
    shapes, taps = Shapes.of(target.model), len(target.tap_layers)
    return shapes.states(taps) + shapes.cached + shapes.at_work(taps)


def tokens_at_once(target: Target) -> int:
    """Tokens, padding included, that the target reads in one such pass; a longer trajectory is read alone."""
    return PASS_BYTES // pass_bytes_per_token(target)


def batches(lengths: Sequence[int], tokens: float, most: float = math.inf) -> Iterator[slice]:
    """Trajectories that follow one another, as many at a time as the bounds allow, one at least.

    Args:
        lengths: of the trajectories, in the order in which they are read.
        tokens: of a batch, each trajectory counted as long as the longest in it.
        most: trajectories of a batch.
    """
    begin, longest = 0, 0
    for end, length in enumerate(lengths):
        together = end - begin + 1
        if end > begin and (together > most or together * max(longest, length) > tokens):
            yield slice(begin, end)
            begin, longest = end, 0
        longest = max(longest, length)
    if begin < len(lengths):
        yield slice(begin, len(lengths))


def padded_tokens(lengths: Sequence[int], tokens: float, most: float = math.inf) -> int:
    """Tokens, padding included, of the largest of `batches`; 0 without trajectories."""
    return max(
        ((part.stop - part.start) * max(lengths[part]) for part in batches(lengths, tokens, most)), default=0
    )
