"""Ordinary chat logs through the templates of well-known models: nothing is refused, nothing becomes the text "None".

Left out: that every text is the one that vLLM's server would give the target (tests/contracts/test_chat_seams.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trl
from test_bad_input import refused

from ppow_train.chat import render, served_message, template_options
from ppow_train.generation import load_tokenizer

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
CALL = {"id": "call12345", "type": "function", "function": {"name": "look", "arguments": '{"x": 7}'}}
USER = {"role": "user", "content": "windows"}
# As the OpenAI SDK's model_dump() writes an answer, and Arrow a row.
DUMPED = {"refusal": None, "annotations": None, "audio": None, "function_call": None, "tool_calls": None}
REFUSAL = {"role": "assistant", "content": None, "refusal": "no"}
CALLING = [
    {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning": "thought"},
    {"role": "tool", "tool_call_id": "call12345", "content": "of"},
]


@pytest.fixture
def tokenizer(directories):
    tokenizer = load_tokenizer(directories.target)
    tokenizer.bos_token = "<s>"
    return tokenizer


def text(tokenizer: Any, *messages: dict[str, Any], **request: Any) -> str:
    given = [served_message(message, "line 1") for message in messages]
    return render(given, template_options(request, "line 1"), tokenizer, "line 1")


def use(tokenizer: Any, name: str) -> None:
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name",
    [
        "llama3", "llama3_1", "llama3_2", "qwen2_5", "qwen3", "qwen3_5_think", "phi3", "gemma3", "deepseekv3",
        "glm4moe",
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"role": "assistant", "content": "draft", **DUMPED}, "draft"),
        ({"role": "assistant", "content": "draft", "tool_calls": []}, "draft"),
        (REFUSAL, ""),
        ({**REFUSAL, **DUMPED}, ""),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, "no"),
    ],
)
def test_answers_as_they_are_logged(name, answer, said, tokenizer):
    use(tokenizer, name)
    printed = text(
        tokenizer, {**USER, "tool_calls": None, "name": None}, answer, {"role": "user", "content": "of"}
    )
    assert "None" not in printed
    assert said in printed.partition("windows")[2].rpartition("of")[0]


@pytest.mark.parametrize(
    "name", ["llama3_1", "llama3_2", "qwen2_5", "phi3", "qwen3", "qwen3_5_think", "glm4moe"]
)
def test_tool_calls_without_content(name, tokenizer):
    """Left out: the templates of Gemma 3, Llama 3 and DeepSeek V3, which refuse tools or objects, in vLLM too."""
    use(tokenizer, name)
    printed = text(tokenizer, USER, *CALLING)
    assert "None" not in printed


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "glm4moe"])
@pytest.mark.parametrize(
    "given", [{"reasoning": "thought"}, {"reasoning_content": "thought", "reasoning": None}]
)
def test_reasoning_is_printed_under_either_name(name, given, tokenizer):
    use(tokenizer, name)
    call = {name: value for name, value in CALLING[0].items() if name != "reasoning"}
    assert "thought" in text(tokenizer, USER, {**call, **given}, CALLING[1])


@pytest.mark.parametrize("arguments", ['{"x": ', "[7]", "7", "", None])
def test_arguments_that_are_no_object_are_an_empty_one(arguments, tokenizer):
    """What the target once got wrong stays in the history; the server goes on, and so does training."""
    use(tokenizer, "qwen3")
    call = {**CALL, "function": {"name": "look", "arguments": arguments}}
    assert '"arguments": {}' in text(tokenizer, USER, {**CALLING[0], "tool_calls": [call]}, CALLING[1])


def test_the_effort_of_reasoning_reaches_the_template(tokenizer):
    tokenizer.chat_template = "{{ reasoning_effort }} {{ enable_thinking }}"
    assert text(tokenizer, USER, reasoning_effort="low") == "low True"
    assert text(tokenizer, USER, reasoning_effort="none") == "none False"
    told = {"chat_template_kwargs": {"enable_thinking": False, "reasoning_effort": "low"}}
    assert text(tokenizer, USER, reasoning_effort="high", **told) == "high False"
    assert text(tokenizer, USER, reasoning_effort=None) == " "


@pytest.mark.parametrize(("name", "joined"), [("gemma3", "windowsof"), ("qwen2_5", "windows\nof")])
def test_parts_of_text_are_joined_by_the_template_that_takes_them(name, joined, tokenizer):
    use(tokenizer, name)
    parts = [{"type": "text", "text": part} for part in ("windows", None, "of")]
    assert joined in text(tokenizer, {"role": "user", "content": parts})


def test_a_developer_is_the_system_where_the_template_knows_none(tokenizer):
    use(tokenizer, "qwen2_5")
    messages = [USER, {"role": "developer", "content": "draft"}]
    assert text(tokenizer, *messages).startswith(
        "<|im_start|>system\ndraft<|im_end|>\n<|im_start|>user\nwindows"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}{% endfor %}{# 'developer' #}"
    assert text(tokenizer, *messages) == "userdeveloper"


@pytest.mark.parametrize(
    ("message", "parts"),
    [
        ({"role": "user", "content": None}, ["line 1", "a message needs a role", "a content"]),
        ({"role": "user", "content": None, "tool_calls": []}, ["a content"]),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ["parts of text", "image_url"]),
        ({"role": "user", "content": [7]}, ["parts of text"]),
        ({"role": "assistant", "content": "a", "reasoning": {"x": 1}}, ["reasoning must be a text"]),
        ({"role": "assistant", "tool_calls": [{"function": "look"}]}, ["tool call must be one of a function"]),
        ({"role": "assistant", "tool_calls": [7]}, ["tool_calls must be a list of objects", "got .7"]),
    ],
)  # fmt: skip
def test_messages_that_no_server_takes(message, parts):
    with refused(*parts):
        served_message(json.loads(json.dumps(message)), "prompts.jsonl, line 1")
