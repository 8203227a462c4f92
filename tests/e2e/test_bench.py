"""`ppow bench` as a user runs it: four engines, one small run, its JSON. Marked slow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
TINY = REPOSITORY / "examples" / "tiny"


@pytest.mark.slow
def test_bench_counts_and_compares(tmp_path):
    import torch
    from serving_pair import random_lora, save_adapter

    from ppow_train.drafters import load_drafter

    drafter = load_drafter(TINY / "eagle3", dtype=torch.bfloat16, target=TINY / "target")
    adapter = save_adapter(
        tmp_path / "adapter", random_lora(drafter.model, 1e-3), "eagle3", TINY / "eagle3", TINY / "target"
    )
    command = [sys.executable, "-m", "ppow_train.cli", "bench", "--adapter", str(adapter.directory)]
    command += ["--prompts", str(TINY / "prompts" / "tests_held_out.jsonl"), "--limit", "4", "--rounds", "1"]
    command += ["--max-tokens", "16", "--temperature", "0", "--max-model-len", "256", "--concurrency", "2"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "out"), "--json"],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    value = json.loads(done.stdout)
    assert json.loads((tmp_path / "out" / "benchmark.json").read_text("utf-8")) == value
    assert (tmp_path / "out" / "benchmark.png").stat().st_size > 1000
    assert (value["max_tokens"], value["concurrency"]) == (16, 2)
    arms = {row["arm"]: row for row in value["arms"]}
    assert set(arms) == {"no speculation", "base drafter", "adapter", "adapter, adaptive"}
    for row in arms.values():
        assert row["greedy_output_identical"] is True
        assert row["output_tokens"] == arms["no speculation"]["output_tokens"] > 0
        assert row["speed_ratio"]["median"] > 0
    assert arms["adapter"]["num_drafts"] > 0
    assert len(arms["adapter"]["acceptance_per_position"]) == 3
    assert "4 prompts × 16 tokens" in done.stderr
