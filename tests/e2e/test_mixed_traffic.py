"""Served with a cost profile and nothing asked for: drafts of greedy requests are trimmed, those of sampled ones not.

Batches change from one kind to the other, and back, within one engine; greedy output stays the target's throughout.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from serving_engine import engine
from serving_pair import random_lora, save_adapter
from serving_profile import PROFILE
from test_adaptive_window import MAX_TOKENS, OPTIONS, TINY, K, generate, prompts, scheduler_of

from vllm_ppow.compat import profiling
from vllm_ppow.compat.draft_window import TrimmedLength
from vllm_ppow.cost_profile import write_cost_profile

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU no draft is trimmed unasked"),
]


@pytest.fixture(scope="module")
def without_speculation():
    with engine(TINY / "target", None, **OPTIONS) as llm:
        return generate(llm)


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    """The speculative config of an adapter for sampled requests, whose cost profile holds here."""
    from vllm.engine.arg_utils import EngineArgs

    from ppow_train.drafters import load_drafter

    base = TINY / "causal_lm"
    drafter = load_drafter(base, dtype=torch.bfloat16, target=TINY / "target").model
    adapter = save_adapter(
        tmp_path_factory.mktemp("tiny") / "adapter",
        random_lora(drafter, 1e-3, target_modules=["o_proj"]),
        "causal_lm",
        base,
        TINY / "target",
        num_speculative_tokens=K,
        draft_sample_method="probabilistic",
        temperature=1.0,
    )
    # At least one token: on so small a pair drafting may not pay, and nothing would be verified.
    spec = {"method": "ppow", "model": str(adapter.directory), "ppow": {"min_tokens": 1}}
    arguments = EngineArgs(str(TINY / "target"), speculative_config=spec, enforce_eager=True, **OPTIONS)
    here = profiling.machine(arguments.create_engine_config())
    here["adapter_fingerprint"] = adapter.config.adapter_fingerprint
    here["target_fingerprint"] = adapter.config.target.fingerprint
    write_cost_profile(adapter.directory, dataclasses.replace(PROFILE, **here))
    return spec


@pytest.fixture(scope="module")
def served(spec, without_speculation):
    with engine(TINY / "target", spec, **OPTIONS) as llm:
        yield llm


@pytest.fixture
def kinds(served, monkeypatch):
    """(requests, whether their drafts were trimmed) of each step from now on."""
    drafter = served.llm_engine.model_executor.driver_worker.worker.model_runner.drafter
    propose, trimmed = drafter.propose, []

    def record(num_speculative_tokens, *args, **kwargs):
        drafts = propose(num_speculative_tokens, *args, **kwargs)
        trimmed.append((len(drafts), isinstance(num_speculative_tokens, TrimmedLength)))
        return drafts

    monkeypatch.setattr(drafter, "propose", record)
    return trimmed


def test_greedy_requests_have_their_drafts_trimmed(served, kinds, without_speculation):
    assert generate(served) == without_speculation
    assert {kind for _, kind in kinds} == {True}
    assert scheduler_of(served).ppow_window.counts.layers == ("step", "request")


def test_sampled_requests_have_not(served, kinds):
    before = scheduler_of(served).ppow_window.counts.copy()
    generate(served, temperature=1.0, seed=1)
    assert {kind for _, kind in kinds} == {False}
    counts = scheduler_of(served).ppow_window.counts - before
    assert counts.layers == ("step",)
    assert counts.accepted > 0


@pytest.mark.parametrize(("sampled", "trims"), [(2, True), (4, False)])
def test_a_batch_of_both_is_drafted_for_as_most_want_and_its_greedy_output_is_the_targets(
    served, kinds, without_speculation, sampled, trims
):
    from vllm import SamplingParams

    params = [
        SamplingParams(temperature=float(i < sampled), max_tokens=MAX_TOKENS, ignore_eos=True, seed=1)
        for i in range(6)
    ]
    outputs = served.generate(prompts(6), params, use_tqdm=False)
    assert {kind for number, kind in kinds if number == 6} == {trims}
    for i in range(sampled, 6):
        assert list(outputs[i].outputs[0].token_ids) == without_speculation[i]


def test_the_kind_changes_as_requests_end(served, kinds, without_speculation):
    """Four sampled requests leave two greedy ones behind, whose drafts are trimmed from then on."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            temperature=float(i < 4), max_tokens=8 if i < 4 else MAX_TOKENS, ignore_eos=True, seed=1
        )
        for i in range(6)
    ]
    outputs = served.generate(prompts(6), params, use_tqdm=False)
    assert {kind for number, kind in kinds if number == 6} == {False}
    assert kinds[-1][1], "greedy requests are left"
    changes = [after for before, after in itertools.pairwise(kind for _, kind in kinds) if before != after]
    assert changes == [True], "once"
    for i in (4, 5):
        assert list(outputs[i].outputs[0].token_ids) == without_speculation[i]
