"""Runs the requests of feature_cases.py in engines without and with speculation, and keeps what they answered.

An engine lives only while it answers; tests compare what was kept. Models compute in float32 here: bfloat16 has near
ties that batches of other shapes decide otherwise, with and without speculation. Left out: what is asserted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from feature_cases import BACKENDS, MAX_MODEL_LEN, MAX_TOKENS, REFUSED, TINY, Request, prompts
from serving_engine import engine
from serving_pair import random_lora, save_adapter

NUM_SPECULATIVE_TOKENS = 4
# Prompts are prefilled in chunks of at most 64 tokens, the batch's, and 8 requests do not fit the 12 blocks of 32.
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": MAX_MODEL_LEN,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "enable_prefix_caching": True,
    "block_size": 32,
    "num_gpu_blocks_override": 12,
    "seed": 0,
}


@dataclasses.dataclass(frozen=True)
class Answer:
    """One output of one request; log-probabilities by token id, per position."""

    token_ids: list[int]
    text: str
    finish_reason: str | None
    stop_reason: int | str | None
    logprobs: list[dict[int, float]]
    prompt_logprobs: list[dict[int, float]]


@dataclasses.dataclass(frozen=True)
class Session:
    """What an engine answered: case -> one list of answers per request; what it refused; its counters at the end."""

    answers: dict[str, list[list[Answer]]]
    refusals: dict[str, str]
    counters: dict[str, float]


def tiny_adapter(root: Path, kind: str, method: str = "greedy") -> Path:
    """A small random adapter on a drafter of the tiny pair."""
    from ppow_train.drafters import load_drafter

    model = load_drafter(TINY / kind, dtype=torch.bfloat16, target=TINY / "target").model
    adapter = save_adapter(
        root / f"{kind}_{method}",
        random_lora(model, 0.02),
        kind,
        TINY / kind,
        TINY / "target",
        num_speculative_tokens=NUM_SPECULATIVE_TOKENS,
        draft_sample_method=method,
    )
    return adapter.directory


def target_lora(directory: Path) -> Path:
    """A random LoRA of the tiny target that changes what it writes."""
    from transformers import Qwen3ForCausalLM

    target = Qwen3ForCausalLM.from_pretrained(TINY / "target", dtype=torch.bfloat16)
    random_lora(target, 0.05).save_pretrained(directory)
    return directory


def ask(llm: Any, requests: Sequence[Request], lora: Path | None = None) -> list[list[Answer]]:
    """Answers to requests that are sent together."""
    from vllm.lora.request import LoRARequest

    adapters = [LoRARequest("lora", 1, str(lora)) if request.lora else None for request in requests]
    outputs = llm.generate(
        [{"prompt_token_ids": request.prompt} for request in requests],
        [sampling_params(request) for request in requests],
        lora_request=adapters if any(adapters) else None,
        use_tqdm=False,
    )
    return [[_answer(output, one) for one in output.outputs] for output in outputs]


def sampling_params(request: Request, **options: Any) -> Any:
    """vLLM's SamplingParams of a request."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    structured = StructuredOutputsParams(**request.structured) if request.structured else None
    return SamplingParams(
        **{
            "temperature": 0.0,
            "max_tokens": MAX_TOKENS,
            "structured_outputs": structured,
            **request.options,
            **options,
        }
    )


def _answer(output: Any, one: Any) -> Answer:
    def values(positions: Any) -> list[dict[int, float]]:
        return [
            {token: entry.logprob for token, entry in (position or {}).items()}
            for position in positions or []
        ]

    return Answer(
        list(one.token_ids),
        one.text,
        one.finish_reason,
        one.stop_reason,
        values(one.logprobs),
        values(output.prompt_logprobs),
    )


def session(
    spec: dict[str, Any] | None,
    cases: dict[str, list[Request]],
    structured: dict[str, list[Request]] | None = None,
    lora: Path | None = None,
    **options: Any,
) -> Session:
    """Start an engine, ask everything, stop it.

    Args:
        structured: cases to ask once per backend of structured output, kept as "BACKEND: NAME".
        lora: directory of the target's LoRA.
    """
    with engine(TINY / "target", spec, **{**OPTIONS, **options}) as llm:
        answers = {name: ask(llm, requests, lora) for name, requests in cases.items()}
        if structured:
            answers["prefix caching"] = ask(llm, shared_prefix(), lora) + ask(llm, shared_prefix(), lora)
            answers["streaming"] = [stream(llm, Request(text)) for text in prompts(2)]
            answers["abort"] = ask_while_others_abort(llm)
            for backend in BACKENDS:
                use_backend(llm, backend)
                for name, requests in structured.items():
                    answers[f"{backend}: {name}"] = ask(llm, requests)
        return Session(answers, refusals(llm), counters(llm))


def refusals(llm: Any) -> dict[str, str]:
    """The sentence with which an option is refused, by option."""
    from vllm.exceptions import VLLMValidationError

    sentences = {}
    for name, option in REFUSED.items():
        try:
            ask(llm, [Request([5, 6, 7], {**option, "max_tokens": 2})])
        except VLLMValidationError as error:
            sentences[name] = str(error)
    return sentences


def shared_prefix() -> list[Request]:
    """Requests whose first 80 tokens are the same."""
    start = prompts(1, start=40, length=80)[0]
    return [Request(start + text[:8]) for text in prompts(4)]


def counters(llm: Any) -> dict[str, float]:
    """vLLM's plain counters by name."""
    return {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}


def stream(llm: Any, request: Request) -> list[Answer]:
    """The answer put together from the pieces of a stream."""
    from vllm.sampling_params import RequestOutputKind

    llm_engine = llm.llm_engine
    params = sampling_params(request, output_kind=RequestOutputKind.DELTA)
    llm_engine.add_request("stream", {"prompt_token_ids": request.prompt}, params)
    tokens: list[int] = []
    text, last = "", None
    while llm_engine.has_unfinished_requests():
        for output in llm_engine.step():
            last = output.outputs[0]
            tokens += last.token_ids
            text += last.text
    return [Answer(tokens, text, last.finish_reason, last.stop_reason, [], [])]


def ask_while_others_abort(llm: Any) -> list[list[Answer]]:
    """Answers to two requests while two more are aborted, one while it waits to be prefilled, one mid-answer."""
    llm_engine = llm.llm_engine
    texts = prompts(4)
    for i, text in enumerate(texts):
        params = sampling_params(Request(text))
        llm_engine.add_request(f"abort-{i}", {"prompt_token_ids": text}, params)
    answers, steps = {}, 0
    while llm_engine.has_unfinished_requests():
        for output in llm_engine.step():
            if output.finished:
                answers[output.request_id] = [_answer(output, output.outputs[0])]
        steps += 1
        if steps in (1, 5):
            llm_engine.abort_request([f"abort-{3 if steps == 1 else 1}"])
    assert sorted(answers) == ["abort-0", "abort-2"]
    return [answers[name] for name in sorted(answers)]


def use_backend(llm: Any, backend: str) -> None:
    """Let an engine in this process build another backend of structured output for the next request.

    A server has one backend, given at start-up; starting one engine for each would only repeat what is the same.
    """
    llm.llm_engine.vllm_config.structured_outputs_config.backend = backend
    core = llm.llm_engine.engine_core.engine_core
    core.vllm_config.structured_outputs_config.backend = backend
    core.structured_output_manager.backend = None
