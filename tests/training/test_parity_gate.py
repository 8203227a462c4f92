"""The gate that compares vLLM's counts with what is expected: what passes, what does not, and how often by chance."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from ppow_train import walk
from ppow_train.parity import Parity
from ppow_train.walk import ExpectedWalk
from vllm_ppow.metrics import SpecDecodeCounts

K, WINDOWS = 4, 40


def counts(num_drafts: int, per_position: tuple[int, ...]) -> SpecDecodeCounts:
    return SpecDecodeCounts(num_drafts, num_drafts * len(per_position), sum(per_position), per_position)


def expected(num_drafts: float, per_position: tuple[float, ...], prompts: int = 50) -> ExpectedWalk:
    """Alike on every prompt; drafts of one are independent, as good as."""
    drafts = torch.full((prompts,), num_drafts / prompts, dtype=torch.float64)
    accepted = torch.tensor(per_position, dtype=torch.float64).expand(prompts, -1) / prompts
    covariance = torch.zeros(prompts, 2, 2, dtype=torch.float64)
    covariance[:, 1, 1] = 1.5 * drafts
    return ExpectedWalk(drafts, accepted, covariance)


def gate(with_adapter: ExpectedWalk, served: SpecDecodeCounts, bare: ExpectedWalk | None = None) -> Parity:
    """The same texts everywhere."""
    return Parity(with_adapter, served, with_adapter, bare or expected(2000, (600, 200, 50)))


def test_the_gate_lets_chance_pass_and_holds_back_a_difference():
    simulated = expected(2000, (1000, 500, 250))
    assert gate(simulated, counts(2000, (1030, 480, 260))).problem is None
    assert "as if the adapter had not" in str(gate(simulated, counts(2000, (700, 300, 100))).problem)
    one_position = gate(simulated, counts(2000, (860, 430, 460)))
    assert one_position.problem == "vLLM does not accept what training simulates"
    total = gate(simulated, counts(2000, (1100, 600, 350)))
    assert "does not accept what is expected on its own texts" in str(total.problem)
    assert not gate(simulated, counts(0, (0, 0, 0))).holds


def test_a_few_drafts_prove_less_than_many():
    few = gate(expected(20, (10,), prompts=2), counts(20, (14,)), expected(20, (10,), prompts=2))
    many = gate(expected(20_000, (10_000,)), counts(20_000, (14_000,)), expected(20_000, (10_000,)))
    assert few.holds
    assert not many.holds


@pytest.mark.parametrize("gain", [1.15, 1.2, -1.2])
def test_an_adapter_that_was_not_applied_is_named(gain):
    """Also where it would have lost: no position differs by more than its tolerance."""
    bare = expected(2000, (1000, 500, 250))
    share = gain if gain > 0 else 1 / -gain
    adapter = expected(2000, tuple(share * n for n in (1000, 500, 250)))
    ignored = gate(adapter, counts(2000, (1000, 500, 250)), bare)
    assert all(abs(d) < t for d, t in zip(ignored.differences, ignored.tolerances, strict=True))
    assert "as if the adapter had not been applied" in str(ignored.problem)
    assert gate(adapter, counts(2000, tuple(round(share * n) for n in (1000, 500, 250))), bare).holds


def test_rounding_may_decide_a_few_drafts_at_temperature_zero():
    """There is no chance in it; seen with the tiny pair: 514 accepted of 455 drafts, 520 expected."""

    def certain(drafts: int, per_position: tuple[float, ...]) -> ExpectedWalk:
        walk_ = expected(drafts, per_position)
        assert walk_.covariance is not None
        return dataclasses.replace(walk_, covariance=torch.zeros_like(walk_.covariance))

    own, per_position = certain(455, (205, 99, 77, 49, 36, 28, 16, 10)), (204, 99, 76, 47, 35, 27, 16, 10)
    hardly_more = certain(455, (203, 98, 76, 48, 35, 27, 15, 10))
    assert gate(own, counts(455, per_position), hardly_more).holds
    assert gate(
        certain(100, (50, 25, 12, 8)), counts(100, (49, 24, 11, 7)), certain(100, (48, 23, 10, 6))
    ).holds
    ignored = gate(
        certain(2000, (1060, 530, 265)), counts(2000, (1000, 500, 250)), certain(2000, (1000, 500, 250))
    )
    assert "as if the adapter had not been applied" in str(ignored.problem)


def test_what_the_gate_tells_is_plain():
    value = gate(expected(2000, (1000, 500, 250)), counts(2000, (1030, 480, 260))).as_json()
    assert value["holds"] is True
    assert value["problem"] is None
    assert value["expected_on_served_texts"] == pytest.approx(0.875)
    assert value["expected_without_adapter"] == pytest.approx(0.425)
    assert len(value["differences"]) == len(value["tolerances"]) == 3


# ---------------------------------------------------------------- what chance does


def acceptance(level: torch.Tensor, windows: int, generator: torch.Generator) -> torch.Tensor:
    """r_t of windows that overlap on texts of their own, [P] -> [P, windows, K]; easy texts and hard ones."""
    noise = torch.randn(len(level), windows + K, generator=generator, dtype=torch.float64)
    return (level[:, None] + 2 * noise).sigmoid().unfold(1, K, 1)[:, :windows]


def expect(ratios: torch.Tensor) -> ExpectedWalk:
    survival, starts = ratios.cumprod(-1), torch.full((len(ratios),), ratios.shape[1])
    visits = walk._expected_visits(survival, starts)
    accepted = (visits[..., None] * survival).sum(1)
    return ExpectedWalk(visits.sum(-1), accepted, walk._covariance(survival, starts))


def serve(ratios: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One walk along each text, drawn: [P, 1 + K], drafts and accepted tokens by position."""
    prompts, windows, length = ratios.shape
    seen = torch.zeros(prompts, 1 + length)
    at = torch.zeros(prompts, dtype=torch.long)
    while (running := at < windows).any():
        own = ratios[torch.arange(prompts), at.clamp(max=windows - 1)]
        passed = (torch.rand(own.shape, generator=generator, dtype=own.dtype) < own).long().cumprod(-1)
        seen += running[:, None] * torch.cat([torch.ones(prompts, 1), passed], dim=-1)
        at += passed.sum(-1) + 1
    return seen


def rows(whole: ExpectedWalk, part: slice) -> ExpectedWalk:
    return ExpectedWalk(*(getattr(whole, field.name)[part] for field in dataclasses.fields(whole)))


def repeated(times: int, prompts: int, gain: float, applied: bool = True) -> list[Parity]:
    """The gate many times over, each with prompts, texts and draws of its own; `gain` in the logits of r."""
    generator = torch.Generator().manual_seed(prompts)
    level = torch.randn(times * prompts, generator=generator, dtype=torch.float64) - 0.5
    training = expect(acceptance(level + gain, WINDOWS, generator))
    seed = int(torch.randint(2**31, (1,), generator=generator))
    # The same texts with and without the adapter, as the same noise.
    own, without = (
        acceptance(level + plus, WINDOWS, torch.Generator().manual_seed(seed)) for plus in (gain, 0.0)
    )
    seen = serve(own if applied else without, generator)
    own_walk, bare_walk = expect(own), expect(without)
    gates = []
    for number in range(times):
        part = slice(number * prompts, (number + 1) * prompts)
        total = [int(n) for n in seen[part].sum(0)]
        served = counts(total[0], tuple(total[1:]))
        gates.append(Parity(rows(training, part), served, rows(own_walk, part), rows(bare_walk, part)))
    return gates


@pytest.mark.parametrize(("prompts", "gain"), [(8, 0.0), (64, 0.4)])
def test_an_adapter_that_is_served_as_it_is_passes(prompts, gain):
    """Failures by chance are rare, whether it gains nothing or much: at most 1 in 1000."""
    gates = repeated(1000, prompts, gain)
    assert sum(not one.holds for one in gates) <= 1


def test_an_adapter_that_is_not_applied_does_not_pass():
    """A gain of 17 % on 64 prompts; what served positions alone would tell, against other texts, is hardly anything."""
    gates = repeated(100, 64, 0.4, applied=False)
    gains = [one.expected.mean_accepted / one.bare.mean_accepted for one in gates]
    assert 1.1 < sum(gains) / len(gains) < 1.25
    assert sum("had not been applied" in str(one.problem) for one in gates) >= 99
    positions = [
        all(abs(d) <= t for d, t in zip(one.differences, one.tolerances, strict=True)) for one in gates
    ]
    assert sum(positions) >= 50


def test_the_standard_error_is_that_of_many_walks():
    generator = torch.Generator().manual_seed(3)
    ratios = acceptance(torch.randn(20, generator=generator, dtype=torch.float64), 40, generator)
    told = expect(ratios)
    drawn = [serve(ratios, generator).sum(0) for _ in range(400)]
    means = torch.stack([one[1:].sum() / one[0] for one in drawn])
    assert means.mean().item() == pytest.approx(
        told.mean_accepted, abs=4 * told.standard_error / 400**0.5 + 1e-3
    )
    assert means.std().item() == pytest.approx(told.standard_error, rel=0.15)


def test_the_covariance_is_that_of_every_walk_enumerated():
    generator = torch.Generator().manual_seed(4)
    ratios = torch.rand(2, 3, 2, generator=generator, dtype=torch.float64)
    starts = torch.tensor([3, 2])
    found = walk._covariance(ratios.cumprod(-1), starts)
    for row, windows in enumerate(starts.tolist()):
        moments = torch.zeros(6, dtype=torch.float64)
        for kept in itertools.product(range(3), repeat=windows):  # what each start would accept
            chance, at, drafts, accepted = 1.0, 0, 0, 0
            for start, k in enumerate(kept):
                one, two = ratios[row, start].tolist()
                chance *= (1 - one, one * (1 - two), one * two)[k]
                if start == at:
                    drafts, accepted, at = drafts + 1, accepted + k, at + k + 1
            pairs = (1, drafts, accepted, drafts**2, drafts * accepted, accepted**2)
            moments += chance * torch.tensor(pairs, dtype=torch.float64)
        one, d, a, dd, da, aa = moments.tolist()
        assert one == pytest.approx(1.0)
        wanted = torch.tensor([[dd - d * d, da - d * a], [da - d * a, aa - a * a]], dtype=torch.float64)
        torch.testing.assert_close(found[row], wanted)
