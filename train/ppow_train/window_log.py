"""What the sampler chose and what the windows earned, one JSON line per logging interval in `windows.jsonl`.

A line holds histograms of criticality, of the drawn windows and of all that could have been drawn in the same updates,
the age of the criticality, and accepted tokens by position. All is kept as counts and sums, divided once, when written.
Left out: drawing (sampler.py), reading the file (window_lines.py), the plot (window_plot.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState

from ppow_train.sampler import Draw
from ppow_train.verification import overlap, survival_on_path, token_logps
from ppow_train.window_lines import complete_lines

_WINDOWS_AT_ONCE = 16  # of survival: its softmaxes must not double the memory of an update


def criticality_edges(kind: str, num_speculative_tokens: int) -> list[float]:
    """Edges of the histogram's bins, the same in every run, so that intervals and runs can be added and compared.

    `divergence`: nats, five bins per decade from 0.001 to 100 and one below; `lost_tokens`: tokens, 24 bins of 0..K.
    What lies beyond the last edge is counted in the last bin.
    """
    if kind == "divergence":
        return [0.0, *(10 ** (i / 5) for i in range(-15, 11))]
    return [num_speculative_tokens * i / 24 for i in range(25)]


@torch.no_grad()
def expected_acceptance(
    tokens: torch.Tensor, target_logits: torch.Tensor, draft_logits: torch.Tensor
) -> torch.Tensor:
    """Σ over windows of P(first i accepted), drafts sampled from q: `PathWindows` fields -> float64 [K] on the CPU."""
    total = torch.zeros(tokens.shape[1], dtype=torch.float64)
    split = (values.split(_WINDOWS_AT_ONCE) for values in (tokens, target_logits, draft_logits))
    for part, p, q in zip(*split, strict=True):
        survival = survival_on_path(token_logps(p, part), token_logps(q, part), overlap(p, q))
        total += survival.sum(0).double().cpu()
    return total


def counted_acceptance(num_accepted_tokens: torch.Tensor, num_speculative_tokens: int) -> torch.Tensor:
    """Windows whose first i drafted tokens were accepted: int64 [N] -> float64 [K] on the CPU."""
    positions = torch.arange(1, num_speculative_tokens + 1)
    return (num_accepted_tokens.cpu()[:, None] >= positions).sum(0).double()


class WindowLog(TrainerCallback):
    """Gathers an interval and writes its line when the trainer logs.

    Args:
        path: the file; a run that begins anew replaces it, one that goes on drops the lines past its checkpoint.
        kind: of criticality.
        num_speculative_tokens: K.
    """

    def __init__(self, path: Path, kind: str, num_speculative_tokens: int) -> None:
        self.path, self.kind = path, kind
        self.edges = criticality_edges(kind, num_speculative_tokens)
        self._inner = torch.tensor(self.edges[1:-1])
        self._length = num_speculative_tokens
        self._reset()

    def _reset(self) -> None:
        self.updates = self.adaptive_updates = 0
        self.chosen, self.candidates = (torch.zeros(len(self.edges) - 1, dtype=torch.long) for _ in range(2))
        self.criticality_sums = [0.0, 0.0]
        self.staleness = [0, 0, 0]  # trajectories, sum, largest
        self.accepted, self.windows = torch.zeros(self._length, dtype=torch.float64), 0

    # ------------------------------------------------------------ gathering

    def add_draw(self, draw: Draw) -> None:
        """Take in the windows of one update."""
        self.updates += 1
        if draw.chosen is None or draw.candidates is None or draw.staleness is None:
            return
        self.adaptive_updates += 1
        self.chosen += self._histogram(draw.chosen)
        self.candidates += self._histogram(draw.candidates)
        for i, values in enumerate((draw.chosen, draw.candidates)):
            self.criticality_sums[i] += values.double().sum().item()
        count, total, largest = self.staleness
        age = draw.staleness
        self.staleness = [count + len(age), total + int(age.sum()), max(largest, int(age.max()))]

    def _histogram(self, values: torch.Tensor) -> torch.Tensor:
        return torch.bucketize(values, self._inner, right=True).bincount(minlength=len(self.edges) - 1)

    def add_accepted(self, per_position: torch.Tensor, windows: int) -> None:
        """Take in accepted windows by position, [K] summed over `windows` of them: counted, or in expectation."""
        self.accepted += per_position
        self.windows += windows

    # ------------------------------------------------------------ writing

    def line(self, step: int) -> dict[str, Any]:
        """The interval so far, as it is written: numbers after `step` updates."""
        line: dict[str, Any] = {
            "step": step,
            "updates": self.updates,
            "adaptive_updates": self.adaptive_updates,
        }
        if self.adaptive_updates:
            chosen, candidates = int(self.chosen.sum()), int(self.candidates.sum())
            count, total, largest = self.staleness
            line["criticality"] = {
                "kind": self.kind,
                "edges": self.edges,
                "chosen": self.chosen.tolist(),
                "candidates": self.candidates.tolist(),
                "chosen_mean": self.criticality_sums[0] / chosen,
                "candidates_mean": self.criticality_sums[1] / candidates,
            }
            line["staleness"] = {"mean": total / count, "max": largest}
        if self.windows:
            shares = (self.accepted / self.windows).tolist()
            line["accepted"] = {"windows": self.windows, "per_position": shares}
        return line

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Begin the file, or go on with it after the checkpoint's last line."""
        if not state.is_world_process_zero:
            return
        kept = [line for line in complete_lines(self.path) if line["step"] <= state.global_step]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.part")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        temporary.replace(self.path)

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Write the interval's line with the log of its updates."""
        if "loss" in (logs or {}):
            self._write(state)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Write what came after the last log."""
        if self.updates:
            self._write(state)

    def _write(self, state: TrainerState) -> None:
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(self.line(state.global_step)) + "\n")
        self._reset()

    # ------------------------------------------------------------ resuming

    def state_dict(self) -> dict[str, Any]:
        """The open interval, in JSON values."""
        names = ("updates", "adaptive_updates", "criticality_sums", "staleness", "windows")
        tensors = ("chosen", "candidates", "accepted")
        return {name: getattr(self, name) for name in names} | {
            name: getattr(self, name).tolist() for name in tensors
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with an interval that `state_dict` gave."""
        for name, value in state.items():
            current = getattr(self, name)
            restored = (
                torch.tensor(value, dtype=current.dtype) if isinstance(current, torch.Tensor) else value
            )
            setattr(self, name, restored)
