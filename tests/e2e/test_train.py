"""`ppow train` as a user runs it: adapter, parity with vLLM, exit codes. Marked slow: it starts engines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_ppow.artifact import read_adapter

REPOSITORY = Path(__file__).parents[2]
TINY = Path("examples/tiny")


@pytest.mark.slow
@pytest.mark.parametrize(("drafter", "temperature"), [("eagle3", "1.0"), ("causal_lm", "0")])
def test_training_ends_in_agreement_with_vllm(tmp_path, drafter, temperature):
    prompts = {}
    for split, count in (("train", 32), ("held_out", 24)):
        lines = (REPOSITORY / TINY / "prompts" / f"tests_{split}.jsonl").read_text("utf-8").splitlines()
        prompts[split] = tmp_path / f"{split}.jsonl"
        prompts[split].write_text("\n".join(lines[:count]), "utf-8")
    command = [sys.executable, "-m", "ppow_train.cli", "train", "--target", str(TINY / "target")]
    command += ["--drafter", str(TINY / drafter), "--output", str(tmp_path / "adapter"), "--max-steps", "5"]
    command += ["--prompts", str(prompts["train"]), "--held-out", str(prompts["held_out"])]
    command += ["--max-new-tokens", "48", "--cache", str(tmp_path / "cache"), "--json"]
    done = subprocess.run(
        [*command, "--serving-temperature", temperature],
        cwd=REPOSITORY,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    value = json.loads(done.stdout)
    assert value["parity"]["holds"] is True
    assert value["parity"]["served_accepted_per_draft"] > 0.3
    assert read_adapter(tmp_path / "adapter").config.temperature == float(temperature)
