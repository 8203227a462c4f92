"""Chats become the very text that the installed vLLM's server would give the target, by every template that TRL has.

The server's side is its own code: request, parameters, messages, template. Left out: models for which it has code
instead of a template (gpt-oss).
"""

from __future__ import annotations

import copy
import json
import types
from pathlib import Path
from typing import Any

import pytest
import trl
from transformers import AutoTokenizer

from ppow_train.chat import PROMPT_DATE, render
from ppow_train.errors import UserError
from ppow_train.prompts import read_requests

TINY = Path(__file__).parents[2] / "examples/tiny/target"
TEMPLATES = sorted(
    path
    for path in (Path(trl.__file__).parent / "chat_templates").glob("*.jinja")
    if not path.stem.endswith("_training") and path.stem != "gptoss"
)
USER, MORE = {"role": "user", "content": "hi"}, {"role": "user", "content": "more"}


def function(arguments: str, **more: Any) -> dict[str, Any]:
    """A tool call as OpenAI's client writes it, in another order than its types list."""
    return {
        "type": "function",
        "function": {"name": "look", "arguments": arguments, **more},
        "id": "call12345",
    }


def calling(arguments: str, **more: Any) -> list[dict[str, Any]]:
    call = {"role": "assistant", "tool_calls": [function(arguments)], "content": None, **more}
    return [USER, call, {"role": "tool", "tool_call_id": "call12345", "content": "7"}]


def parts(*texts: str | None) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text} for text in texts]


TOOL = {
    "function": {"parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}, "name": "look"}
}
REQUESTS: dict[str, dict[str, Any]] = {
    "plain": {"messages": [{"role": "system", "content": "be short"}, USER]},
    "null tool_calls": {
        "messages": [
            USER,
            {"role": "assistant", "content": "a", "tool_calls": None, "function_call": None, "refusal": None},
            MORE,
        ]
    },
    "no tool_calls": {"messages": [USER, {"role": "assistant", "content": "a", "tool_calls": []}, MORE]},
    "user's null tool_calls": {"messages": [{**USER, "tool_calls": None}]},
    "refused": {"messages": [USER, {"role": "assistant", "content": None, "refusal": "no"}, MORE]},
    "call": {"messages": calling('{"x": 7}')},
    "call beside text": {"messages": calling('{"x": 7, "y": [1]}', content="let me see")},
    "call whose arguments are no JSON": {"messages": calling('{"x": ')},
    "call whose arguments are a list": {"messages": calling("[7]")},
    "call without arguments": {"messages": calling("")},
    "reasoning": {"messages": calling("{}", content="", reasoning="I thought")},
    "reasoning_content": {"messages": calling("{}", content="", reasoning_content="I thought")},
    "parts": {"messages": [{"role": "user", "content": parts("a", "", None, "b ")}]},
    "parts of an answer": {
        "messages": [
            USER,
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}, *parts("b")]},
            MORE,
        ]
    },
    "parts of a tool": {"messages": [*calling("{}")[:2], {**calling("{}")[2], "content": parts("7", "8")}]},
    "name": {"messages": [{**USER, "name": "Ann", "task": None, "mood": "good"}]},
    "developer": {"messages": [{"role": "developer", "content": "be short"}, USER]},
    "developers": {
        "messages": [
            {"role": "system", "content": "be"},
            {"role": "developer", "content": parts("short", "and")},
            USER,
            {"role": "developer", "content": ""},
        ]
    },
    "tools": {"messages": [USER], "tools": [TOOL]},
    "tools of the template": {
        "messages": calling("{}"),
        "tools": [{**TOOL, "type": "function", "extra": 1}],
        "chat_template_kwargs": {"tools": [TOOL]},
    },
    "strict tools": {
        "messages": [USER],
        "tools": [{"function": {**TOOL["function"], "strict": True, "extra": 1, "description": "d"}}],
    },
    "effort": {"messages": [USER], "reasoning_effort": "low"},
    "no effort": {"messages": [USER], "reasoning_effort": "none"},
    "effort beside options": {
        "messages": [USER],
        "reasoning_effort": "high",
        "chat_template_kwargs": {"enable_thinking": False, "reasoning_effort": "low"},
    },
    "documents": {"messages": [USER], "documents": [{"title": "t", "text": "x"}]},
    "continued": {
        "messages": [USER, {"role": "assistant", "content": "I be"}],
        "continue_final_message": True,
        "add_generation_prompt": False,
    },
    "begun, whatever options say": {
        "messages": [USER],
        "chat_template_kwargs": {"continue_final_message": True, "add_generation_prompt": False},
    },
}  # fmt: skip


def served(request: dict[str, Any], tokenizer: Any) -> str:
    """The server's text, as its `render_chat_request` comes to it."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.renderers import hf

    asked = ChatCompletionRequest.model_validate({"model": "m", **copy.deepcopy(request)})
    tools = None if asked.tools is None else [tool.model_dump() for tool in asked.tools]
    params = asked.build_chat_params(None, "auto").with_defaults({"tools": tools, "tokenize": False})
    facts = dict.fromkeys(("tokenizer_revision", "revision", "code_revision", "multimodal_config"))
    model = types.SimpleNamespace(
        **facts,
        tokenizer=tokenizer.name_or_path,
        model=tokenizer.name_or_path,
        trust_remote_code=False,
        enable_prompt_embeds=False,
        hf_config=types.SimpleNamespace(model_type="qwen3"),
    )
    form = hf.resolve_chat_template_content_format(
        tokenizer.chat_template,
        params.chat_template_kwargs.get("tools"),
        "auto",
        tokenizer,
        model_config=model,
    )
    conversation, *_ = hf.parse_chat_messages(asked.messages, model, content_format=form)
    given = params.get_apply_chat_template_kwargs() | {"chat_template": tokenizer.chat_template}
    return hf.safe_apply_chat_template(model, tokenizer, conversation, **given)


def ours(request: dict[str, Any], tokenizer: Any, tmp_path: Path) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(request), encoding="utf-8")
    [prompt] = read_requests(path)
    assert prompt.messages is not None
    return render(prompt.messages, prompt.template_options, tokenizer, prompt.where)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.bos_token = tokenizer.eos_token  # which some templates print
    return tokenizer


@pytest.fixture(autouse=True)
def same_day(monkeypatch: Any) -> None:
    """Ours is always one day; so that it is the server's as well."""

    class Clock:
        @staticmethod
        def now() -> Any:
            return PROMPT_DATE

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_the_target_is_given_what_the_server_would_give_it(template, tokenizer, tmp_path):
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    refused = []
    for name, request in REQUESTS.items():
        try:
            wanted = served(request, tokenizer)
        except Exception:  # by vLLM's own kinds: roles that must alternate, say
            refused.append(name)
            with pytest.raises(UserError):
                ours(request, tokenizer, tmp_path)
            continue
        assert ours(request, tokenizer, tmp_path) == wanted, name
    assert len(refused) < len(REQUESTS) / 2
