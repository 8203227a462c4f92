"""Prompts of every form, turned into token ids: text, chat messages, request logs, a Hugging Face dataset.

One JSON object per line holds `prompt` or `messages`, itself or inside a `body` or `request` object as servers log
them. `tokenize`, which `ppow data` uses, drops duplicates by token ids, because that is what the target sees;
`read_prompts` keeps them. Left out: what the chat template is handed (chat.py), what continues the prompts
(generation.py).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ppow_train.chat import CONTINUE, render, served_message, template_options
from ppow_train.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A prompt to continue: text, or token ids where special tokens are settled.
Text = str | list[int]
_HOLDERS, _WRAPPERS = ("prompt", "messages"), ("body", "request")
_EXAMPLE = '{"prompt": "…"} or {"messages": [{"role": "user", "content": "…"}]}'


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One request before tokenization; exactly one of the first three is set.

    Attributes:
        where: for messages to the user, such as "prompts.jsonl, line 3".
        text: continued as it is, special tokens as in `text_ids`.
        ids: token ids, continued as they are.
        messages: a chat up to where the assistant speaks, or goes on speaking, as `chat.served_message` has it.
        template_options: what the request gives to the chat template besides (`chat.template_options`).
        answered: whether the chat ended with the assistant's answer, which was dropped.
    """

    where: str
    text: str | None = None
    ids: list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    template_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    answered: bool = False


@dataclasses.dataclass(frozen=True)
class TokenizedPrompts:
    """What is left to continue, in the order of first appearance.

    Attributes:
        ids: distinct prompts, int32 arrays of token ids.
        duplicates: prompts dropped because their ids had been seen.
        too_long: prompts dropped because they are longer than asked for.
        answered: chats that had ended with the assistant's answer, whether they were kept or dropped.
    """

    ids: list[Sequence[int]]
    duplicates: int
    too_long: int
    answered: int = 0

    def digest(self) -> str:
        """SHA-256 over all ids: the same only for the same prompts in the same order."""
        whole = hashlib.sha256()
        for ids in self.ids:
            whole.update(prompt_hash(ids))
        return whole.hexdigest()


def prompt_hash(ids: Sequence[int]) -> bytes:
    """SHA-256 of one prompt's ids, 32 bytes, the same on every machine."""
    return hashlib.sha256(np.asarray(ids, dtype="<i4").tobytes()).digest()


# ---------------------------------------------------------------- files of JSON lines


def check_apart(prompts: Path, held_out: Path) -> None:
    """Refuse prompts to train on that results are judged by.

    Raises:
        UserError: some are in both files, or a file cannot be read.
    """
    trained, judging = ({_key(one) for one in read_requests(path)} for path in (prompts, held_out))
    if both := len(trained & judging):
        raise UserError(
            f"{both} prompts of {prompts} are in {held_out} too, by which results are judged: take them out of one."
        )


def _key(prompt: Prompt) -> str:
    return json.dumps([prompt.text, prompt.ids, prompt.messages, prompt.template_options], sort_keys=True)


def read_prompts(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[Text]:
    """Read a JSONL file of prompts, chats or logged requests; chats become token ids by the target's template.

    Args:
        tokenizer: the target's.

    Raises:
        UserError: as `read_requests`, or a chat that the template refuses.
    """
    return [one.text if one.text is not None else list(_ids(one, tokenizer)) for one in read_requests(path)]


def _lines(path: Path) -> list[tuple[int, str]]:
    """Numbered lines that are not blank."""
    try:
        # utf-8-sig: some editors begin a file with a mark. splitlines() also breaks at signs that JSON may hold.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"Prompts {path} cannot be read ({error}): give a UTF-8 file with one JSON object per line."
        ) from error
    return [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def read_requests(path: Path) -> list[Prompt]:
    """Read a JSONL file of prompts, chats or logged requests, in any mixture.

    Raises:
        UserError: missing file, malformed line (with its number), or no prompt at all.
    """
    prompts = [prompt for number, line in _lines(path) for prompt in _request(line, f"{path}, line {number}")]
    if not prompts:
        raise UserError(f"Prompts {path} is empty: give at least one line like {_EXAMPLE}.")
    return prompts


def read_groups(path: Path) -> list[str]:
    """What each prompt of a JSONL file belongs to: the source `file` that its line names, or itself.

    Itself too where all are of one file: of others nothing is known.

    Raises:
        UserError: as `read_requests`.
    """
    named = [
        json.loads(line).get("file")
        for number, line in _lines(path)
        for _ in _request(line, f"{path}, line {number}")
    ]
    files = {file for file in named if isinstance(file, str)}
    by_itself = len(files) == 1 and all(isinstance(file, str) for file in named)
    return [
        f"file {file}" if isinstance(file, str) and not by_itself else f"prompt {number}"
        for number, file in enumerate(named)
    ]


def _request(line: str, where: str) -> Iterator[Prompt]:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object like {_EXAMPLE}, got {line[:60]!r}.")
    value = _innermost(value)
    found = [key for key in _HOLDERS if value.get(key) is not None]
    if len(found) != 1:
        what = "both" if found else f"neither in {line[:60]!r}"
        raise UserError(f"{where}: expected `prompt` or `messages`, got {what}: give {_EXAMPLE}.")
    yield from prompts_of(value[found[0]], where, template_options(value, where))


def _innermost(value: dict[str, Any]) -> dict[str, Any]:
    """The object with the prompt: the line itself, or what a log wraps it in."""
    while all(value.get(key) is None for key in _HOLDERS):
        inner = [value[key] for key in _WRAPPERS if isinstance(value.get(key), dict)]
        if not inner:
            break
        value = inner[0]
    return value


def prompts_of(value: Any, where: str, options: dict[str, Any] | None = None) -> Iterator[Prompt]:
    """The prompts in a value: a text, token ids, messages, or a list of texts or of token ids (OpenAI's batch).

    Raises:
        UserError: it is none of these, or empty.
    """
    if isinstance(value, str) and value:
        _check_whole(value, where)
        yield Prompt(where, text=value)
    elif _all(value, int):
        yield Prompt(where, ids=value)
    elif _all(value, dict):
        _check_whole(json.dumps(value, ensure_ascii=False), where)
        yield _chat([served_message(message, where) for message in value], where, options or {})
    elif _all(value, (str, list)):
        for item in value:
            if _all(item, dict):
                raise UserError(f"{where}: expected one list of messages, got a list of lists.")
            yield from prompts_of(item, where)
    else:
        raise UserError(
            f"{where}: a prompt must be a non-empty text, token ids or a list of messages, got {value!r:.60}."
        )


def _check_whole(text: str, where: str) -> None:
    """Refuse half a character, which logs hold that cut texts by UTF-16: no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: {text[error.start]!a} is half a character, as where a log cuts a text within an emoji: leave "
            "the line out, or log whole texts."
        ) from error


def _all(value: Any, kind: Any) -> bool:
    whole = isinstance(value, list) and bool(value)
    return whole and all(isinstance(item, kind) and not isinstance(item, bool) for item in value)


def _chat(messages: list[dict[str, Any]], where: str, options: dict[str, Any]) -> Prompt:
    """A chat without the assistant's closing answer: that is what the target is to say itself.

    A request that has the beginning of the answer continued keeps it.
    """
    asked = list(messages)
    while asked and not options.get(CONTINUE) and asked[-1]["role"] == "assistant":
        asked.pop()
    if not asked:
        raise UserError(
            f"{where}: all messages are the assistant's: give what it answers to, or leave it out."
        )
    return Prompt(where, messages=asked, template_options=options, answered=len(asked) < len(messages))


# ---------------------------------------------------------------- a dataset of the Hub or a directory


def read_dataset(name: str, split: str, column: str, subset: str | None = None) -> Iterator[Prompt]:
    """Prompts or chats in a column of a Hugging Face dataset.

    Args:
        name: Hub repo id or directory; fetched only because the user named it.
        split: such as "train" or "train[:1000]".
        column: holds texts or lists of messages.
        subset: configuration of the dataset, where it has several.

    Raises:
        UserError: it cannot be had, has no such column, or a row is no prompt.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        rows = load_dataset(name, subset, split=split)
    except (DatasetsError, OSError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"Dataset {name}, split {split}, cannot be had ({first}): check --dataset, --subset, "
            "--split and the network."
        ) from error
    if column not in rows.column_names:
        raise UserError(
            f"Dataset {name} has no column {column!r}: name one of {rows.column_names} with --column."
        )
    for number, row in enumerate(rows.select_columns([column])):
        yield from prompts_of(row[column], f"{name}, row {number}")


# ---------------------------------------------------------------- token ids


def begins_with_bos(text: Text, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text brings its own token of the beginning, as one with its chat template applied does."""
    return isinstance(text, str) and bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)


def text_ids(texts: Iterable[Text], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of texts to continue, the same in training, `ppow data` and every benchmark.

    Special tokens are added as the tokenizer does, unless the text begins with them; token ids stay as they are.
    """
    return [
        tokenizer(text, add_special_tokens=not begins_with_bos(text, tokenizer))["input_ids"]
        if isinstance(text, str)
        else text
        for text in texts
    ]


def tokenize(
    prompts: Iterable[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int | None = None,
    max_prompt_tokens: int | None = None,
) -> TokenizedPrompts:
    """Token ids of the prompts, each once.

    Args:
        tokenizer: the target's.
        limit: distinct prompts to keep at most.
        max_prompt_tokens: longer prompts are dropped and counted; None keeps all.

    Raises:
        UserError: a chat without a chat template, a prompt without a token or beyond the vocabulary, none at all, or
            none left.
    """
    seen: set[bytes] = set()
    kept: list[Sequence[int]] = []
    duplicates = too_long = answered = 0
    for prompt in prompts:
        if limit is not None and len(kept) >= limit:
            break
        answered += prompt.answered
        ids = _ids(prompt, tokenizer)
        key = prompt_hash(ids)
        if key in seen:
            duplicates += 1
            continue
        seen.add(key)
        if max_prompt_tokens is not None and len(ids) > max_prompt_tokens:
            too_long += 1
            continue
        kept.append(array("i", ids))
    if not kept and not too_long:
        raise UserError("The file or the split of the dataset is empty: give one with at least one prompt.")
    if not kept:
        raise UserError(
            f"All {too_long} prompts are longer than --max-prompt-tokens {max_prompt_tokens}: raise it."
        )
    return TokenizedPrompts(kept, duplicates, too_long, answered)


def _ids(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if prompt.ids is not None:
        wrong = [token for token in prompt.ids if not 0 <= token < len(tokenizer)]
        if wrong:
            raise UserError(
                f"{prompt.where}: token ids must be 0 to {len(tokenizer) - 1}, got {wrong[0]}: "
                "log the requests of this target, or give text."
            )
        return prompt.ids
    if prompt.messages is not None:
        # As servers do: the template writes its own special tokens, the tokenizer must not add them again.
        text = render(prompt.messages, prompt.template_options, tokenizer, prompt.where)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        assert prompt.text is not None
        [ids] = text_ids([prompt.text], tokenizer)
    if not ids:
        raise UserError(f"{prompt.where}: the tokenizer makes no token of this prompt: leave it out.")
    return ids
