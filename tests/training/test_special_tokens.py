"""A text that brings its own BOS token gets no second one, wherever it is tokenized; any token will do as padding."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from training_pair import load

import ppow_train
from ppow_train.generation import (
    HuggingFaceBackend,
    Sampling,
    end_tokens,
    generate,
    load_or_generate,
    load_tokenizer,
)
from ppow_train.prompts import Prompt, text_ids, tokenize

SOURCES = Path(ppow_train.__file__).parent


@pytest.fixture
def tokenizer(directories) -> Any:
    """The target's, which adds a BOS token as most chat models' do."""
    tokenizer = load_tokenizer(directories.target)
    bos = tokenizer.eos_token
    tokenizer.bos_token = bos
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    return tokenizer


def test_one_bos(tokenizer):
    [bare] = text_ids(["windows of draft"], tokenizer)
    assert bare[0] == tokenizer.bos_token_id, "as the tokenizer does"
    assert bare.count(tokenizer.bos_token_id) == 1
    text = f"{tokenizer.bos_token}windows of draft"
    assert tokenizer(text)["input_ids"] == [tokenizer.bos_token_id, *bare], "what it would do with this one"
    assert text_ids([text, "windows of draft"], tokenizer) == [bare, bare]
    assert list(tokenize([Prompt("p", text=text)], tokenizer).ids[0]) == bare


def test_a_tokenizer_without_bos(directories):
    tokenizer = load_tokenizer(directories.target)
    tokenizer.bos_token = None
    assert text_ids(["windows", "of"], tokenizer) == tokenizer(["windows", "of"])["input_ids"]


def test_training_continues_the_same_ids_and_no_older_set(tokenizer, directories, tmp_path):
    model = load(directories, "causal_lm").target.model
    options: dict[str, Any] = {"max_new_tokens": 2, "temperature": 0.0, "seed": 0}
    text = f"{tokenizer.bos_token}windows"
    prompts, _ = generate(model, tokenizer, [text], **options)
    assert prompts == text_ids(["windows"], tokenizer)

    def kept(text: str) -> Any:
        return load_or_generate(tmp_path, model, tokenizer, [text], target_fingerprint="sha256:0", **options)

    assert kept(text).prompt_lengths.tolist() == [len(prompts[0])]
    assert kept("windows").prompt_lengths.tolist() == [len(prompts[0])]
    names = {path.name for path in tmp_path.iterdir()}
    tokenizer.bos_token = "<none>"  # which the text does not begin with
    kept(text)
    assert len({path.name for path in tmp_path.iterdir()} - names) == 1


@pytest.mark.parametrize(
    ("config", "pad", "ends"),
    [
        ({"pad_token_id": 7, "eos_token_id": [9, 8]}, 7, (8, 9)),
        ({"pad_token_id": -1, "eos_token_id": [9, 8]}, 8, (8, 9)),
        ({"pad_token_id": None, "eos_token_id": 5}, 5, (5,)),
        ({"pad_token_id": None, "eos_token_id": None}, 0, ()),
    ],
)
def test_a_tokenizer_that_names_neither_pad_nor_eos(config, pad, ends, directories, tmp_path):
    """What it pads with is of no account: prompts of unlike lengths are continued as with its own padding."""
    bare = tmp_path / "bare"
    shutil.copytree(directories.target, bare)
    for file, dropped in (
        ("tokenizer_config.json", ("eos_token", "pad_token")),
        ("generation_config.json", ()),
    ):
        values = json.loads((bare / file).read_text()) | ({} if dropped else config)
        (bare / file).write_text(json.dumps({name: values[name] for name in values.keys() - set(dropped)}))
    tokenizer, own = load_tokenizer(bare), load_tokenizer(directories.target)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (pad, None)
    assert end_tokens(bare, tokenizer) == ends
    texts = ["windows", "of draft tokens", tokenizer.convert_ids_to_tokens(pad)]
    assert text_ids(texts, tokenizer) == text_ids(texts, own)
    model = load(directories, "causal_lm").target.model
    sampling = Sampling(max_new_tokens=6, temperature=0.0, end_token_ids=(0,))
    wanted, given = (
        HuggingFaceBackend(model, one, sampling).continue_prompts(
            text_ids(texts, own), seed=0, report=lambda done: None
        )
        for one in (own, tokenizer)
    )
    assert given == wanted


ENCODING = ("__call__", "encode", "encode_plus", "batch_encode_plus", "tokenize", "apply_chat_template")


def tokenizing(file: Path) -> Iterator[int]:
    """Lines that call a tokenizer on text."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Attribute) and function.attr in ENCODING:  # tokenizer.encode(…)
            function = function.value
        if isinstance(function, ast.Call):  # load_tokenizer(…)(…)
            named = ast.unparse(function.func).rpartition(".")[2] == "load_tokenizer"
        else:
            named = ast.unparse(function).rpartition(".")[2] == "tokenizer"
        if named:
            yield node.lineno


def test_there_is_one_place_that_tokenizes(tmp_path):
    """But for the tiny models, which are made from text; vLLM is given the ids."""
    planted = tmp_path / "planted.py"
    planted.write_text(
        "load_tokenizer(target)(texts)\nids = tokenizer(text)\nload_tokenizer(target)\n"
        "tokenizer.encode(text)\nself.tokenizer(text)\ntokenizer.decode(ids)\nload_tokenizer(target).encode(text)\n",
        "utf-8",
    )
    assert sorted(tokenizing(planted)) == [1, 2, 4, 5, 7]
    files = [file for file in SOURCES.rglob("*.py") if "tiny" not in file.relative_to(SOURCES).parts]
    # chat.py applies chat templates, which gives texts.
    assert {file.name for file in files if list(tokenizing(file))} == {"prompts.py", "chat.py"}
