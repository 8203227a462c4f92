"""Text of the tiny pair: standard-library source files, their domains, tokens and prompts.

Domains: `library` (known to the drafters) and `tests` (files of test suites: new to them). Left out: models.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

KNOWN, NEW = "library", "tests"
END_OF_TEXT = "<|endoftext|>"
_MAX_FILE_BYTES = 120_000  # beyond it: generated tables, which teach nothing
_SKIPPED_PARTS = {"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data", "turtledemo"}
_HELD_OUT_SHARE = 0.15


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One text with its domain and split (`train` or `held_out`; by file, so that no file is in both)."""

    name: str
    domain: str
    split: str
    text: str


def read_sources(max_bytes_per_domain: int, root: Path | None = None) -> list[SourceFile]:
    """Read the standard library's Python files, a reproducible sample of each domain.

    Args:
        max_bytes_per_domain: how much text to keep of each domain, in bytes.
        root: where to look instead of this Python's own library.

    Raises:
        FileNotFoundError: no test suites there (Debian's Python lacks them).
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    kept: dict[str, int] = {KNOWN: 0, NEW: 0}
    sources = []
    for path in sorted(root.rglob("*.py"), key=lambda p: _hash(p.relative_to(root).as_posix())):
        source = _read(path, path.relative_to(root))
        if source is None or kept[source.domain] >= max_bytes_per_domain:
            continue
        kept[source.domain] += len(source.text)
        sources.append(source)
    if not kept[NEW]:
        raise FileNotFoundError(
            f"{root} has no test suites: build with a Python that ships them, as python.org's does."
        )
    return sources


def _read(path: Path, name: Path) -> SourceFile | None:
    if _SKIPPED_PARTS & set(name.parts) or not 2_000 <= path.stat().st_size <= _MAX_FILE_BYTES:
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:  # a handful of files exist to test other encodings
        return None
    domain = NEW if {"test", "tests", "idle_test"} & set(name.parts) else KNOWN
    held_out = _hash("split:" + name.as_posix()) < _HELD_OUT_SHARE
    return SourceFile(name.as_posix(), domain, "held_out" if held_out else "train", text)


def _hash(text: str) -> float:
    """A fixed number in [0, 1) for a text, the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def train_tokenizer(texts: Iterable[str], vocab_size: int, directory: Path) -> None:
    """Train a byte-level BPE tokenizer and save it in Hugging Face format."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(directory)


def make_prompts(
    sources: Sequence[SourceFile],
    domain: str,
    split: str,
    count: int,
    tokenizer: Any,
    num_tokens: int,
    seed: int,
) -> Iterator[dict[str, str]]:
    """Prompts that start at a line of a file of the given domain and split.

    Yields:
        `{"prompt": text of exactly num_tokens tokens, "file": its source}`, `count` of them.
    """
    rng = random.Random(f"{seed}:{domain}:{split}")
    files = [source for source in sources if source.domain == domain and source.split == split]
    made = 0
    while made < count:
        source = rng.choice(files)
        lines = source.text.splitlines(keepends=True)
        start = rng.randrange(max(1, len(lines) - 30))
        ids = tokenizer("".join(lines[start : start + 60]))["input_ids"]
        prompt = tokenizer.decode(ids[:num_tokens])
        if len(ids) < num_tokens or tokenizer(prompt)["input_ids"] != ids[:num_tokens]:
            continue
        made += 1
        yield {"prompt": prompt, "file": source.name}


def unlike(rows: Iterable[dict[str, str]], others: Iterable[dict[str, str]]) -> Iterator[dict[str, str]]:
    """Rows whose prompt is neither among the others nor was seen before."""
    seen = {row["prompt"] for row in others}
    for row in rows:
        if row["prompt"] not in seen:
            seen.add(row["prompt"])
            yield row


def write_jsonl(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
