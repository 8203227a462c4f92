"""A run keeps its trajectories without padding and in main memory: one long one does not make all of them long."""

from __future__ import annotations

import pytest
import torch
from training_lives import train_into
from training_pair import VOCAB

from ppow_train.data import collate, keep_long_enough
from ppow_train.selection import split_held_out
from ppow_train.types import FlatTrajectories, Trajectories

LONG = 5000
PROMPTS = [[i, 7, 3 * i % 50] for i in range(1, 41)]


@pytest.fixture
def kept() -> FlatTrajectories:
    """Forty short ones and a long one."""
    generator = torch.Generator().manual_seed(3)
    lengths = [*torch.randint(8, 16, (40,), generator=generator).tolist(), LONG]
    continued = [torch.randint(1, VOCAB, (n,), generator=generator).tolist() for n in lengths]
    return collate([*PROMPTS, [5, 6]], continued)


def test_what_is_kept_is_as_large_as_what_is_in_it(kept):
    parts = [kept, *split_held_out(kept), keep_long_enough(kept, 4), FlatTrajectories.join([kept, kept])]
    for part in parts:
        assert isinstance(part, FlatTrajectories)
        assert part.ids.untyped_storage().nbytes() == 4 * int(part.lengths.sum())
    assert int(kept.lengths.sum()) * 2 < len(kept) * LONG / 10, "padding would show"


def test_what_is_picked_is_as_long_as_its_own_longest(kept):
    dense = Trajectories(kept.input_ids, kept.prompt_lengths, kept.lengths)
    for rows in (torch.tensor([3, 0, 17]), torch.tensor([40, 2])):
        picked = kept.select(rows)
        assert type(picked) is Trajectories
        assert picked.input_ids.shape[1] == int(kept.lengths[rows].max())
        assert picked.same_as(dense.select(rows))
        assert kept.subset(rows).same_as(picked)


def test_ids_stay_in_main_memory_wherever_the_models_are(kept):
    moved = kept.to("meta")
    assert moved.ids is kept.ids
    assert moved.lengths.device.type == moved.prompt_lengths.device.type == "meta"


def test_padding_is_no_part_of_what_trajectories_are(kept):
    dense = Trajectories(kept.input_ids, kept.prompt_lengths, kept.lengths)
    wider = Trajectories(
        torch.nn.functional.pad(dense.input_ids, (0, 3), value=9), kept.prompt_lengths, kept.lengths
    )
    assert kept.digest() == dense.digest() == wider.digest() == FlatTrajectories.of(wider).digest()
    other = Trajectories(dense.input_ids + 1, kept.prompt_lengths, kept.lengths)
    assert other.digest() != kept.digest()
    assert kept.digest() != FlatTrajectories(kept.ids, kept.prompt_lengths + 1, kept.lengths).digest()


def test_a_run_never_pads_all_of_them(kept, directories, tmp_path, monkeypatch):
    short = kept.subset(torch.arange(40))
    picked = []
    select = FlatTrajectories.select

    def watched(self: FlatTrajectories, rows: torch.Tensor) -> Trajectories:
        picked.append(len(rows))
        return select(self, rows)

    monkeypatch.setattr(FlatTrajectories, "input_ids", property(lambda self: pytest.fail("padded")))
    monkeypatch.setattr(FlatTrajectories, "select", watched)
    train_into(tmp_path, directories, short, held_out=short, eval_steps=1, max_steps=2, target_cache="memory")
    assert 0 < max(picked) < len(split_held_out(short)[1]), "only batches of them"
