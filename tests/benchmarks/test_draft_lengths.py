"""Acceptance by draft length: the table, from counts made up by hand; the script as a user runs it, shortened."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import draft_lengths
import pytest
from bench_adapters import make_adapter

from vllm_ppow.metrics import SpecDecodeCounts

# Of four drafts of three tokens two were whole, one accepted one token, one none; of drafts of one token two in three.
COUNTS = {1: SpecDecodeCounts(6, 6, 4, (4, 0, 0)), 3: SpecDecodeCounts(4, 12, 7, (3, 2, 2))}


def test_rows_and_table():
    short, long = draft_lengths.compare(COUNTS)
    assert (short["accepted_per_draft"], long["accepted_per_draft"]) == (4 / 6, 7 / 4)
    assert short["standard_error"] == pytest.approx(math.sqrt((4 / 6) * (2 / 6) / 6))
    assert long["standard_error"] == pytest.approx(math.sqrt((19 / 4 - (7 / 4) ** 2) / 4))
    told = short["told_from"]["3"]
    assert told["first_positions"] == pytest.approx(1.75 / (10 / 6))
    assert told["accepted_by_length"] == pytest.approx((2.75 / 1.5) / (10 / 6))
    assert long["told_from"] == {}
    lines = draft_lengths.table([short, long]).splitlines()
    assert lines[2] == "| 1 | 6 | 0.667 ± 0.192 | 1.050 → 1.100 |"
    assert len({line.count("|") for line in lines}) == 1


@pytest.mark.slow
def test_the_script_counts_every_token_at_every_length(tmp_path):
    adapter = make_adapter(tmp_path / "adapter", 0.0)
    script, output = Path(draft_lengths.__file__), tmp_path / "counts.json"
    command = [sys.executable, str(script), "--adapter", str(adapter.directory), "--output", str(output)]
    command += ["--num-prompts", "4", "--max-tokens", "17", "--lengths", "3,1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(output.read_text())
    assert told["adapter"] == adapter.config.adapter_fingerprint
    assert [row["length"] for row in told["lengths"]] == [1, 3]
    for row in told["lengths"]:
        # A prompt's first token comes without a draft, and its last draft may reach beyond the end.
        produced = row["drafts"] * (1 + row["accepted_per_draft"])
        assert 4 * 16 <= round(produced) <= 4 * (16 + row["length"])
        assert f"| {row['length']} | {row['drafts']} | " in done.stdout
