"""Prompts of every form become token ids, each once. Left out: what is refused (test_bad_input.py)."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from test_bad_input import refused

from ppow_train.generation import load_tokenizer
from ppow_train.prompts import (
    Prompt,
    check_apart,
    prompt_hash,
    read_dataset,
    read_prompts,
    read_requests,
    text_ids,
    tokenize,
)

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.arguments.x }}{% endfor %}{% endfor %}"
    "{% if tools %}[{{ tools[0].name }}]{% endif %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = [{"role": "user", "content": "draft"}]


def write(tmp_path: Path, *rows: Any) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def tokenizer(directories):
    return load_tokenizer(directories.target)


@pytest.fixture
def chat_tokenizer(tokenizer):
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def texts(tokenizer: Any, path: Path) -> list[str]:
    return [tokenizer.decode(list(ids)) for ids in tokenize(read_requests(path), tokenizer).ids]


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"prompt": "windows", "file": "x"}, ["windows"]),
        ({"messages": CHAT}, ["<user>draft<assistant>"]),
        ({"custom_id": "1", "url": "/v1", "body": {"model": "m", "messages": CHAT}}, ["<user>draft<assistant>"]),
        ({"request": {"prompt": "of", "max_tokens": 3}, "response": {"choices": []}}, ["of"]),
        ({"request": {"body": {"prompt": "of"}}}, ["of"]),
        ({"prompt": None, "messages": None, "request": {"prompt": None, "messages": CHAT}}, ["<user>draft<assistant>"]),
        ({"body": {"prompt": ["of", "windows"]}}, ["of", "windows"]),
        ({"messages": CHAT, "tools": [{"name": "f"}]}, ["<user>draft[f]<assistant>"]),
        ({"messages": CHAT, "chat_template_kwargs": {"tools": [{"name": "g"}]}}, ["<user>draft[g]<assistant>"]),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
            ["<user>a\nb<assistant>"],
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "content": "", "tool_calls": [{"function": {"arguments": '{"x": 7}'}}]},
                    {"role": "tool", "content": "of"},
                ]
            },
            ["<assistant>7<tool>of<assistant>"],
        ),
    ],
)  # fmt: skip
def test_every_form(row, wanted, tmp_path, chat_tokenizer):
    assert texts(chat_tokenizer, write(tmp_path, row)) == wanted


def test_training_and_measuring_take_what_data_takes(tmp_path, chat_tokenizer):
    """Texts stay texts, which name sets of trajectories that are already there; chats are ids by the template."""
    path = write(tmp_path, {"prompt": "windows"}, {"messages": CHAT}, {"body": {"prompt": [5, 6]}})
    prompts = read_prompts(path, chat_tokenizer)
    assert prompts[0] == "windows"
    assert prompts[2] == [5, 6]
    ids = text_ids(prompts, chat_tokenizer)
    assert ids == [list(one) for one in tokenize(read_requests(path), chat_tokenizer).ids]
    assert chat_tokenizer.decode(ids[1]) == "<user>draft<assistant>"


def test_chats_that_judge_are_not_trained_on(tmp_path):
    (tmp_path / "a").mkdir()
    path = write(tmp_path, {"messages": CHAT}, {"prompt": "of"})
    answered = [*CHAT, {"role": "assistant", "content": "of"}]
    with refused("1 prompts of", "take them out of one"):
        check_apart(path, write(tmp_path / "a", {"request": {"messages": answered}}, {"prompt": "windows"}))
    check_apart(path, write(tmp_path / "a", {"messages": answered, "tools": [{"name": "f"}]}))


def test_token_ids_of_a_log_are_taken_as_they_are(tmp_path, tokenizer):
    path = write(tmp_path, {"body": {"prompt": [5, 6, 7]}}, {"body": {"prompt": [[8], [9, 10]]}})
    assert [list(ids) for ids in tokenize(read_requests(path), tokenizer).ids] == [[5, 6, 7], [8], [9, 10]]
    with refused("line 1", "0 to", "got 99999"):
        tokenize(read_requests(write(tmp_path, {"prompt": [99999]})), tokenizer)


@pytest.mark.parametrize("answers", [1, 2])
def test_the_assistants_closing_answer_is_left_out_and_counted(answers, tmp_path, chat_tokenizer):
    """Another turn of the assistant after its own is no prompt that anybody serves."""
    answer = {"role": "assistant", "content": "windows"}
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"arguments": '{"x": 7}'}}]}
    refused_answer = {"role": "assistant", "refusal": "no"}
    assert texts(chat_tokenizer, write(tmp_path, {"messages": [*CHAT, refused_answer]})) == [
        "<user>draft<assistant>"
    ]
    turns = [*CHAT, answer, {"role": "user", "content": "of"}]
    path = write(
        tmp_path,
        {"messages": turns + [answer] * answers},
        {"messages": turns + [call] * answers},
        {"messages": CHAT},
    )
    tokenized = tokenize(read_requests(path), chat_tokenizer)
    kept = [chat_tokenizer.decode(list(ids)) for ids in tokenized.ids]
    assert kept == ["<user>draft<assistant>windows<user>of<assistant>", "<user>draft<assistant>"]
    assert (tokenized.answered, tokenized.duplicates) == (2, 1)
    assert tokenize(read_requests(path), chat_tokenizer, limit=1).answered == 1
    with refused("line 1", "all messages are the assistant's"):
        read_requests(write(tmp_path, {"messages": [answer] * answers}))


def test_an_answer_that_the_request_wants_continued_is_kept(tmp_path, chat_tokenizer):
    begun = [*CHAT, {"role": "assistant", "content": "windows"}]
    logged = {"messages": begun, "continue_final_message": True, "add_generation_prompt": False}
    path = write(tmp_path, {"body": logged}, {"messages": begun, "continue_final_message": False})
    prompts = tokenize(read_requests(path), chat_tokenizer)
    kept = [chat_tokenizer.decode(list(ids)) for ids in prompts.ids]
    assert kept == ["<user>draft<assistant>windows", "<user>draft<assistant>"]
    assert prompts.answered == 1
    # As vLLM has it: the request's own fields go before what it gives to the template, even where they are left out.
    own = {
        "messages": begun,
        "chat_template_kwargs": {"continue_final_message": True, "add_generation_prompt": False},
    }
    assert texts(chat_tokenizer, write(tmp_path, own)) == kept[1:]


def test_an_answer_that_the_template_would_drop_cannot_be_continued(tmp_path, tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    begun = [*CHAT, {"role": "assistant", "content": "windows"}]
    with refused(
        "line 1", "does not print the message that is to be continued", "leave continue_final_message out"
    ):
        tokenize(
            read_requests(write(tmp_path, {"messages": begun, "continue_final_message": True})), tokenizer
        )


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"text": "a"}, ["line 1", "`prompt` or `messages`", "neither"]),
        ({"prompt": "a", "messages": CHAT}, ["line 1", "both"]),
        ({"body": {"input": "a"}}, ["neither"]),
        ({"prompt": None, "request": {"input": "a"}}, ["neither"]),
        (["prompt"], ["JSON object"]),
        ({"prompt": ""}, ["line 1", "non-empty"]),
        ({"prompt": 3}, ["non-empty text", "got 3"]),
        ({"prompt": "cut \ud83d"}, ["line 1", "ud83d' is half a character"]),
        ({"messages": [{"role": "user", "content": "\ude00"}]}, ["line 1", "is half a character"]),
        ({"messages": []}, ["non-empty"]),
        ({"messages": ["hello", 3]}, ["non-empty"]),
        ({"messages": [{"content": "a"}]}, ["role"]),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            ["parts of text", "image_url"],
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "content": "", "tool_calls": [{"type": "custom", "custom": {}}]}
                ]
            },
            ["tool call must be one of a function", "custom"],
        ),
    ],
)
def test_malformed_requests(row, parts, tmp_path):
    with refused("prompts.jsonl", *parts):
        read_requests(write(tmp_path, row))


def test_a_line_that_is_no_json_and_an_empty_file(tmp_path):
    path = write(tmp_path, {"prompt": "a"})
    path.write_text('{"prompt": "a"}\n{"prompt"\n', encoding="utf-8")
    with refused("line 2", "JSON object"):
        read_requests(path)
    path.write_text("\n", encoding="utf-8")
    with refused("is empty", "messages"):
        read_requests(path)


def test_a_byte_order_mark_begins_no_line(tmp_path):
    """Editors and spreadsheets of some systems write one."""
    path = write(tmp_path, {"prompt": "of"})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [prompt.text for prompt in read_requests(path)] == ["of"]


def test_messages_without_a_chat_template(tmp_path, tokenizer):
    with refused("line 1", "chat template", '"prompt"'):
        tokenize(read_requests(write(tmp_path, {"messages": CHAT})), tokenizer)


def test_messages_that_the_template_refuses(tmp_path, tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with refused("line 1", "roles must alternate"):
        tokenize(read_requests(write(tmp_path, {"messages": CHAT})), tokenizer)


@pytest.mark.parametrize(
    ("template", "more", "part"),
    [
        ("{{ '<' + messages }}", {}, "concatenate"),
        ("{{ messages }}", {"chat_template_kwargs": {"documents": 5}}, "not iterable"),
        ("{{ messages }}", {"chat_template_kwargs": {"messages": []}}, "multiple values"),
        ("{{ messages }}", {"chat_template_kwargs": {"return_assistant_tokens_mask": True}}, "requires"),
    ],
)
def test_requests_that_the_template_breaks_off_at(template, more, part, tmp_path, tokenizer):
    tokenizer.chat_template = template
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"arguments": "{}"}}]}
    request = {"messages": [*CHAT, call, {"role": "tool", "content": "of"}], **more}
    with refused("prompts.jsonl, line 2", "template refuses this request", part, "leave it out"):
        tokenize(read_requests(write(tmp_path, {"prompt": "of"}, request)), tokenizer)


# As Llama 3.2 asks for the date, and, within a macro, gpt-oss.
DATED = (
    "{% macro system() %}{{ strftime_now('%Y-%m-%d') }}{% endmacro %}{{ system() }}"
    "{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% else %}{% set date_string = 'none' %}{% endif %}{% endif %}"
    " {{ date_string }} {% for m in messages %}<{{ m.content }}>{% endfor %}"
)


def set_today(monkeypatch: Any, *day: int) -> None:
    """What transformers tells a chat template by itself."""

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime.datetime:
            return cls(*day)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)


def test_a_template_that_prints_the_date_gives_the_same_ids_on_every_day(tmp_path, tokenizer, monkeypatch):
    tokenizer.chat_template = DATED
    path = write(
        tmp_path,
        {"messages": CHAT},
        {"messages": CHAT, "chat_template_kwargs": {"date_string": "1 May 2031"}},
    )
    seen = []
    for day in ((2031, 3, 3, 23, 59), (2031, 3, 4, 0, 1)):
        set_today(monkeypatch, *day)
        assert "2031-03-0" in tokenizer.apply_chat_template(CHAT, tokenize=False), "what it would print"
        seen.append(texts(tokenizer, path))
        assert text_ids(read_prompts(path, tokenizer), tokenizer) == [
            list(one) for one in tokenize(read_requests(path), tokenizer).ids
        ]
    assert seen[0] == seen[1] == ["2026-06-15 15 Jun 2026 <draft>", "2026-06-15 1 May 2031 <draft>"]


def test_duplicates_limit_and_length(tokenizer):
    prompts = [Prompt("p", text=text) for text in ("of", "windows of draft", "of", "draft", "tokens")]
    whole = tokenize(prompts, tokenizer)
    assert (len(whole.ids), whole.duplicates, whole.too_long) == (4, 1, 0)
    assert [tokenizer.decode(list(ids)) for ids in whole.ids] == ["of", "windows of draft", "draft", "tokens"]
    limited = tokenize(prompts, tokenizer, limit=2)
    assert [list(ids) for ids in limited.ids] == [list(ids) for ids in whole.ids[:2]]
    longest = max(map(len, whole.ids))
    short = tokenize(prompts, tokenizer, max_prompt_tokens=longest - 1)
    assert short.too_long == 1
    with refused("All 4 prompts", "--max-prompt-tokens"):
        tokenize(prompts, tokenizer, max_prompt_tokens=0)
    with refused("split of the dataset is empty", "at least one"):  # not that all 0 are too long
        tokenize([], tokenizer)
    assert whole.digest() != limited.digest()
    assert whole.digest() == tokenize(iter(prompts), tokenizer).digest()


def test_the_hash_of_a_prompt_never_changes():
    """It decides the split of every set on disk."""
    assert prompt_hash([1, 2, 70000]).hex()[:16] == "313a9de55e88265f"


# ---------------------------------------------------------------- datasets


@pytest.fixture
def dataset(tmp_path):
    rows = [{"question": "of", "chat": CHAT, "number": 1}, {"question": "draft", "chat": CHAT, "number": 2}]
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(folder)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_a_column_of_texts_or_chats(dataset, chat_tokenizer):
    whole = tokenize(read_dataset(dataset, "train", "question"), chat_tokenizer)
    assert [chat_tokenizer.decode(list(ids)) for ids in whole.ids] == ["of", "draft"]
    chats = tokenize(read_dataset(dataset, "train[:1]", "chat"), chat_tokenizer)
    assert chat_tokenizer.decode(list(chats.ids[0])) == "<user>draft<assistant>"


@pytest.mark.parametrize(
    ("split", "column", "parts"),
    [
        ("train", "prompt", ["no column 'prompt'", "question", "--column"]),
        ("train", "number", ["row 0", "non-empty text", "got 1"]),
        ("test", "question", ["cannot be had", "--split"]),
        ("train[:0]", "question", ["no data", "--split"]),
    ],
)
def test_datasets_that_cannot_be_used(split, column, parts, dataset):
    with refused(*parts):
        list(read_dataset(dataset, split, column))


def test_a_dataset_that_is_not_there(tmp_path):
    with refused("nowhere", "cannot be had", "--dataset"):
        list(read_dataset(str(tmp_path / "nowhere"), "train", "prompt"))
