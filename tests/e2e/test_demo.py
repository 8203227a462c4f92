"""`ppow demo` as a user runs it, shortened, for both drafters: the loop, its files, its judgement. Marked slow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_ppow.artifact import read_adapter

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory) -> Path:
    """Where both runs keep the target's texts, which are the same for both drafters: the second finds them."""
    return tmp_path_factory.mktemp("trajectories")


@pytest.mark.slow
@pytest.mark.parametrize(("drafter", "costlier_layers"), [("eagle3", 12), ("causal_lm", 0)])
def test_the_loop_trains_serves_and_compares(tmp_path, trajectories, drafter, costlier_layers):
    (tmp_path / "trajectories").symlink_to(trajectories)
    command = [
        sys.executable,
        "-m",
        "ppow_train.cli",
        "demo",
        "--drafter",
        drafter,
        "--steps",
        "20",
        "--prompts",
        "16",
        "--costlier-layers",
        str(costlier_layers),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "--max-tokens", "64", "--rounds", "1", "--output", str(tmp_path), "--json"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    value = json.loads(done.stdout)
    assert value == json.loads((tmp_path / "demo.json").read_text())
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    rows = {(row["arm"], row["temperature"]): row for row in value["arms"]}
    arms = ("no speculation", "base drafter", "adapter")
    assert set(rows) == {(arm, t) for arm in arms for t in (0.0, 1.0)}
    assert ("costlier_target" in value) is bool(costlier_layers)
    if costlier_layers:
        costlier = {row["arm"]: row for row in value["costlier_target"]["arms"]}
        assert set(costlier) == {*arms, "adapter, adaptive"}
        assert all(row["greedy_output_identical"] for row in costlier.values())
        assert (tmp_path / "demo-costlier.png").read_bytes().startswith(b"\x89PNG")
        assert f"With one of {costlier_layers} layers" in done.stderr
    for arm in arms[1:]:
        assert rows[arm, 0.0]["greedy_output_identical"] is True
        assert rows[arm, 0.0]["output_tokens"] == rows["no speculation", 0.0]["output_tokens"]
    # 20 updates for the new domain: sampled acceptance must rise, else the adapter is not what is served.
    assert rows["adapter", 1.0]["accepted_per_draft"] > rows["base drafter", 1.0]["accepted_per_draft"]
    assert read_adapter(tmp_path / "adapter").config.drafter_type == drafter
    assert "vllm serve" in done.stderr
