"""What WindowSampler draws against the chances it states, how old criticality may get, and what a resumed run needs."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from training_pair import K

from ppow_train.sampler import WindowSampler
from ppow_train.types import Trajectories
from ppow_train.windowing import draw_starts

# Five, three and one start each (K = 4); what stands in the rows is the trajectory's number.
TRAJECTORIES = Trajectories(
    torch.arange(3)[:, None].expand(3, 12).clone(), torch.tensor([3, 2, 4]), torch.tensor([12, 9, 9])
)
CRITICALITY = torch.tensor(
    [[4.0, 0.0, 1.0, 1.0, 2.0], [1.0, 3.0, 0.5, 99.0, 99.0], [0.0, 50.0, 0.0, 0.0, 0.0]]
)


class Counted:
    """Criticality from a table, times how often it was asked for; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        self.asked.append(rows.tolist())
        longest = int(TRAJECTORIES.num_starts(K)[rows].max())
        return CRITICALITY[rows, :longest] * len(self.asked)


def make(criticality: Any = None, **options: Any) -> WindowSampler:
    defaults = {"adaptive_from": 0, "uniform_share": 0.3}
    return WindowSampler(criticality or Counted(), TRAJECTORIES, K, **{**defaults, **options})


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_windows_are_drawn_with_the_stated_chances():
    """Chi-square of 4,000 single draws from kept criticality, 0.1 % level at 4 degrees of freedom."""
    sampler, draws, rows = make(refresh=5000), 4000, generator(1)
    counts = torch.zeros(3, 5)
    for step in range(draws):
        draw = sampler.draw(torch.arange(3), 1, step, rows)
        counts[torch.arange(3), draw.starts[:, 0] - TRAJECTORIES.first_starts()] += 1
    assert counts[1, 3:].sum() == counts[2, 1:].sum() == 0
    for row, starts in enumerate((5, 3)):
        weight = CRITICALITY[row, :starts]
        wanted = draws * (0.7 * weight / weight.sum() + 0.3 / starts)
        assert ((counts[row, :starts] - wanted) ** 2 / wanted).sum() < 18.5
        uniform = draws / starts
        assert ((counts[row, :starts] - uniform) ** 2 / uniform).sum() > 100, "the test could not tell"


def test_ordinary_windows_come_first_and_cost_nothing():
    criticality = Counted()
    sampler = make(criticality, adaptive_from=2.5)
    drawn = [sampler.draw(torch.arange(2), 2, step, generator(step)) for step in range(5)]
    assert [draw.adaptive for draw in drawn] == [False, False, False, True, True]
    assert len(criticality.asked) == 2
    ordinary = draw_starts(torch.tensor([5, 3]), 2, generator(1))
    assert (drawn[1].starts - TRAJECTORIES.first_starts()[:2, None]).equal(ordinary)
    assert drawn[1].chosen is drawn[1].candidates is drawn[1].staleness is None


def test_without_adaptive_windows_nothing_is_ever_computed():
    criticality = Counted()
    make(criticality, adaptive_from=math.inf).draw(torch.arange(3), 2, 10**9, generator())
    assert criticality.asked == []


@pytest.mark.parametrize(
    ("refresh", "asked", "staleness"),
    [
        (1, [[0, 1], [0, 2], [1, 2], [0, 1]], [[0, 0], [0, 0], [0, 0], [0, 0]]),
        (2, [[0, 1], [2], [1], [0]], [[0, 0], [1, 0], [0, 1], [0, 1]]),
        (4, [[0, 1], [2]], [[0, 0], [1, 0], [2, 1], [3, 3]]),
    ],
)
def test_criticality_is_computed_anew_when_it_is_too_old(refresh, asked, staleness):
    criticality = Counted()
    sampler = make(criticality, refresh=refresh)
    seen = []
    for step, ids in enumerate(([0, 1], [0, 2], [1, 2], [0, 1])):
        draw = sampler.draw(torch.tensor(ids), 2, step, generator(step))
        assert draw.staleness is not None
        seen.append(draw.staleness.tolist())
        for values, computed_before in sampler._kept.values():
            assert step + 1 - values < refresh, "what will be too old is not kept"
            assert len(computed_before) <= 5
    assert criticality.asked == asked
    assert seen == staleness


def test_old_criticality_is_what_is_drawn_from():
    """The table doubles with every request; a kept trajectory still shows the first one's values."""
    sampler = make(refresh=2)
    sampler.draw(torch.tensor([0]), 1, 0, generator())
    draw = sampler.draw(torch.tensor([0, 1]), 3, 1, generator())
    assert draw.candidates is not None
    assert draw.candidates.tolist() == [4.0, 0.0, 1.0, 1.0, 2.0, 2.0, 6.0, 1.0]
    offsets = draw.starts - TRAJECTORIES.first_starts()[:2, None]
    assert draw.chosen is not None
    factors = torch.tensor([[1.0], [2.0]])
    assert draw.chosen.view(2, 3).equal((CRITICALITY[:2] * factors).gather(1, offsets))


def test_a_trajectory_that_comes_up_twice_counts_once_as_candidate():
    criticality = Counted()
    draw = make(criticality).draw(torch.tensor([1, 0, 1]), 2, 0, generator())
    assert criticality.asked == [[0, 1]]
    assert draw.candidates is not None
    assert len(draw.candidates) == 3 + 5
    assert draw.starts.shape == (3, 2)


@pytest.mark.parametrize("refresh", [1, 3])
def test_a_restored_sampler_goes_on_as_the_unbroken_one(refresh):
    """Criticality changes with every update, as in training, so that what was kept matters."""
    update = [0]

    def criticality(rows: torch.Tensor) -> torch.Tensor:
        return CRITICALITY[rows] + update[0] * torch.arange(5)

    unbroken = make(criticality, refresh=refresh)
    restored = make(criticality, refresh=refresh)
    for step, ids in enumerate(([0, 1], [1, 2], [0, 2], [0, 1], [1, 2])):
        update[0] = step
        if step == 2:
            state = unbroken.state_dict()
            assert (len(state["trajectory"]) > 0) == (refresh > 1)
            restored.load_state_dict(json.loads(json.dumps(state)))
        wanted = unbroken.draw(torch.tensor(ids), 2, step, generator(step))
        if step >= 2:
            draw = restored.draw(torch.tensor(ids), 2, step, generator(step))
            for name in ("starts", "chosen", "candidates", "staleness"):
                assert getattr(draw, name).equal(getattr(wanted, name)), name
