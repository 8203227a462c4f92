"""Prompts of the tiny pair: what is held out is apart from what is trained on, and no prompt is counted twice."""

import json
from pathlib import Path

import pytest

from ppow_train.tiny.text import unlike

PROMPTS = Path(__file__).parents[2] / "examples" / "tiny" / "prompts"


def rows_of(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (PROMPTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_unlike_drops_what_was_seen_and_keeps_the_order():
    rows = [{"prompt": text} for text in "abcbda"]
    assert [row["prompt"] for row in unlike(rows, [{"prompt": "c"}])] == ["a", "b", "d"]


@pytest.mark.parametrize("domain", ["library", "tests"])
def test_report_prompts_are_new_and_from_held_out_files(domain):
    train, held_out, report = (rows_of(f"{domain}_{name}") for name in ("train", "held_out", "report"))
    prompts = [row["prompt"] for row in report]
    assert len(set(prompts)) == len(prompts) == 224
    assert not set(prompts) & {row["prompt"] for row in held_out + train}
    assert {row["file"] for row in report} <= {row["file"] for row in held_out}
    assert not {row["file"] for row in report} & {row["file"] for row in train}
