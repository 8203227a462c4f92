"""`ppow profile` and `ppow train --cost-profile` up to where engines and models start, and the profile's table."""

from __future__ import annotations

import dataclasses
import io
import json
import math

import pytest
from click.testing import CliRunner
from rich.console import Console
from serving_profile import PROFILE, plain_adapter

from ppow_train import cli
from ppow_train.profile_engine import Measured
from ppow_train.profile_table import as_json, print_table, speedups
from ppow_train.profiling import ProfileOptions, Samples, draft_lengths, make_profile
from vllm_ppow.compat.profiling import PassTime, draft_length_ladder
from vllm_ppow.cost_profile import CostProfileError, write_cost_profile
from vllm_ppow.metrics import SpecDecodeCounts
from vllm_ppow.other_lengths import accepted_by_length

# ---------------------------------------------------------------- what is measured


@pytest.mark.parametrize(
    ("k", "lengths"), [(1, (0, 1)), (2, (0, 1, 2)), (5, (0, 1, 2, 4, 5)), (8, (0, 1, 2, 4, 8))]
)
def test_draft_lengths(k, lengths):
    assert draft_lengths(k) == lengths
    assert draft_length_ladder(lengths)[-1] == (len(lengths), len(lengths), k)


def test_an_engine_of_the_planned_length_holds_every_request():
    """Warm-up and measured steps at every length, all drafts accepted, after the longest way to the first of them."""
    options = ProfileOptions((1, 4), (16, 100), (0, 2), steps=5, rounds=2)
    longest_start = 10 + 4 + 2 * 4 * 100 // 512
    assert options.max_new_tokens == longest_start + (1 + 3) * (5 + 3)
    assert options.max_model_len >= 100 + options.max_new_tokens + 2


def _samples(*steps):
    passes = [PassTime(1, 2, 2, target, draft) for target, draft, _ in steps]
    return Samples.of(passes, [whole for _, _, whole in steps])


def test_medians_and_spread_of_a_point():
    samples = _samples((3.0, 1.0, 4.5), (2.0, 1.5, 4.0), (9.0, 1.2, 10.9))
    assert samples.medians == (3.0, 1.2, pytest.approx(0.5))
    assert samples.spread == pytest.approx((7.7 - 4.25) / 2 / 4.5)
    # Async scheduling overlaps: a step may be shorter than its passes.
    assert _samples((3.0, 1.0, 3.5)).medians[2] == 0.0
    assert _samples((3.0, 1.0, 3.5)).spread == 0.0


def test_measurements_become_a_profile(tmp_path):
    adapter = plain_adapter(tmp_path / "a")
    options = ProfileOptions((1, 4), (16,), (0, 1, 2))
    samples = {
        (16, batch, length): _samples((batch + length, 0.5 * (length + 1), 2.0 * batch + 2.0 * length + 1.0))
        for batch in (1, 4)
        for length in (0, 1, 2)
    }
    machine = {"vllm_version": "1", "device": "d", "dtype": "float32", "tensor_parallel_size": 1}
    profile = make_profile(samples, SpecDecodeCounts(10, 20, 9, (6, 3)), options, adapter, **machine)
    assert profile.target_step_seconds == (((1, 2, 3), (4, 5, 6)),)
    assert profile.draft_seconds == (((0.5, 1.0, 1.5),) * 2,)
    assert profile.overhead_seconds == (((1.5, 2.0, 2.5), (4.5, 5.0, 5.5)),)
    assert profile.acceptance_per_position == (0.6, 0.3)
    assert profile.target_fingerprint == adapter.config.target.fingerprint
    nothing = make_profile(samples, SpecDecodeCounts(0, 0, 0, (0, 0)), options, adapter, **machine)
    assert nothing.acceptance_per_position == ()


# ---------------------------------------------------------------- what is shown


def test_short_drafts_are_not_judged_by_the_first_positions_of_long_ones():
    accepted = accepted_by_length((0.6, 0.5, 0.45, 0.42), 4)
    gains = speedups(dataclasses.replace(PROFILE, acceptance_per_position=(0.6, 0.5, 0.45, 0.42)), 4)
    assert accepted[1] > 0.63
    assert gains[1] == pytest.approx(
        (1 + accepted[1]) * PROFILE.step_seconds(4, 0) / PROFILE.step_seconds(4, 1)
    )


def test_the_best_draft_length_is_the_one_that_pays_most():
    gains = speedups(PROFILE, 4)
    by_hand = [
        (1 + sum((0.8, 0.6, 0.4, 0.2)[:k])) * PROFILE.step_seconds(4, 0) / PROFILE.step_seconds(4, k)
        for k in range(5)
    ]
    assert gains == pytest.approx(by_hand)
    value = as_json(Measured(PROFILE, 0.1, 0.3, 0.07))
    row = value["by_batch_size"][1]
    assert row["batch_size"] == 4
    assert row["best_num_speculative_tokens"] == max(range(5), key=by_hand.__getitem__)
    json.dumps(value)
    stream = io.StringIO()
    print_table(Measured(PROFILE, 0.1, 0.3, 0.07), Console(file=stream, width=120))
    shown = stream.getvalue()
    assert "measure again" not in shown
    print_table(Measured(PROFILE, 0.11, 0.3, 0.07), Console(file=stream, width=120))
    assert "Steps varied a lot: measure again" in stream.getvalue()
    assert f"{gains[4]:.2f}" in shown
    assert "10.0%, at worst 30.0%; figures moved by up to 7.0% to take noise out" in " ".join(shown.split())
    assert value["most_moved"] == 0.07
    assert "0.800 0.600 0.400 0.200 (100 drafts)" in shown


# ---------------------------------------------------------------- the commands


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--batch-sizes", "1,x"),
        ("--batch-sizes", "0"),
        ("--context-lengths", ""),
        ("--steps", "0"),
        ("--num-speculative-tokens", "0"),
        ("--temperature", "-1"),
    ],
)
def test_wrong_usage_of_profile(option, value, capsys):
    assert cli.run(["profile", "--adapter", "a", "--prompts", "p", option, value]) == 2
    assert option in capsys.readouterr().err


def test_profile_refuses_before_an_engine_starts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ppow_train.serving_eval.subprocess.Popen", None)
    assert cli.run(["profile", "--adapter", str(tmp_path / "no"), "--prompts", "p"]) == 1
    assert "does not exist" in capsys.readouterr().err
    plain_adapter(tmp_path / "a")
    given = ["profile", "--adapter", str(tmp_path / "a"), "--prompts", str(tmp_path / "p.jsonl")]
    assert cli.run([*given, "--output", str(tmp_path / "x" / "y.json")]) == 1
    assert "must be a file in a directory that exists" in capsys.readouterr().err
    assert cli.run([*given, "--output", str(tmp_path)]) == 1
    assert "must be a file" in capsys.readouterr().err


def test_training_takes_the_ratio_from_a_profile(tmp_path, monkeypatch):
    """From a directory or a file; over the config file's own."""
    requests = []
    monkeypatch.setattr(
        "ppow_train.commands.training_run.estimate", lambda request: requests.append(request.values)
    )
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "a"}\n')
    config = tmp_path / "c.yaml"
    config.write_text("draft_cost_ratio: 0.5\nmax_steps: 7\n")
    file = write_cost_profile(tmp_path, PROFILE)
    call = ["train", "--target", "t", "--drafter", "d", "--prompts", str(prompts), "--output", "o"]
    call += ["--estimate", "--config", str(config)]
    assert cli.run(call) == 0
    assert requests.pop()["draft_cost_ratio"] == 0.5
    for place in (tmp_path, file):
        shown = CliRunner().invoke(cli.ppow, [*call, "--cost-profile", str(place)])
        assert shown.exit_code == 0, shown.output
        values = requests.pop()
        assert math.isclose(values["draft_cost_ratio"], PROFILE.draft_cost_ratio())
        assert values["max_steps"] == 7
        assert f"draft_cost_ratio {PROFILE.draft_cost_ratio():.4f}, as measured in" in shown.output


def test_training_refuses_two_ratios_and_no_profile(tmp_path, capsys):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "a"}\n')
    call = ["train", "--target", "t", "--drafter", "d", "--prompts", str(prompts), "--output", "o"]
    call += ["--cost-profile", str(tmp_path)]
    assert cli.run([*call, "--draft-cost-ratio", "0.1"]) == 2
    assert "only one of --cost-profile and --draft-cost-ratio" in capsys.readouterr().err
    assert cli.run(call) == 1
    assert "does not exist: measure one with `ppow profile`" in capsys.readouterr().err


def test_a_profile_error_is_one_that_users_are_shown():
    from vllm_ppow.artifact import ArtifactError

    assert issubclass(CostProfileError, ArtifactError)
