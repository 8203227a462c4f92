"""What users combine with speculation answers exactly as without it, with drafters and windows of every kind.

One engine without speculation and four with method ppow answer the requests of feature_cases.py, and two more
with a LoRA on the target; chunked prefill, prefix caching and a KV cache too small for the batch are on throughout.
Left out: sampled output (test_distribution.py), tensor parallelism and servers (test_processes.py).
"""

from __future__ import annotations

import pytest
import torch
from feature_cases import (
    BACKENDS,
    CHOICE,
    MAX_MODEL_LEN,
    REFUSED,
    REGEX,
    lora_cases,
    sampling_cases,
    structured_cases,
)
from feature_engines import OPTIONS, Session, session, target_lora, tiny_adapter

pytestmark = pytest.mark.engine

# An adaptive window drafts at least one token here: on so small a pair it would not pay, and nothing would be verified.
ADAPTIVE = {"window": "adaptive", "min_tokens": 1}
BY_REQUEST = {**ADAPTIVE, "per_request": True}
ARMS = {
    "eagle3, adaptive": ("eagle3", ADAPTIVE),
    "eagle3, by request": ("eagle3", BY_REQUEST),
    "eagle3, fixed": ("eagle3", {"window": "fixed"}),
    "causal_lm, by request": ("causal_lm", BY_REQUEST),
}
LORA = {"enable_lora": True, "max_lora_rank": 8, "logprobs_mode": "processed_logprobs"}
if torch.cuda.is_available():
    LORA["dtype"] = "float16"  # vLLM's LoRA kernels for GPUs take no float32
# Greatest difference of a log-probability, in nats: batches of other shapes sum in another order, in float32, of which
# kernels for GPUs may keep ten bits (TF32), as many as float16 has. Seen: up to 7.5e-4 on an H200.
TOLERANCE = 4e-3 if torch.cuda.is_available() else 1e-4
NAMES = [
    *sampling_cases(),
    "prefix caching",
    "streaming",
    "abort",
    *(f"{backend}: {name}" for backend in BACKENDS for name in structured_cases()),
]


@pytest.fixture(scope="module")
def without() -> Session:
    """Answers without speculation."""
    return session(None, sampling_cases(), structured_cases())


@pytest.fixture(scope="module", params=ARMS)
def ours(request, tmp_path_factory) -> Session:
    """Answers with method ppow, for a drafter of either kind."""
    kind, options = ARMS[request.param]
    adapter = tiny_adapter(tmp_path_factory.mktemp("features"), kind)
    spec = {"method": "ppow", "model": str(adapter), "ppow": options}
    return session(spec, sampling_cases(), structured_cases())


@pytest.fixture(scope="module")
def with_lora(tmp_path_factory) -> tuple[Session, Session]:
    """Answers of a target with LoRA, without speculation and with it."""
    root = tmp_path_factory.mktemp("lora")
    lora = target_lora(root / "lora")
    spec = {"method": "ppow", "model": str(tiny_adapter(root, "eagle3")), "ppow": ADAPTIVE}
    return (
        session(None, lora_cases(), lora=lora, **LORA),
        session(spec, lora_cases(), lora=lora, **LORA),
    )


def assert_same(name: str, requests: list, wanted: Session, found: Session) -> None:
    """Same tokens, text and reason to stop; log-probabilities of the same tokens within TOLERANCE."""
    assert len(found.answers[name]) == len(wanted.answers[name])
    for index, (one, other) in enumerate(zip(wanted.answers[name], found.answers[name], strict=True)):
        if requests and not requests[index].compared:
            assert [len(answer.token_ids) > 0 for answer in other] == [True] * len(one)
            continue
        for answer, answered in zip(one, other, strict=True):
            assert answered.token_ids == answer.token_ids, (name, index, answer.text, answered.text)
            assert answered.text == answer.text
            assert (answered.finish_reason, answered.stop_reason) == (
                answer.finish_reason,
                answer.stop_reason,
            )
            assert_close(answer.logprobs, answered.logprobs)
            assert_close(answer.prompt_logprobs, answered.prompt_logprobs)


def assert_close(wanted: list[dict[int, float]], found: list[dict[int, float]]) -> None:
    assert [set(position) for position in found] == [set(position) for position in wanted]
    for position, other in zip(wanted, found, strict=True):
        for token, value in position.items():
            assert other[token] == pytest.approx(value, abs=TOLERANCE), token


@pytest.mark.parametrize("name", NAMES)
def test_same_as_without_speculation(without, ours, name):
    assert_same(name, sampling_cases().get(name, []), without, ours)


def test_the_engines_did_what_the_cases_are_for(without, ours):
    """Drafts were verified and accepted, requests were preempted, prefixes were found, prompts came in chunks."""
    for found in (without, ours):
        assert found.counters["vllm:num_preemptions"] > 0
        assert found.counters["vllm:prefix_cache_hits"] > 0
    assert ours.counters["vllm:spec_decode_num_accepted_tokens"] > 100
    assert (
        max(len(request.prompt) for request in sampling_cases()["chunked prefill"])
        > (OPTIONS["max_num_batched_tokens"])
    )
    lengths = [len(request.prompt) for request in sampling_cases()["max_model_len"]]
    for length, answers in zip(lengths, ours.answers["max_model_len"], strict=True):
        if answers[0].finish_reason == "length":
            assert length + len(answers[0].token_ids) == MAX_MODEL_LEN


def test_options_change_the_answer(without):
    """A case whose option changed nothing would compare nothing."""
    plain = [answers[0].token_ids for answers in without.answers["plain"]]
    same = ("plain", "chunked prefill", "logprobs", "prompt_logprobs", "n", "greedy beside sampled")
    for name in sampling_cases():
        if name in same or name in ("preemption", "max_model_len", "logprobs with penalties"):
            continue
        assert [answers[0].token_ids for answers in without.answers[name]][: len(plain)] != plain, name
    assert all(len(position) >= 3 for position in without.answers["logprobs"][0][0].logprobs)
    assert len(without.answers["prompt_logprobs"][0][0].prompt_logprobs) > 30
    assert {answer.stop_reason for answers in without.answers["stop strings"] for answer in answers} > {"\n"}


def test_what_vllm_cannot_verify_is_refused_in_a_sentence(without, ours):
    assert without.refusals == {}
    assert set(ours.refusals) == set(REFUSED)
    for sentence in ours.refusals.values():
        assert "not yet supported with speculative decoding" in sentence


def test_structured_output_is_what_was_asked_for(ours):
    import re

    for backend in BACKENDS:
        for answers in ours.answers[f"{backend}: choice"]:
            assert answers[0].text in CHOICE
        for answers in ours.answers[f"{backend}: regex"]:
            assert re.fullmatch(REGEX, answers[0].text)
        for answers in ours.answers[f"{backend}: json"]:
            assert answers[0].text.startswith("{")


@pytest.mark.parametrize("name", lora_cases())
def test_lora_on_the_target_is_the_same_as_without_speculation(with_lora, name):
    without, ours = with_lora
    assert_same(name, lora_cases()[name], without, ours)


def test_the_lora_changes_what_the_target_writes(with_lora, without):
    for found in with_lora:
        pairs = zip(found.answers["lora"], without.answers["plain"], strict=False)
        assert any(one[0].token_ids != other[0].token_ids for one, other in pairs)
    assert with_lora[1].counters["vllm:spec_decode_num_accepted_tokens"] > 0
