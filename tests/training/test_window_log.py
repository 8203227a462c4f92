"""The log of windows: what a line says, how a run goes on with it, and that its picture is drawn."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from training_pair import K
from transformers import TrainerState

from ppow_train import cli
from ppow_train.config import PPOWConfig
from ppow_train.errors import UserError
from ppow_train.pair import load_pair
from ppow_train.sampler import Draw
from ppow_train.training import train_adapter
from ppow_train.window_lines import LOG_NAME, read_window_log
from ppow_train.window_log import WindowLog, counted_acceptance, criticality_edges, expected_acceptance


def draw(chosen: list[float], candidates: list[float], staleness: list[int]) -> Draw:
    return Draw(torch.zeros(1, 1), torch.tensor(chosen), torch.tensor(candidates), torch.tensor(staleness))


def test_a_line_is_what_was_gathered(tmp_path):
    log = WindowLog(tmp_path / LOG_NAME, "lost_tokens", 24)  # bins of one token
    log.add_draw(Draw(torch.zeros(1, 1)))
    log.add_draw(draw([0.0, 3.5], [0.0, 0.5, 3.5], [0, 4]))
    log.add_draw(draw([24.0], [1.0, 24.0], [2]))
    log.add_accepted(torch.tensor([3.0, 1.0] + [0.0] * 22), 4)
    log.add_accepted(torch.tensor([1.0, 1.0] + [0.0] * 22), 4)
    line = log.line(30)
    assert (line["step"], line["updates"], line["adaptive_updates"]) == (30, 3, 2)
    criticality = line["criticality"]
    assert criticality["edges"] == list(range(25))
    assert {i: n for i, n in enumerate(criticality["chosen"]) if n} == {0: 1, 3: 1, 23: 1}
    assert {i: n for i, n in enumerate(criticality["candidates"]) if n} == {0: 2, 1: 1, 3: 1, 23: 1}
    assert criticality["chosen_mean"] == pytest.approx(27.5 / 3)
    assert criticality["candidates_mean"] == pytest.approx(29 / 5)
    assert line["staleness"] == {"mean": 2.0, "max": 4}
    assert line["accepted"] == {"windows": 8, "per_position": [0.5, 0.25] + [0.0] * 22}


def test_bins_of_divergence_hold_every_value():
    edges = criticality_edges("divergence", K)
    assert edges == sorted(edges)
    log = WindowLog(Path(LOG_NAME), "divergence", K)
    values = [0.0, 0.0005, 0.0011, 1.0001, 99.0, 1e6]
    log.add_draw(draw(values, values, [0]))
    counts = log.line(1)["criticality"]["chosen"]
    assert sum(counts) == len(values)
    assert counts[0] == counts[-1] == 2
    for value in values[2:4]:
        (at,) = [i for i in range(len(counts)) if edges[i] <= value < edges[i + 1]]
        assert counts[at] == 1


def test_accepted_windows_are_counted_by_position():
    assert counted_acceptance(torch.tensor([0, 2, 4]), 4).tolist() == [2, 2, 1, 1]


def test_expected_acceptance_is_the_sum_of_its_parts():
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 40, K, 7, generator=generator)
    tokens = torch.randint(7, (40, K), generator=generator)
    alone = [expected_acceptance(tokens[i : i + 1], p[i : i + 1], q[i : i + 1]) for i in range(40)]
    torch.testing.assert_close(
        expected_acceptance(tokens, p, q), torch.stack(alone).sum(0), atol=1e-5, rtol=1e-5
    )
    same = expected_acceptance(tokens, p, p)
    torch.testing.assert_close(same, torch.full((K,), 40.0, dtype=torch.float64))


def test_an_open_interval_survives_a_restart(tmp_path):
    log, restored = (WindowLog(tmp_path / LOG_NAME, "divergence", K) for _ in range(2))
    log.add_draw(draw([0.1, 3.0], [0.1, 3.0, 7.0], [0, 4]))
    log.add_accepted(torch.tensor([3.0, 1.0, 0.0, 0.0]), 4)
    restored.load_state_dict(json.loads(json.dumps(log.state_dict())))
    for one in (log, restored):
        one.add_draw(draw([0.2], [0.2], [1]))
    assert restored.line(5) == log.line(5)


def test_a_run_that_goes_on_drops_what_its_checkpoint_has_not_seen(tmp_path):
    file = tmp_path / LOG_NAME
    file.write_text('{"step": 10}\n{"step": 20}\n{"step": 30}\n{"step": 4', encoding="utf-8")
    log = WindowLog(file, "divergence", K)
    log.on_train_begin(None, TrainerState(global_step=20), None)
    assert file.read_text() == '{"step": 10}\n{"step": 20}\n'
    log.on_train_begin(None, TrainerState(global_step=0), None)
    assert file.read_text() == ""


@pytest.mark.parametrize(
    ("options", "unit"),
    [
        ({"objective": "ppow", "num_generations": 4}, "divergence"),
        (
            {
                "objective": "cst:tv",
                "adaptive_windows": "true",
                "criticality": "lost_tokens",
                "criticality_refresh": 3,
            },
            "lost_tokens",
        ),
        ({"objective": "overlap"}, None),
    ],
)
def test_a_run_leaves_its_log_and_the_picture_is_drawn(
    options: dict[str, Any],
    unit,
    directories,
    trajectories,
    tmp_path,
    progress,
):
    config = PPOWConfig(
        num_speculative_tokens=K,
        trajectories_per_step=3,
        windows_per_step=24,
        max_steps=6,
        logging_steps=2,
        lora_rank=4,
        use_cpu=True,
        output_dir=str(tmp_path / "out"),
        **options,
    )
    pair = load_pair(str(directories.target), str(directories.drafter["causal_lm"]))
    result = train_adapter(pair, trajectories, config, tmp_path / "adapter", progress=progress)
    lines = read_window_log(tmp_path / "adapter")
    assert [(line["step"], line["updates"]) for line in lines] == [(2, 2), (4, 2), (6, 2)]
    assert [line["adaptive_updates"] for line in lines] == ([0, 2, 2] if unit else [0, 0, 0])
    for line, entry in zip(lines, (e for e in result.log if "loss" in e), strict=True):
        assert len(line["accepted"]["per_position"]) == K
        counted = "num" if options["objective"] == "ppow" else "expected"
        assert sum(line["accepted"]["per_position"]) == pytest.approx(
            entry[f"windows/{counted}_accepted_tokens"], abs=1e-4
        )
        # ppow: every window of both updates; else those of the update that is logged.
        assert line["accepted"]["windows"] == (48 if counted == "num" else 24)
        if line["adaptive_updates"]:
            criticality = line["criticality"]
            assert criticality["kind"] == unit
            groups = options.get("num_generations", 1)
            assert sum(criticality["chosen"]) == 48 // groups
            assert sum(criticality["candidates"]) == 2 * int(trajectories.num_starts(K).sum())
            assert criticality["chosen_mean"] == pytest.approx(entry["windows/criticality_chosen"], rel=1e-4)
            assert line["staleness"]["mean"] == pytest.approx(entry["windows/staleness"])
    if unit == "lost_tokens":
        assert max(line["staleness"]["max"] for line in lines[1:]) == 2
    shown = CliRunner().invoke(cli.ppow, ["windows", str(tmp_path / "adapter")])
    assert shown.exit_code == 0, shown.output
    assert "3 intervals, 6 updates" in shown.output
    assert (tmp_path / "adapter" / "windows.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "no interval yet"),
        (b"[1]\n", r"is not a log of windows \(line 1 must be an object, got list\): give the directory"),
        (b'{"step": 1}\n{x\n', r"\(line 2 is not JSON\)"),
        (b"\xff\n", r"\(it is no UTF-8 text\)"),
        (b'{"prompt": "a"}\n', r"\(line 1 lacks step, a number of updates\)"),
        (b'{"step": "a"}\n', "line 1 lacks step"),
        (b'{"step": 1, "accepted": {}}\n', "line 1 has accepted without per_position"),
        (b'{"step": 1, "criticality": 3}\n', "line 1 has criticality without kind, edges"),
    ],
)
def test_what_is_no_log_is_refused(content, message, tmp_path):
    if content is not None:
        (tmp_path / LOG_NAME).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_window_log(tmp_path)


def test_reading_a_log_waits_for_no_torch(tmp_path):
    (tmp_path / LOG_NAME).write_text('{"prompt": "a"}\n')
    code = (
        "import sys; from ppow_train.cli import run; code = run(sys.argv[1:]); assert 'torch' not in sys.modules; "
        "sys.exit(code)"
    )
    call = [sys.executable, "-c", code, "windows", str(tmp_path)]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.partition(" (")[2]) == (
        1,
        "line 1 lacks step, a number of updates): give the directory or the windows.jsonl that `ppow train` wrote.\n",
    )
