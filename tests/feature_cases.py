"""What users combine with speculation, as requests: the same go to an engine without and to engines with it.

Every case is greedy, or made deterministic by top_k = 1, so that answers can be compared token by token; requests of a
case are sent together. Left out: engines (feature_engines.py), and what is asserted (e2e/test_features.py).
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

TINY = Path(__file__).parents[1] / "examples" / "tiny"
MAX_TOKENS, MAX_MODEL_LEN = 24, 128
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "passed": {"type": "boolean"}},
    "required": ["name", "passed"],
    "additionalProperties": False,
}
REGEX = r"assert[A-Z][a-z]{2,8}\((self|other), [0-9]{1,3}\)"
CHOICE = ["assertEqual", "assertRaises", "assertTrue"]
GRAMMAR = 'root ::= "self." name "(" name ")"\nname ::= "foo" | "bar" | "assertEqual"'
# Options that vLLM refuses when it speculates, whatever the method.
REFUSED: dict[str, dict[str, Any]] = {
    "min_p": {"min_p": 0.1, "temperature": 1.0},
    "logit_bias": {"logit_bias": {5: 1.0}},
}
BACKENDS = ("xgrammar", "guidance", "outlines")


@dataclasses.dataclass(frozen=True)
class Request:
    """One request.

    Attributes:
        prompt: token ids.
        options: of SamplingParams, beside temperature 0 and MAX_TOKENS.
        structured: options of StructuredOutputsParams, or None.
        lora: whether it asks for the target's LoRA.
        compared: whether its answer must be the same without speculation; False for sampled neighbours.
    """

    prompt: list[int]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    structured: dict[str, Any] | None = None
    lora: bool = False
    compared: bool = True


def prompts(count: int, start: int = 0, length: int = 40) -> list[list[int]]:
    """Held-out prompts of the tiny pair as token ids, cut to `length` tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY / "target")
    lines = (TINY / "prompts" / "tests_held_out.jsonl").read_text().splitlines()[start : start + count]
    return [tokenizer(json.loads(line)["prompt"])["input_ids"][:length] for line in lines]


def _all(texts: list[list[int]], *options: dict[str, Any], **fields: Any) -> list[Request]:
    """Every prompt with every set of options."""
    return [Request(text, option, **fields) for option in options for text in texts]


def sampling_cases() -> dict[str, list[Request]]:
    """Name -> requests, for engines without LoRA."""
    texts = prompts(4)
    stops = [10, 11, 12, 13, 198, 223, 224, 225, 514]
    return {
        "plain": _all(texts, {}),
        "chunked prefill": _all(prompts(4, start=8, length=100), {}, {"max_tokens": 3}),
        "max_model_len": _all(texts, {"max_tokens": MAX_MODEL_LEN}),
        "repetition_penalty": _all(texts, {"repetition_penalty": 1.3}),
        "presence_penalty": _all(texts, {"presence_penalty": 1.0}),
        "frequency_penalty": _all(texts, {"frequency_penalty": 1.0}),
        "penalties beside none": _all(
            texts, {"frequency_penalty": 0.7, "presence_penalty": -0.5, "repetition_penalty": 0.8}, {}
        ),
        "bad_words": _all(texts, {"bad_words": ["self", "assert", " test"]}),
        "allowed_token_ids": _all(texts, {"allowed_token_ids": list(range(300, 900))}),
        "min_tokens": _all(texts, {"min_tokens": 12, "stop_token_ids": stops}),
        "stop strings": _all(
            texts, {"stop": ["self", "("], "include_stop_str_in_output": True}, {"stop": ["\n"]}
        ),
        "stop_token_ids": _all(texts, {"stop_token_ids": stops}),
        "logprobs": _all(texts, {"logprobs": 3}),
        "logprobs with penalties": _all(texts, {"logprobs": 2, "frequency_penalty": 1.0}, {"logprobs": 0}),
        "prompt_logprobs": _all(texts, {"prompt_logprobs": 2, "logprobs": 1}),
        "n": _all(texts, {"n": 3, "temperature": 1.0, "top_k": 1}),
        "greedy beside sampled": _all(texts, {})
        + _all(texts, {"temperature": 1.0, "top_p": 0.9}, compared=False),
        "preemption": _all(prompts(8, start=16), {"max_tokens": 80}),
        "structured beside free": _all(texts, {}, structured={"regex": REGEX}) + _all(texts, {}),
        "structured with penalties": _all(
            texts, {"repetition_penalty": 1.2, "min_tokens": 5}, structured={"regex": REGEX}
        ),
        "grammar": _all(texts, {}, structured={"grammar": GRAMMAR}),
    }


def structured_cases() -> dict[str, list[Request]]:
    """Name -> requests with structured output that every backend understands."""
    texts = prompts(3)
    return {
        "json": _all(texts, {"max_tokens": 40}, structured={"json": SCHEMA}),
        "regex": _all(texts, {}, structured={"regex": REGEX}),
        "choice": _all(texts, {}, structured={"choice": CHOICE}),
    }


def lora_cases() -> dict[str, list[Request]]:
    """Name -> requests for engines with LoRA on the target.

    All of a batch use it: on a CPU vLLM 0.32 gives it to the others too, also without speculation (tests/contracts).
    """
    texts = prompts(3)
    return {
        "lora": _all(texts, {}, lora=True),
        "lora with logprobs and penalties": _all(
            texts, {"logprobs": 2, "repetition_penalty": 1.2}, {"logprobs": 1}, lora=True
        ),
    }
