"""Drafts trimmed by request in a real engine: same output, unequal lengths, and decisions that no drawn token sways."""

from __future__ import annotations

import pytest
import torch
from serving_engine import engine
from serving_pair import random_lora, save_adapter
from test_adaptive_window import KINDS, MAX_TOKENS, OPTIONS, TINY, K, generate, prompts, scheduler_of

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def without_speculation():
    with engine(TINY / "target", None, **OPTIONS) as llm:
        return generate(llm)


@pytest.fixture(scope="module", params=KINDS)
def served(request, tmp_path_factory, without_speculation):
    """An engine with probabilistic drafts, trimmed by request; started when no other one runs."""
    from ppow_train.drafters import load_drafter

    base = TINY / request.param
    drafter = load_drafter(base, dtype=torch.bfloat16, target=TINY / "target").model
    adapter = save_adapter(
        tmp_path_factory.mktemp("tiny") / "adapter",
        random_lora(drafter, 1e-3, target_modules=["o_proj"]),
        request.param,
        base,
        TINY / "target",
        num_speculative_tokens=K,
        draft_sample_method="probabilistic",
    )
    with engine(
        TINY / "target",
        {"method": "ppow", "model": str(adapter.directory), "ppow": {"per_request": True}},
        **OPTIONS,
    ) as llm:
        yield llm


def drafter_of(llm):
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.drafter


@pytest.fixture
def trimmed(served, monkeypatch):
    """Engine, and the lengths of every draft of its drafter from now on, [steps][requests]."""
    scheduler, drafter, lengths = scheduler_of(served), drafter_of(served), []
    propose = drafter.propose

    def record(*args, **kwargs):
        drafts = propose(*args, **kwargs)
        lengths.append([len(draft) for draft in drafts])
        return drafts

    monkeypatch.setattr(drafter, "propose", record)
    monkeypatch.setattr(scheduler.ppow_window, "choose", lambda *asked: K)
    monkeypatch.setattr(drafter.ppow_window, "_rate_at", lambda batch: 100.0)  # tokens per second
    monkeypatch.setattr(drafter.ppow_window.verify_price, "seconds_per_token", lambda batch: 4e-3)
    monkeypatch.setattr(drafter.ppow_window.pass_price, "seconds", lambda batch: 4e-3)
    return served, lengths


def test_greedy_output_is_the_targets_and_lengths_differ(trimmed, without_speculation):
    llm, lengths = trimmed
    assert generate(llm) == without_speculation
    decoding = [step for step in lengths if len(step) == 6]
    assert any(len(set(step)) > 1 for step in decoding)
    assert any(max(step) < K for step in decoding), "the loop was left early"
    assert scheduler_of(llm).ppow_window.counts.layers == ("step", "request")


def test_every_draft_is_verified_and_learned_from(trimmed):
    llm, lengths = trimmed
    window, counts = drafter_of(llm).ppow_window, scheduler_of(llm).ppow_window.counts
    before = counts.copy()
    generate(llm)
    spent = scheduler_of(llm).ppow_window.counts - before
    assert spent.drafted <= sum(map(sum, lengths))
    assert spent.drafted > 0.8 * sum(map(sum, lengths)), "only those beyond the last token are not"
    assert sum(map(sum, window.calibrations[0]._trials)) > 0
    assert window.verify_price.observations > 0 < window.pass_price.observations.total()


def test_sampled_requests(trimmed):
    from vllm import SamplingParams

    llm, lengths = trimmed
    params = SamplingParams(temperature=1.0, max_tokens=MAX_TOKENS, ignore_eos=True, seed=3)
    outputs = llm.generate(prompts(6), params, use_tqdm=False)
    assert [len(out.outputs[0].token_ids) for out in outputs] == [MAX_TOKENS] * 6
    assert sum(map(sum, drafter_of(llm).ppow_window.calibrations[1]._trials)) > 0
    assert any(len(set(step)) > 1 for step in lengths)


@pytest.mark.parametrize("method", ["begin", "add", "_learn_next"])
def test_an_error_in_the_policy_costs_no_request(trimmed, without_speculation, monkeypatch, method):
    def planted(*arguments):
        raise ZeroDivisionError("planted")

    llm, lengths = trimmed
    drafter = drafter_of(llm)
    monkeypatch.setattr(drafter.ppow_window, method, planted)
    monkeypatch.setattr(drafter, "_ppow_failed", False)
    assert generate(llm) == without_speculation
    assert drafter._ppow_failed
    assert all(set(step) == {K} for step in lengths[2:]), "drafts are whole from then on"


def test_what_is_drawn_at_a_position_does_not_sway_whether_it_is_kept(served):
    """The probability read is the distribution's own, and read before anything is drawn from it."""
    drafter = drafter_of(served)
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]] * 64)
    metadata = type("Metadata", (), {})()
    metadata.all_greedy, metadata.all_random, metadata.temperature = False, True, torch.ones(64)
    drafter._ppow_drafting = True
    try:
        tokens, _ = drafter._sample_from_logits(logits.clone(), metadata)
    finally:
        drafter._ppow_drafting = False
    assert len(set(tokens.tolist())) > 1, "different tokens were drawn"
    assert drafter._ppow_confidence == pytest.approx([float(logits[0].softmax(-1).max())] * 64)
