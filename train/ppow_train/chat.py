"""Chats through the target's chat template: the text that vLLM's server would give the target for the same request.

What a template is handed is settled as there: `ChatCompletionRequest` (entrypoints/openai/chat_completion/protocol.py),
`_parse_chat_message_content` and `_postprocess_messages` (entrypoints/ or renderers/chat_utils.py),
`safe_apply_chat_template` (renderers/hf.py). A template that asks for today's date is told `PROMPT_DATE`, on every day.
Left out: files and token ids (prompts.py), pictures and sound, and models whose chats vLLM encodes by code of its own.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ppow_train.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What chat templates print as today (Llama 3.2, gpt-oss). Were it the day itself, every chat would have other ids after
# midnight: what was interrupted could not go on, caches would be lost, other prompts would be held out. An adapter is
# served on other days than it is trained on in any case.
PROMPT_DATE = datetime.datetime(2026, 6, 15, 12)
# A request's field by which its last message is one to go on with, not to answer.
CONTINUE = "continue_final_message"
_BEGIN = "add_generation_prompt"
# Kinds of content parts that are text, each with the key that has it.
_TEXT_KEYS = {
    **dict.fromkeys(("text", "input_text", "output_text"), "text"),
    "refusal": "refusal",
    "thinking": "thinking",
}


# ---------------------------------------------------------------- what a request says


def served_message(message: dict[str, Any], where: str) -> dict[str, Any]:
    """What vLLM's server keeps of a message: null or empty tool_calls, say, are none, and other keys are dropped.

    Args:
        where: for the error.

    Returns:
        `content` is a list of texts, as many as it had parts; none where it was null.

    Raises:
        UserError: no role, no content where there must be one, or content that is no text.
    """
    role, calls = message.get("role"), message.get("tool_calls")
    if calls and not _are_objects(calls):
        raise UserError(f"{where}: tool_calls must be a list of objects, got {calls!r:.60}.")
    if not isinstance(role, str):
        raise UserError(_malformed(message, where))
    kept: dict[str, Any] = {"role": role, "content": _texts(message, where)}
    if role == "assistant":
        if calls:
            kept["tool_calls"] = [_tool_call(call, where) for call in calls]
        if (reasoning := _reasoning(message, where)) is not None:
            kept |= {"reasoning": reasoning, "reasoning_content": reasoning}  # templates read either
    elif role == "tool" and "tool_call_id" in message:
        kept["tool_call_id"] = message["tool_call_id"]
    elif role == "developer":
        kept["tools"] = message.get("tools")
    return kept | {name: message[name] for name in ("name", "task") if isinstance(message.get(name), str)}


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _malformed(message: dict[str, Any], where: str) -> str:
    return f"{where}: a message needs a role and, unless it has tool_calls, a content: texts, got {message!r:.60}."


def _texts(message: dict[str, Any], where: str) -> list[str]:
    content = message.get("content")
    if content is None and (message.get("tool_calls") or message["role"] == "assistant"):
        return []  # an assistant that calls tools, or whose answer is a refusal, has none
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        raise UserError(_malformed(message, where))
    return [text for part in content if (text := _text(part, content, where)) is not None]


def _text(part: Any, content: list[Any], where: str) -> str | None:
    if isinstance(part, str):
        return part
    kind = str(part.get("type", "text")) if isinstance(part, dict) else ""
    if kind in _TEXT_KEYS and isinstance(text := part.get(_TEXT_KEYS[kind]), str | None):
        return text
    raise UserError(f"{where}: only parts of text can be drafted for, got {repr(content)[:60]}.")


def _reasoning(message: dict[str, Any], where: str) -> str | None:
    """What the assistant thought: under its name of today, or else the one that vLLM gave it before."""
    reasoning = message.get("reasoning")
    reasoning = message.get("reasoning_content") if reasoning is None else reasoning
    if not (reasoning is None or isinstance(reasoning, str)):
        raise UserError(f"{where}: reasoning must be a text, got {reasoning!r:.60}.")
    return reasoning


def _tool_call(call: dict[str, Any], where: str) -> dict[str, Any]:
    """With arguments as an object, which templates print; OpenAI sends a text of JSON.

    Arguments that are no JSON object become an empty one, as the server has it: a call that the target once got wrong
    stays in the history of every request after it.
    """
    function = call.get("function")
    if not isinstance(function, dict) or call.get("type") not in (None, "function"):
        raise UserError(f"{where}: a tool call must be one of a function, got {repr(call)[:60]}.")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = {}
    named = {"arguments": arguments if isinstance(arguments, dict) else {}}
    return _in_order(
        {**call, "function": _in_order({**function, **named}, "arguments", "name")}, "id", "function"
    )


def _in_order(value: dict[str, Any], *names: str) -> dict[str, Any]:
    """These keys first, as the server's types list them: some templates print the whole object."""
    return {**{name: value[name] for name in names if name in value}, **value}


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool with the fields that the server gives it, in its order; other forms than OpenAI's stay as they are."""
    function = tool.get("function")
    if not isinstance(function, dict):
        return tool
    named = {name: function.get(name) for name in ("name", "description", "parameters")}
    if function.get("strict") is not None:
        named["strict"] = function["strict"]
    return {"type": "function", "function": named}


def template_options(request: dict[str, Any], where: str) -> dict[str, Any]:
    """What a request gives to the chat template, but for the template itself and the form of what comes out of it.

    Whether the answer is begun anew or continued is the request's own field, whatever chat_template_kwargs say.

    Raises:
        UserError: chat_template_kwargs or tools of another form.
    """
    given = request.get("chat_template_kwargs") or {}
    if not isinstance(given, dict) or {"chat_template", "tokenize"} & given.keys():
        raise UserError(
            f"{where}: chat_template_kwargs must be an object without chat_template and tokenize, got {given!r:.60}."
        )
    tools = given.get("tools") or request.get("tools")
    if tools and not _are_objects(tools):
        raise UserError(f"{where}: tools must be a list of objects, got {tools!r:.60}.")
    options = {name: value for name, value in given.items() if name not in ("tools", CONTINUE, _BEGIN)}
    if tools:
        options["tools"] = tools if given.get("tools") else [_tool(tool) for tool in tools]
    options |= {
        name: request[name] for name in ("documents", "reasoning_effort") if request.get(name) is not None
    }
    if (effort := request.get("reasoning_effort")) is not None and "enable_thinking" not in given:
        options["enable_thinking"] = effort != "none"
    return options | ({CONTINUE: True} if request.get(CONTINUE) is True else {})


# ---------------------------------------------------------------- what the template makes of it


def render(
    messages: Sequence[dict[str, Any]],
    options: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    where: str,
) -> str:
    """The text that the target continues.

    Args:
        messages: of `served_message`.
        options: of `template_options`.
        tokenizer: the target's.
        where: for the error.

    Raises:
        UserError: there is no chat template, or it refuses these messages.
    """
    from jinja2.exceptions import TemplateError

    if not tokenizer.chat_template:
        raise UserError(
            f"{where}: messages need a chat template, and the tokenizer of this target has none: give "
            '{"prompt": "…"} with the text that the target shall continue.'
        )
    begins = not options.get(CONTINUE)
    try:
        template = tokenizer.get_chat_template(None, tools=options.get("tools"))
        return tokenizer.apply_chat_template(
            _for_template(messages, tokenizer, template),
            chat_template=template,
            tokenize=False,
            **{_BEGIN: begins, **options, "strftime_now": _strftime_now},
        )
    except (TemplateError, TypeError, ValueError) as error:
        why = f"refuses this request ({' '.join(str(error).split())[:200]}): correct it, or leave it out"
        if isinstance(error, ValueError) and not begins:
            why = f"does not print the message that is to be continued: leave {CONTINUE} out"
        raise UserError(f"{where}: the target's chat template {why}.") from error


def _strftime_now(form: str) -> str:
    """What chat templates call for the date, as transformers' own function of that name, but on `PROMPT_DATE`."""
    return PROMPT_DATE.strftime(form)


def _for_template(
    messages: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, template: str
) -> list[dict[str, Any]]:
    """Content as the template takes it, and developers as the system where it knows none."""
    parts = _takes_parts(tokenizer, template)
    chat = [{**message, "content": _content(message, parts)} for message in messages]
    if any(message["role"] == "developer" for message in chat) and not (
        "'developer'" in template or '"developer"' in template
    ):
        return _one_system([_as_system(message) for message in chat])
    return chat


def _content(message: dict[str, Any], parts: bool) -> str | list[dict[str, str]]:
    texts = message["content"]
    if parts and message["role"] != "tool":
        return [{"type": "text", "text": text} for text in texts]
    return "\n".join(texts if parts else filter(None, texts))


@functools.lru_cache(maxsize=4)
def _takes_parts(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    """Whether a template prints content that is a list of parts; vLLM reads that from its code, this tries it."""
    texts = ("first part", "second part")
    probe = [{"role": "user", "content": [{"type": "text", "text": text} for text in texts]}]
    try:
        printed = tokenizer.apply_chat_template(probe, chat_template=template, tokenize=False)
    except Exception:  # whatever a template does with a list that it does not expect
        return False
    return all(text in printed for text in texts) and not any(
        f"{quote}type{quote}" in printed for quote in "'\""
    )


def _as_system(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] != "developer":
        return message
    return {name: value for name, value in message.items() if name != "tools"} | {"role": "system"}


def _one_system(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All that the system says in one message before the others, unless it is there already."""
    system = [message for message in chat if message["role"] == "system"]
    others = [message for message in chat if message["role"] != "system"]
    if system == chat[: len(system)] and len(system) == 1:
        return chat
    said = [
        text if isinstance(text, str) else "\n".join(part["text"] for part in text)
        for text in (message["content"] for message in system)
    ]
    return [{"role": "system", "content": "\n\n".join(filter(None, said))}, *others]
