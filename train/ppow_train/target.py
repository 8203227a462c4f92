"""The target: frozen, encoded once per trajectory, asked for its distribution on and off the path.

Left out: how its trajectories are generated (generation.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ppow_train import causal
from ppow_train.errors import UserError
from ppow_train.loading import load_causal_lm
from ppow_train.types import Encoded, Reading, Trajectories


class Target:
    """A frozen causal language model.

    Args:
        directory: its Hugging Face directory.
        tap_layers: residual streams that the drafter reads (EAGLE-3), or none.
        device, dtype: where and how it runs; "auto" is the checkpoint's own dtype. Logits are float32 all the same.

    Raises:
        UserError: the drafter reads layers that it lacks, or how its logits come to be is not known.
    """

    def __init__(
        self,
        directory: Path,
        tap_layers: tuple[int, ...] = (),
        device: str = "cpu",
        dtype: str = "float32",
    ) -> None:
        self.directory = directory
        self.tap_layers = tap_layers
        self._last: list[tuple[Reading, Encoded]] = []
        self.model = load_causal_lm(directory, dtype, device).eval()
        self.model.requires_grad_(False)
        causal.check_head(self.model)
        layers = self.model.config.get_text_config().num_hidden_layers
        # The last state that transformers returns is normalised already; vLLM hands a head the one before the norm.
        if not all(0 <= tap < layers for tap in tap_layers):
            raise UserError(
                f"The EAGLE head reads the target after layers {tap_layers}, which must be below the {layers} of "
                f"{directory}: give the target that the head was made for."
            )

    @property
    def vocab_size(self) -> int:
        """V of the logits."""
        return self.model.get_output_embeddings().weight.shape[0]

    def check_length(self, length: int) -> None:
        """Raise UserError if windows cannot be scored behind trajectories of so many tokens (`causal.check_span`)."""
        causal.check_span(self.model, length)

    def encode(self, trajectories: Trajectories) -> Encoded:
        """One pass over the trajectories, all of whose slots may be read (see `encode_parts`)."""
        return self.encode_parts([Reading(trajectories)])[0]

    @torch.no_grad()
    def encode_parts(self, parts: Sequence[Reading]) -> list[Encoded]:
        """One pass over each part (see `causal.encode`), or none: it is frozen, so the last answer is kept.

        Criticality, verification and update of one step ask for the same trajectories.
        """
        if not self.remembers(parts):
            self._last = []  # before the pass: two answers need not fit
            self._last = [
                (part, causal.encode(self.model, part.trajectories, self.tap_layers, part.read))
                for part in parts
            ]
        return [encoded for _, encoded in self._last]

    def remembers(self, parts: Sequence[Reading]) -> bool:
        """Whether the last answer was about these very parts."""
        return len(parts) == len(self._last) and all(
            part.covered_by(last) for part, (last, _) in zip(parts, self._last, strict=True)
        )

    def forget(self) -> None:
        """Give back the memory of the last answer."""
        self._last = []

    @torch.no_grad()
    def path_logits(
        self, encoded: Encoded, starts: torch.Tensor, num_speculative_tokens: int
    ) -> torch.Tensor:
        """Logits [B, W, K, V] along the target's own windows."""
        return causal.path_logits(self.model, encoded, starts, num_speculative_tokens)

    @torch.no_grad()
    def score(self, encoded: Encoded, starts: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [B, W, K, V] along drafted windows: the off-path forward that verification needs."""
        return causal.block_logits(self.model, encoded, starts, tokens)
