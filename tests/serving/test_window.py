"""The draft window policy on a simulated engine: it ends up where the best fixed window is, and follows changes."""

from __future__ import annotations

import itertools
import statistics

import pytest
from simulated_serving import (
    CONTEXT,
    accelerator,
    best_fixed,
    changing,
    drifting,
    falling,
    fixed_rate,
    new_window,
    processor,
    serve,
    stopping,
)

from vllm_ppow.acceptance import AcceptanceEstimate
from vllm_ppow.change_cost import ChangeCost
from vllm_ppow.compat.window import lengths, table
from vllm_ppow.step_cost import StepCost
from vllm_ppow.window import DraftWindow

COSTS = {"accelerator": accelerator, "processor": processor}


class Exact:
    """A cost profile that is right."""

    def __init__(self, cost):
        self.cost = cost

    def step_seconds(self, batch, num_draft_tokens, context=None):
        return self.cost(batch, num_draft_tokens, num_draft_tokens)


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("first", [0.9, 0.7, 0.5, 0.2])
@pytest.mark.parametrize("batch", [1, 4, 32])
def test_within_two_percent_of_the_best_fixed_window(cost, first, batch):
    """Nothing known beforehand, 10 % noise on the clock; what was paid for learning (first steps) is judged below."""
    window, acceptance = new_window(), falling(first)
    _, best = best_fixed(COSTS[cost], acceptance, batch)
    serve(window, COSTS[cost], acceptance, batch, 400)
    rate, _ = serve(window, COSTS[cost], acceptance, batch, 3000 if batch < 32 else 1200, seed=1)
    assert rate > 0.98 * best


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("batch", [1, 16])
def test_a_machine_whose_pace_wanders(cost, batch):
    """By 15 % within some 200 steps, and lengths are slow at their first uses: over seeds, still near the best."""
    acceptance = falling(0.7)
    _, best = best_fixed(COSTS[cost], acceptance, batch)
    rates = []
    for seed in range(16):
        window, pace = new_window(), drifting(seed)
        serve(window, COSTS[cost], acceptance, batch, 300, seed, pace, first_uses=2)
        rates.append(serve(window, COSTS[cost], acceptance, batch, 1000, seed + 50, pace)[0])
    assert statistics.mean(rates) > 0.97 * best
    assert min(rates) > 0.90 * best


@pytest.mark.parametrize("cost", COSTS)
def test_a_right_profile_is_not_given_up_for_a_second_or_two_of_another_pace(cost):
    """Other work changes the pace for longer than a length is looked at: what was timed last is not what is best."""
    acceptance, truth = falling(0.7), COSTS[cost]
    _, most = best_fixed(truth, acceptance, 4)
    rates = []
    for seed in range(12):
        window, pace = new_window(profile=Exact(truth)), changing(seed)
        serve(window, truth, acceptance, 4, 200, seed, pace)
        rates.append(serve(window, truth, acceptance, 4, 400, seed + 50, pace)[0] / most)
    assert statistics.mean(rates) > 0.98
    assert min(rates) > 0.965


@pytest.mark.parametrize("known", [False, True], ids=["no profile", "profile"])
@pytest.mark.parametrize("cost", COSTS)
def test_a_pause_over_all_few_steps_of_a_short_length_keeps_no_long_one(cost, known):
    """Else a long draft looks as cheap as all shorter ones, is kept, and none of these is timed again."""
    acceptance, truth = falling(0.4), COSTS[cost]
    _, most = best_fixed(truth, acceptance, 32)
    window = new_window(profile=Exact(truth) if known else None)
    for length, slower, times in ((7, 1.0, 60), (0, 5.0, 5), (1, 5.0, 5), (3, 5.0, 5)):
        for _ in range(times):
            window.observe_step(slower * truth(32, length, length), 32, length, 32 * CONTEXT)
    serve(window, truth, acceptance, 32, 600)
    rate, _ = serve(window, truth, acceptance, 32, 600, seed=1)
    assert rate > 0.96 * most


@pytest.mark.parametrize("cost", COSTS)
def test_lengths_are_learned_where_most_steps_also_prefill(cost):
    """Steps that only decode are few and seldom neighbours: what is to be timed is held until there are some."""
    acceptance = falling(0.6)
    _, best = best_fixed(COSTS[cost], acceptance, 32)
    rates = []
    for seed in range(12):
        window = new_window()
        serve(window, COSTS[cost], acceptance, 32, 150, seed, prefilling=0.85)
        rates.append(serve(window, COSTS[cost], acceptance, 32, 300, seed + 50, prefilling=0.85)[0] / best)
    assert statistics.mean(rates) > 0.975, "0.96 and 0.91 where nothing is held through the others"


@pytest.mark.parametrize("cost", COSTS)
def test_learning_is_cheap(cost):
    """From the very first step on: 600 steps, a minute's worth."""
    for first, batch in ((0.9, 1), (0.3, 16)):
        acceptance = falling(first)
        _, best = best_fixed(COSTS[cost], acceptance, batch)
        rate, _ = serve(new_window(), COSTS[cost], acceptance, batch, 600)
        assert rate > 0.94 * best


def test_with_a_profile_and_a_prior_the_first_step_is_right():
    acceptance = falling(0.8)
    best, _ = best_fixed(accelerator, acceptance, 2)
    prior = [fixed / 1.0 for fixed in _products(acceptance)]
    window = new_window(profile=Exact(accelerator), prior=prior)
    assert window.choose(2) == best


def _products(values):
    product, out = 1.0, []
    for value in values:
        product *= value
        out.append(product)
    return out


@pytest.mark.parametrize("cost", COSTS)
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("pause", [0.05, 0.2])
def test_where_changes_make_the_engine_pause_they_are_few(cost, batch, pause, monkeypatch):
    """By 50 and 200 ms, as long as some 5 to 20 steps."""
    acceptance = falling(0.9)
    _, best = best_fixed(COSTS[cost], acceptance, batch)

    def earned(window):
        serve(window, COSTS[cost], acceptance, batch, 400, pause=pause)
        return serve(window, COSTS[cost], acceptance, batch, 3000, seed=1, pause=pause)[0] / best

    minding = earned(new_window())
    assert minding > (0.97 if pause == 0.05 else 0.92)
    monkeypatch.setattr(ChangeCost, "steps", 0.0)
    assert earned(new_window()) < minding - 0.02, "what minding it is worth"


@pytest.mark.parametrize("cost", COSTS)
def test_a_machine_that_stops_now_and_then_does_not_hold_a_length(cost):
    """Stops fall on changes of length too, and must not make these look dear: 400 steps after a jump of the load."""
    few, many = falling(0.9), falling(0.5)
    rates = []
    for seed in range(12):
        window, pace = new_window(profile=Exact(COSTS[cost])), stopping(seed)
        serve(window, COSTS[cost], few, 2, 400, seed, pace)
        rate, _ = serve(window, COSTS[cost], many, 16, 400, seed + 50, pace)
        rates.append(rate / best_fixed(COSTS[cost], many, 16)[1])
    assert statistics.mean(rates) > 0.94


def test_a_change_of_traffic_is_followed():
    window = new_window()
    good, bad = falling(0.9), falling(0.3)
    _, before = serve(window, accelerator, good, 8, 800)
    _, after = serve(window, accelerator, bad, 8, 1200)
    rate, again = serve(window, accelerator, good, 8, 1200)
    assert [_most(part[-300:]) for part in (before, after, again)] == [
        pytest.approx(best_fixed(accelerator, acceptance, 8)[0], abs=1) for acceptance in (good, bad, good)
    ]
    assert rate > 0.95 * best_fixed(accelerator, good, 8)[1]


def _most(chosen):
    return max(set(chosen), key=chosen.count)


def test_nothing_is_drafted_where_nothing_pays_and_probes_find_the_way_back():
    window = new_window()
    _, chosen = serve(window, processor, falling(0.5), 32, 1500)
    assert chosen[-400:].count(0) > 380
    assert any(chosen[-1024:]), "probed now and then"
    _, chosen = serve(window, processor, falling(0.95), 1, 800)
    assert _most(chosen[-200:]) >= 2


def test_a_changing_batch_gets_a_length_of_its_own_at_once():
    """Small batches draft, large ones do not, turn by turn."""
    window, acceptance = new_window(), falling(0.8)
    for turn in range(12):
        serve(window, processor, acceptance, 1, 60, seed=turn)
        serve(window, processor, acceptance, 32, 60, seed=turn)
    _, small = serve(window, processor, acceptance, 1, 60)
    _, large = serve(window, processor, acceptance, 32, 60)
    assert _most(small) >= 1
    assert _most(large) == 0


def test_batch_sizes_that_are_alike_share_what_is_computed(monkeypatch):
    """It is the engine's own loop that computes: a batch that wanders by a few requests must not make it dearer."""
    window, computed = new_window(), []
    for owner, method in ((StepCost, "table"), (AcceptanceEstimate, "promises")):
        original = getattr(owner, method)

        def counting(self, *arguments, original=original, name=method):
            computed.append(name)
            return original(self, *arguments)

        monkeypatch.setattr(owner, method, counting)
    for step in range(400):
        window.choose(35 + step % 7)  # all in one bucket of batch sizes
        window.observe_draft(4, 2)
    assert computed.count("table") == 100
    assert computed.count("promises") == 99, "what was known at first serves the first of them"


def test_the_minimum_and_the_maximum_hold():
    window = DraftWindow(range(2, 5), AcceptanceEstimate(4), StepCost())
    _, low = serve(window, processor, falling(0.1), 16, 300)
    _, high = serve(window, accelerator, [0.99] * 8, 1, 1200)
    assert (min(low), max(low + high), _most(low[-100:]), _most(high[-100:])) == (2, 4, 2, 4)
    only = DraftWindow([3], AcceptanceEstimate(3), StepCost())
    assert set(serve(only, accelerator, falling(0.5), 2, 50)[1]) == {3}


def test_it_does_not_flap():
    window = new_window(profile=Exact(accelerator))
    acceptance = falling(0.7)
    _, chosen = serve(window, accelerator, acceptance, 8, 3000)
    changes = sum(a != b for a, b in itertools.pairwise(chosen[1000:]))
    assert changes < 2 * window.counts.probes


def test_probes_cost_what_they_may():
    window = new_window(profile=Exact(processor))
    serve(window, processor, falling(0.4), 32, 200)
    before = window.counts.copy()
    rate, _ = serve(window, processor, falling(0.4), 32, 4000)
    spent = window.counts - before
    assert spent.probes > 0
    assert rate > 0.985 * fixed_rate(processor, falling(0.4), 32, 0)


def test_counts_add_up():
    window = new_window(4)
    _, chosen = serve(window, accelerator, falling(0.7), 4, 500)
    counts = window.counts
    assert counts.chosen == [chosen.count(k) for k in range(5)]
    assert counts.requests == 4 * 500
    assert counts.drafted == 4 * sum(chosen[:-1])
    assert counts.drafts == 4 * sum(k > 0 for k in chosen[:-1])
    assert counts.predicted == pytest.approx(counts.accepted, rel=0.05)
    assert counts.speedup / 500 > 1.2
    nothing = counts - counts.copy()
    assert (nothing.chosen, nothing.drafted, nothing.predicted) == ([0] * 5, 0, 0.0)


def test_the_choice_is_the_argmax():
    for batch in (1, 4, 16, 64):
        wanted = max(range(1, 7), key=lambda k, b=batch: fixed_rate(processor, falling(0.85), b, k))
        acceptance = AcceptanceEstimate(6, _products(falling(0.85)))
        assert DraftWindow(range(1, 7), acceptance, StepCost(Exact(processor))).choose(batch) == wanted


def test_lengths_must_ascend():
    with pytest.raises(ValueError, match="must ascend"):
        DraftWindow([3, 1], AcceptanceEstimate(3), StepCost())


# ---------------------------------------------------------------- the ladder that vLLM is told


def test_ladder():
    assert lengths(0, 3) == [0, 1, 2, 3]
    assert lengths(2, 2) == [2]
    assert lengths(1, 24) == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24]


@pytest.mark.parametrize(
    ("maximum", "batch_sizes"), [(8, 64), (8, 4), (8, 2), (3, 4), (3, 1), (5, 6), (24, 9)]
)
def test_the_table_is_one_that_vllm_takes_and_holds_every_length_that_fits(maximum, batch_sizes):
    from vllm.v1.spec_decode.dynamic.utils import build_dynamic_sd_schedule_lookup

    declared = table(lengths(0, maximum), batch_sizes)
    dense = build_dynamic_sd_schedule_lookup(
        [list(row) for row in declared],
        vllm_max_batch_size=batch_sizes,
        vllm_num_speculative_tokens=maximum,
    )
    assert len(dense) == batch_sizes + 1
    assert len(set(dense[1:])) == min(len(lengths(0, maximum)), batch_sizes)
    assert dense[1] == maximum
    assert batch_sizes == 1 or dense[-1] == 0, "drafting nothing is what a server that is full needs most"


def test_a_minimum_leaves_the_cost_of_drafting_nothing_unseen_and_harmless():
    """Nobody ever saw a step at K = 0, and noise may make the regression say that it is free."""

    def computing(batch, verified, drafted):
        return 1e-3 * batch * (1 + verified) + 1e-3 * batch * drafted

    for seed in range(40):
        window = new_window(minimum=3)
        _, chosen = serve(window, computing, falling(0.7), 16, 40, seed, pace=drifting(seed, 0.2, 3))
        assert min(chosen) >= 3
        assert 0 < window.counts.speedup / sum(window.counts.chosen) < 8


@pytest.mark.parametrize(("period", "waits"), [(26, True), (1, False)])
def test_probes_wait_for_steps_that_are_timed_but_not_for_ever(period, waits):
    """Requests that end together would otherwise have every probe meet the prefill of the next ones."""
    window = new_window(profile=Exact(processor))
    started = []
    for step in range(4000):
        decodes, before = step % period != 0, window._held
        window.choose(32, 32 * 200, decodes)
        if before is None and window._held is not None:
            started.append(decodes)
    assert len(started) > 3
    assert all(started) is waits


def test_lengths_that_were_never_timed_are_probed_sooner():
    """A profile that is wrong about K = 1 where it matters is found out within some hundred steps."""
    wrong = type("Wrong", (), {"step_seconds": lambda self, batch, k, context=None: 0.1 + 0.08 * k})()
    window = new_window(profile=wrong, prior=[0.6, 0.3, 0.1])
    assert window.choose(32) == 0
    _, chosen = serve(window, lambda batch, verified, drafted: 0.1 + 0.03 * drafted, falling(0.6), 32, 200)
    assert _most(chosen[-100:]) >= 1


def test_a_profile_of_another_shape_is_given_up_where_the_clock_says_so():
    """Drafts cost three times as much as it says, as on a machine that has other things to do now."""

    class Flat:
        def step_seconds(self, batch: int, num_draft_tokens: int, context: int | None = None) -> float:
            none = processor(batch, 0, 0)
            return none + 0.35 * (processor(batch, num_draft_tokens, num_draft_tokens) - none)

    acceptance = falling(0.6)
    _, best = best_fixed(processor, acceptance, 16)
    rates = []
    for seed in range(12):
        window = new_window(profile=Flat(), prior=[0.6, 0.34, 0.18, 0.09])
        rates.append(serve(window, processor, acceptance, 16, 300, seed, drifting(seed))[0])
    assert statistics.mean(rates) > 0.895 * best, "0.88 where the profile is taken to be right within 5 %"


@pytest.mark.parametrize("decodes", [True, False])
def test_a_length_that_traffic_never_lets_be_timed_does_not_keep_others_from_being_probed(decodes):
    """Where every step prefills, or batches change too fast, `observe_step` is never called."""
    window = new_window(profile=Exact(processor), prior=[0.9, 0.8, 0.7, 0.6])
    best = window.choose(2, 400, decodes)
    chosen = [window.choose(2, 400, decodes) for _ in range(6000)]
    assert 1 <= best < 7
    assert {best - 1, best + 1, best + 2} <= set(chosen)
