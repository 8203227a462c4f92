"""The adaptive window in a real engine: same greedy output, lengths that vary, a drafter that no pause makes stale.

On the tiny pair in float32, so that no tie between tokens is decided by rounding. Left out: what it gains in time,
which two shared cores cannot tell in a test (examples/benchmarks), and lengths by request (test_request_window.py).
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from pathlib import Path

import pytest
import torch
from serving_engine import engine
from serving_pair import random_lora, save_adapter

from vllm_ppow import scheduler as scheduler_module
from vllm_ppow.change_cost import ChangeCost
from vllm_ppow.window_report import begin_report, read_report

pytestmark = pytest.mark.engine

TINY = Path(__file__).parents[2] / "examples" / "tiny"
KINDS = ("eagle3", "causal_lm")
K, MAX_TOKENS, MAX_MODEL_LEN = 8, 64, 224
OPTIONS = {
    "dtype": "float32",
    "max_model_len": MAX_MODEL_LEN,
    "max_num_seqs": 16,
    "enable_prefix_caching": False,
}


def prompts(number: int) -> list[dict]:
    """Held-out prompts of the domain that the drafters know, 96 tokens each."""
    lines = (TINY / "prompts" / "library_held_out.jsonl").read_text().splitlines()[:number]
    return [{"prompt": json.loads(line)["prompt"]} for line in lines]


def generate(llm, number=6, max_tokens=MAX_TOKENS, **options):
    from vllm import SamplingParams

    params = SamplingParams(**{"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True, **options})
    return [list(out.outputs[0].token_ids) for out in llm.generate(prompts(number), params, use_tqdm=False)]


def scheduler_of(llm):
    return llm.llm_engine.engine_core.engine_core.scheduler


@pytest.fixture(scope="module")
def without_speculation():
    with engine(TINY / "target", None, **OPTIONS) as llm:
        return {"six": generate(llm), "long": generate(llm, 1, 400)}


@pytest.fixture(scope="module", params=KINDS)
def served(request, tmp_path_factory, without_speculation):
    """(kind, engine) with an adaptive window, one engine for all tests of a kind; started when no other one runs."""
    from ppow_train.drafters import load_drafter

    kind, base = request.param, TINY / request.param
    drafter = load_drafter(base, dtype=torch.bfloat16, target=TINY / "target").model
    adapter = save_adapter(
        tmp_path_factory.mktemp("tiny") / "adapter",
        random_lora(drafter, 1e-3, target_modules=["o_proj"]),
        kind,
        base,
        TINY / "target",
        num_speculative_tokens=K,
    )
    spec = {"method": "ppow", "model": str(adapter.directory), "ppow": {"per_request": False}}
    with engine(TINY / "target", spec, **OPTIONS) as llm:
        yield kind, llm


def speculator_of(llm):
    """The V2 runner's, which keeps drafts to itself; None on the V1 runner, which hands them to the scheduler."""
    return getattr(runner_of(llm), "speculator", None)


def runner_of(llm):
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


@pytest.fixture
def drafts(served, monkeypatch):
    """What is drafted from now on: {tokens before the draft: draft}."""
    seen = {}
    if speculator_of(served[1]) is None:
        record_what_the_scheduler_is_handed(scheduler_of(served[1]), seen, monkeypatch)
    else:
        record_what_is_proposed(runner_of(served[1]), seen, monkeypatch)
    return seen


def record_what_the_scheduler_is_handed(scheduler, seen, monkeypatch):
    original = scheduler.update_draft_token_ids

    def record(draft_token_ids):
        original(draft_token_ids)
        for request in scheduler.running:
            if request.spec_token_ids:
                seen[tuple(request.all_token_ids)] = list(request.spec_token_ids)

    monkeypatch.setattr(scheduler, "update_draft_token_ids", record)


def record_what_is_proposed(runner, seen, monkeypatch):
    """By a V2 runner."""
    original, states = runner.speculator.propose, runner.req_states

    def record(batch, *args, num_speculative_tokens, **kwargs):
        drafted = original(batch, *args, num_speculative_tokens=num_speculative_tokens, **kwargs)
        rows = batch.idx_mapping[: batch.num_reqs].long()
        for row, draft in zip(rows.tolist(), drafted[:, :num_speculative_tokens].tolist(), strict=True):
            if draft:
                length = int(states.total_len.gpu[row])
                seen[tuple(states.all_token_ids.gpu[row, :length].tolist())] = draft
        return drafted

    monkeypatch.setattr(runner.speculator, "propose", record)


def test_greedy_output_is_the_targets_and_lengths_vary(served, without_speculation):
    policy = scheduler_of(served[1]).ppow_window
    before = policy.counts.copy()
    assert generate(served[1]) == without_speculation["six"]
    counts = policy.counts - before
    assert sum(times > 0 for times in counts.chosen) >= 3
    assert 0 < counts.accepted < counts.drafted
    assert policy.cost._cells, "steps were timed"


def force(monkeypatch, llm, choose):
    """Replace the policy's choice by a function of the step's number."""
    steps = iter(range(10**6))
    monkeypatch.setattr(scheduler_of(llm).ppow_window, "choose", lambda *asked: choose(next(steps)))


def drafts_after_a_pause(monkeypatch, llm, drafts, number=3):
    """Drafts of an engine that always drafts K, and of one that drafted nothing for 24 steps, at the same prefixes."""
    force(monkeypatch, llm, lambda step: K)
    always_output = generate(llm, number)
    always = dict(drafts)
    drafts.clear()
    force(monkeypatch, llm, lambda step: 0 if step < 24 else K)
    assert generate(llm, number) == always_output
    return [(always[prefix], draft) for prefix, draft in drafts.items() if prefix in always]


def test_a_long_stretch_without_drafts_leaves_the_drafter_fresh(served, drafts, monkeypatch):
    pairs = drafts_after_a_pause(monkeypatch, served[1], drafts)
    assert len(pairs) > 10
    assert [after for _, after in pairs] == [always for always, _ in pairs]


def test_a_stale_drafter_would_be_noticed(served, drafts, monkeypatch):
    """What vLLM would do if it skipped the drafter's own pass where nothing is drafted."""
    speculator = speculator_of(served[1])
    if speculator is None:
        skip_the_v1_drafter_where_nothing_is_drafted(monkeypatch)
    else:
        skip_the_v2_drafter_where_nothing_is_drafted(speculator, monkeypatch)
    pairs = drafts_after_a_pause(monkeypatch, served[1], drafts)
    assert sum(always != after for always, after in pairs) > len(pairs) / 4


def skip_the_v1_drafter_where_nothing_is_drafted(monkeypatch):
    from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

    propose = SpecDecodeBaseProposer.propose

    def skip(self, num_speculative_tokens, *args, **kwargs):
        if num_speculative_tokens == 0:
            rows = kwargs["common_attn_metadata"].batch_size()
            return torch.empty(rows, 0, dtype=torch.int64)
        return propose(self, num_speculative_tokens, *args, **kwargs)

    monkeypatch.setattr(SpecDecodeBaseProposer, "propose", skip)


def skip_the_v2_drafter_where_nothing_is_drafted(speculator, monkeypatch):
    propose = speculator.propose

    def skip(batch, *args, num_speculative_tokens, **kwargs):
        if num_speculative_tokens == 0:
            return speculator.draft_tokens[: batch.num_reqs].fill_(-1)
        return propose(batch, *args, num_speculative_tokens=num_speculative_tokens, **kwargs)

    monkeypatch.setattr(speculator, "propose", skip)


def test_drafts_go_on_to_the_end_and_none_is_of_zeros(served, drafts, without_speculation, monkeypatch):
    """By itself vLLM hands out zeros in place of drafts close to max_model_len (compat/draft_room.py)."""
    llm = served[1]
    force(monkeypatch, llm, lambda step: K)
    before = scheduler_of(llm).ppow_window.counts.copy()
    output = generate(llm, 1, 400)
    assert output == without_speculation["long"]
    longest = max(map(len, drafts))
    # The V2 runner drafts after the last token, too, which nothing verifies.
    at_the_end = 0 if speculator_of(llm) is None else 1
    assert MAX_MODEL_LEN - K < longest < MAX_MODEL_LEN + at_the_end
    assert not any(set(draft) == {0} for draft in drafts.values())
    counts = scheduler_of(llm).ppow_window.counts - before
    assert counts.drafted <= sum(map(len, drafts.values()))


def test_an_engine_that_pauses_at_changes_is_noticed(served, without_speculation, monkeypatch):
    """Two lengths that promise alike, in turns: a pause of several steps whenever another one is drafted."""
    llm, lengths, took, began = served[1], [], [0.02], []
    policy, runner = scheduler_of(llm).ppow_window, runner_of(llm)
    monkeypatch.setattr(policy, "changing", ChangeCost())
    execute = runner.execute_model

    def pausing(scheduler_output, *args, **kwargs):
        if scheduler_output.num_scheduled_tokens:
            now = time.perf_counter()
            # Whole steps: on a GPU the call returns before its step has ended.
            took.extend(now - before for before in began)
            lengths.append(scheduler_output.num_spec_tokens_to_schedule)
            if lengths[-1] != lengths[-2:][0]:
                time.sleep(5 * statistics.median(took))
            began[:] = [time.perf_counter()]
        return execute(scheduler_output, *args, **kwargs)

    choose, steps = policy.choose, iter(range(10**6))

    def in_turns(*asked):
        choose(*asked)  # so that it knows what to expect
        return 4 + next(steps) // 8 % 2

    monkeypatch.setattr(runner, "execute_model", pausing)
    monkeypatch.setattr(policy, "choose", in_turns)
    for _ in range(5):
        assert generate(llm) == without_speculation["six"]
    changes = sum(a != b for a, b in itertools.pairwise(lengths))
    assert policy.changing.steps > 1.0, f"{changes} changes"


def test_sampled_requests_beside_greedy_ones(served, without_speculation):
    from vllm import SamplingParams

    params = [
        SamplingParams(temperature=t, max_tokens=MAX_TOKENS, ignore_eos=True, seed=1) for t in (0.0, 1.0) * 3
    ]
    outputs = served[1].generate(prompts(6), params, use_tqdm=False)
    for i in (0, 2, 4):
        assert list(outputs[i].outputs[0].token_ids) == without_speculation["six"][i]


def test_what_served_is_logged(served, monkeypatch, caplog):
    import logging

    from vllm_ppow import scheduler

    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    monkeypatch.setattr(scheduler, "LOG_SECONDS", 0.0)
    with caplog.at_level(logging.INFO, logger="vllm.ppow.window"):
        generate(served[1], 1, 8)
    assert "Draft window: mean" in caplog.text
    assert "estimated speedup" in caplog.text


@pytest.mark.parametrize("method", ["choose", "observe_draft", "observe_step"])
def test_an_error_in_the_policy_fixes_the_window_and_stops_nothing(
    served, without_speculation, monkeypatch, method
):
    scheduler, calls = scheduler_of(served[1]), []
    begin_report(scheduler._report.path)
    original = getattr(scheduler.ppow_window, method)

    def failing(*args):
        calls.append(1)
        if len(calls) == 5:
            raise ZeroDivisionError("planted")
        return original(*args)

    logged = []
    monkeypatch.setattr(scheduler_module.logger, "exception", logged.append)
    for thing, name, value in (
        (scheduler, "_policy_failed", False),
        (scheduler.ppow_window.counts, "layers", ("step", "request")),
    ):
        monkeypatch.setattr(thing, name, value)  # and back again after the test
    monkeypatch.setattr(scheduler.ppow_window, method, failing)
    assert generate(served[1]) == without_speculation["six"]
    assert len(calls) == 5, "it is left alone from then on"
    (said,) = logged
    assert "fixed at its maximum" in said
    assert scheduler._last_scheduled == K
    reported = read_report(scheduler._report.path)
    assert reported is not None
    assert reported["layers"] == [], "as of a fixed window: /metrics shows which layers decide"
