"""Whose time it is that samples find."""

from __future__ import annotations

import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import step_share
import torch

from vllm_ppow.acceptance import AcceptanceEstimate


@pytest.mark.parametrize(
    ("files", "ours"),
    [
        (("window.py",), True),
        (("window.py", "/usr/lib/python3/statistics.py"), True),  # what only we answer for
        (("scheduler.py", "vllm:core.py"), False),  # wrapped
        (("vllm:core.py", "scheduler.py"), True),
        (("scheduler.py", "nn:module.py", "/usr/lib/python3/typing.py"), False),  # a model that we called
        (("vllm:core.py", "/usr/lib/python3/typing.py"), False),
        (("/home/user/script.py",), False),
    ],
)
def test_the_innermost_that_answers_for_it_counts(files, ours):
    """Files from the outermost call to the innermost."""
    vllm, nn = step_share.THEIRS
    paths = [
        file if file.startswith("/")
        else vllm + file[5:] if file.startswith("vllm:")
        else nn + file[3:] if file.startswith("nn:")
        else step_share.OURS + file
        for file in files
    ]  # fmt: skip
    frame = None
    for path in paths:
        frame = SimpleNamespace(f_code=SimpleNamespace(co_filename=path), f_back=frame)
    assert step_share.is_ours(frame) is ours


def test_samples_of_a_real_process():
    """A third of the time in our code, the rest in a model's."""
    estimate, model = AcceptanceEstimate(4), torch.nn.Linear(64, 64)

    def spend(act, seconds: float) -> None:
        ends = time.process_time() + seconds
        while time.process_time() < ends:
            for _ in range(20):
                act()

    def work():
        estimate.observe(4, 2)
        estimate.promises()

    with step_share.sampled() as samples:
        for _ in range(5):
            spend(work, 0.1)
            spend(lambda: model(torch.zeros(256, 64)), 0.2)
    assert samples.all > 100
    assert samples.share == pytest.approx(1 / 3, abs=4 * samples.error)
    taken = samples.all
    spend(work, 0.1)
    assert samples.all == taken, "the timer is off"


def test_what_is_said_and_the_aim(tmp_path, monkeypatch):
    """Too much of a step with a fixed window fails the check."""
    from click.testing import CliRunner

    class Engine:
        pass

    shares = iter((0.011, 0.02, 0.03, 0.009, 0.02, 0.03))

    def measure(*arguments):
        share = next(shares)
        return {
            "steps": 9,
            "step_ms": 20.0,
            "samples": 800,
            "share": share,
            "share_error": 0.001,
            "ours_ms": 1.0,
        }

    monkeypatch.setattr(step_share, "start_engine", lambda *arguments: Engine())
    monkeypatch.setattr(step_share, "measure", measure)
    for expected in (1, 0):
        result = CliRunner().invoke(step_share.main, ["--output", str(tmp_path / "s.json"), "--check"])
        assert result.exit_code == expected, result.output
    assert re.search(
        r"^fixed: 1.00 ms of 20.0 ms, 0.90% ± 0.10% \(800 samples\)$", result.output, re.MULTILINE
    )
    assert Path(tmp_path / "s.json").is_file()
