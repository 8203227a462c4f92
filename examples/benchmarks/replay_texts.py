"""Texts to replay: what of a draft the target accepts at every start, and how sure of it the drafter was.

Made of the tiny pair with an adapter, at temperature 0, where that decides everything a drafter and a target do. Left
out: what is served of them (replay_engine.py).
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path

import click
import torch
from bench_adapters import TINY

from ppow_train.generation import Round, load_tokenizer
from ppow_train.pair import load_pair
from ppow_train.parity import merged_pair
from ppow_train.progress import make_progress
from ppow_train.prompts import read_prompts
from ppow_train.rollout import WindowRunner
from ppow_train.training import get_trajectories
from ppow_train.walk import accepted_at_every_start
from vllm_ppow.artifact import read_adapter

MAX_TOKENS = 64  # of every continuation, as in serve_within.py
_PER_MILLE = 1000


@dataclasses.dataclass(frozen=True)
class Text:
    """A continuation, [S] starts.

    Attributes:
        accepted: tokens of a draft that the target accepts, by start, [S].
        confidences: the drafter's top-1 probability in per mille, by start and position, [S][K]; it goes on from its
            own tokens, past the first that is rejected.
    """

    accepted: list[int]
    confidences: list[list[int]]

    def confidence(self, start: int, position: int) -> float:
        """As a probability."""
        return self.confidences[start][position] / _PER_MILLE


@dataclasses.dataclass(frozen=True)
class Texts:
    """What is replayed.

    Attributes:
        num_speculative_tokens: K of the drafts.
        texts: the continuations.
    """

    num_speculative_tokens: int
    texts: list[Text]

    def write(self, path: Path) -> None:
        """As `load_texts` takes it, a line for each text."""
        rows = ",\n".join(json.dumps(dataclasses.asdict(text), separators=(",", ":")) for text in self.texts)
        head = f'"num_speculative_tokens": {self.num_speculative_tokens}'
        path.write_text(f'{{{head}, "texts": [\n{rows}\n]}}\n')


def load_texts(adapter: Path | None, file: Path | None, prompts: str, num_prompts: int) -> Texts:
    """Texts: read where they were written before, else made."""
    if file is not None:
        raw = json.loads(file.read_text())
        return Texts(raw["num_speculative_tokens"], [Text(**text) for text in raw["texts"]])
    if adapter is None:
        raise click.UsageError("Give --adapter, or --texts with what an earlier run wrote.")
    return make_texts(adapter, prompts, num_prompts)


def make_texts(adapter_directory: Path, prompts: str, num_prompts: int) -> Texts:
    """Texts of so many prompts of a file of the tiny pair's."""
    adapter = read_adapter(adapter_directory)
    length = adapter.config.num_speculative_tokens
    drafter = TINY / adapter.config.drafter_type
    pair = merged_pair(load_pair(str(TINY / "target"), str(drafter)), adapter, drafter)
    file = TINY / "prompts" / f"{prompts}.jsonl"
    with make_progress() as progress, tempfile.TemporaryDirectory() as cache:
        trajectories = get_trajectories(
            pair,
            file,
            texts=read_prompts(file, load_tokenizer(TINY / "target"))[:num_prompts],
            cache=Path(cache),
            max_new_tokens=MAX_TOKENS + length,
            rounds=[Round(0.0, 0)],
            progress=progress,
        )
        runner = WindowRunner(pair.target, pair.drafter, trajectories, length, 1.0)
        task = progress.add_task("drafts at every start", total=len(trajectories), note="")
        texts = []
        for row in range(len(trajectories)):
            texts.append(
                Text(accepted_at_every_start(runner, row, greedy_drafts=True), confidences(runner, row))
            )
            progress.update(task, advance=1)
        return Texts(length, texts)


@torch.no_grad()
def confidences(runner: WindowRunner, row: int) -> list[list[int]]:
    """The drafter's top-1 probability in per mille at every start of a trajectory and every position, [S][K]."""
    length = runner.num_speculative_tokens
    chosen = runner.trajectories.select(torch.tensor([row]))
    encoded = runner.drafter.encode(chosen, runner.target.encode(chosen))
    starts = chosen.first_starts()[:, None] + torch.arange(int(chosen.num_starts(length)))
    _, logits = runner.drafter.sample(encoded, starts, length, 0.0)
    return [[round(_PER_MILLE * top) for top in draft] for draft in logits.softmax(-1).amax(-1)[0].tolist()]
