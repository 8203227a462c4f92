"""Turns within one engine: whose steps they are, equal shares of prompts, resuming, and the plugin in a real engine."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import serve_within
import turns_table
import within_table
from bench_server import REPOSITORY
from click.testing import CliRunner
from sweep_table import ADAPTIVE, NONE
from within_scheduler import LEAST_STEPS, Assignment, Turns, WindowInTurns, windows_of

from vllm_ppow.window import WindowCounts

ARMS = [NONE, "K=2", ADAPTIVE]
MADE = {"seconds": 0.25, "tokens": 5, "prefilled": 3, "requests": 4, "verified": 8, "drafts": 4}


def steps_of(turns, now, number, seconds=0.25):
    """(arm, is_first) of so many steps, each over before the next one begins."""
    made = []
    for _ in range(number):
        step = turns.begin()
        now[0] += seconds
        turns.end(step, 2, **MADE)
        made.append((step.turn.arm, step.is_first))
    return made


def make_turns(seconds, seed="0"):
    now, over = [0.0], []
    return (
        Turns(ARMS, seconds, seed, over.append, clock=lambda: now[0], wall=lambda: 1000.0 + now[0]),
        now,
        over,
    )


def test_each_arm_has_one_turn_of_some_seconds_in_every_rotation_in_an_order_that_can_be_had_again():
    turns, now, over = make_turns(2.0)
    made = steps_of(turns, now, 8 * len(ARMS) * 12)
    arms = [arm for arm, first in made if first]
    assert len(over) == len(arms) - 1, "the last one is under way"
    assert all(turn.begun == 8 for turn in over), "2 s of 0.25 s each"
    assert all(sorted(arms[i : i + 3]) == sorted(ARMS) for i in range(0, 36, 3))
    assert [(turn.rotation, turn.position) for turn in over[:4]] == [(0, 0), (0, 1), (0, 2), (1, 0)]
    assert over[1].began_at == 1002.0
    again, now, _ = make_turns(2.0)
    assert steps_of(again, now, 40) == made[:40]
    other, now, _ = make_turns(2.0, seed="1")
    assert steps_of(other, now, 60) != made[:60]


def test_a_turn_has_some_steps_however_long_they_are_and_its_first_one_counts_for_nobody():
    turns, now, over = make_turns(0.01)
    steps_of(turns, now, LEAST_STEPS + 1)
    (turn,) = over
    counted = LEAST_STEPS - 1
    assert (turn.begun, turn.ended) == (LEAST_STEPS, LEAST_STEPS)
    assert (turn.seconds, turn.tokens, turn.prefilled) == (0.25 * counted, 5 * counted, 3 * counted)
    assert (turn.requests, turn.verified, turn.drafted) == (4 * counted, 8 * counted, {2: counted})


def test_a_step_that_is_scheduled_ahead_belongs_to_the_turn_that_it_was_scheduled_in():
    turns, _, over = make_turns(0.0)
    begun = [turns.begin() for _ in range(LEAST_STEPS + 1)]
    assert begun[-1].turn is not begun[0].turn
    for step in begun[:LEAST_STEPS]:
        assert not over
        turns.end(step, 1, **MADE)
    assert [turn.ended for turn in over] == [LEAST_STEPS]


class Window:
    """Remembers what it is asked and told."""

    def __init__(self, counts):
        self.told, self.counts = [], counts

    def choose(self, *given):
        self.told.append(given)
        return 7

    def __getattr__(self, name):
        return lambda *given: self.told.append((name, *given))


def test_windows_are_asked_and_told_in_their_own_turns_only_and_count_together():
    first, other = Window("first"), Window("other")
    shared = WindowInTurns(first, [other])
    assert shared.counts == other.counts == "first"
    names = ("observe_draft", "observe_step", "observe_change")
    shared.length, shared.asked, shared.told = 0, None, None
    assert shared.choose(4, 100, True) == 0
    for name in names:
        getattr(shared, name)(1, 2)
    assert first.told == other.told == []
    shared.length, shared.asked, shared.told = None, other, other
    assert shared.choose(4, 100, True) == 7
    for name in names:
        getattr(shared, name)(1, 2)
    assert first.told == []
    assert other.told == [(4, 100, True), *((name, 1, 2) for name in names)]


# ---------------------------------------------------------------- comparing


def line(speeds, prompts, rotations=32, each=0.004, noise=0.0):
    """A level whose arms make 100 tokens in every turn, at their speed, while reading so many tokens of prompts."""
    draw = np.random.default_rng(1)
    turns = [
        {
            "rotation": number,
            "position": 0,
            "arm": arm,
            "tokens": 100,
            "prefilled": (read := int(prompts[arm] * draw.uniform(0.0, 2.0))),
            "seconds": 100 / speed * np.exp(noise * draw.standard_normal()) + each * read,
            "drafted": {{NONE: "0", ADAPTIVE: "2"}.get(arm) or arm.removeprefix("K="): 3},
        }
        for arm, speed in speeds.items()
        for number in range(rotations)
    ]
    return {"concurrency": 4, "turns": turns}


def test_an_arm_that_happened_to_read_more_prompts_is_not_slower_for_it():
    found = line({NONE: 50.0, "K=2": 80.0, ADAPTIVE: 80.0}, {NONE: 150, "K=2": 100, ADAPTIVE: 200})
    assert within_table.seconds_per_prompt_token(found["turns"]) == pytest.approx(0.004)
    level = turns_table.judge(within_table.comparable(found, 0), 0)
    assert level.over_every["K=2"].value == pytest.approx(1.0)
    raw = turns_table.judge({**found, "drafts_by_length": {ADAPTIVE: {"2": 1}}}, 0)
    assert raw.over_every["K=2"].value < 0.85, "what it would have come to"
    assert level.mean_length == 2.0


def test_shares_of_prompts_are_brought_to_what_all_turns_had_together():
    found = line({NONE: 50.0, "K=2": 80.0, ADAPTIVE: 70.0}, {NONE: 100, "K=2": 100, ADAPTIVE: 100}, noise=0.1)
    before, after = found["turns"], within_table.at_equal_prompts(found["turns"])
    assert sum(turn["seconds"] for turn in after) == pytest.approx(sum(turn["seconds"] for turn in before))
    noisy = within_table.seconds_per_prompt_token(before)
    assert noisy == pytest.approx(0.004, rel=0.15)


def test_what_a_prompts_token_takes_is_found_in_turns_that_end_by_the_clock():
    """As turns do: their seconds are given, and luck with drafts and pace shows in how many tokens they made."""
    found = []
    for seed in range(25):
        draw = np.random.default_rng(seed)
        turns = []
        for number in range(28):
            for arm, (accepted, each) in {NONE: (0.0, 0.06), "K=2": (0.9, 0.08), "K=5": (1.3, 0.11)}.items():
                pace, read = np.exp(0.05 * draw.standard_normal()), int(draw.integers(0, 200))
                steps = max(1, round((2.0 - 0.002 * read) / (each * pace)))
                tokens = steps + draw.poisson(accepted * steps)
                turns.append(
                    {"rotation": number, "arm": arm, "tokens": tokens, "prefilled": read}
                    | {"seconds": steps * each * pace + 0.002 * read, "drafted": {"0": steps}}
                )
        found.append(within_table.seconds_per_prompt_token(turns))
    assert np.mean(found) == pytest.approx(0.002, rel=0.1)  # a regression on tokens finds 1.2 times as much


def test_only_judged_rotations_count_in_what_was_drafted():
    found = line({NONE: 50.0, "K=2": 80.0, ADAPTIVE: 80.0}, {NONE: 1, "K=2": 1, ADAPTIVE: 1})
    for turn in found["turns"]:
        if turn["arm"] == ADAPTIVE and turn["rotation"] < 8:
            turn["drafted"] = {"5": 1000}
    assert turns_table.judge(within_table.comparable(found, 8), 8).mean_length == 2.0


def chosen(lengths, speeds, noise=0.0):
    """Turns of 10 steps: K tokens more than one a step at `speeds`; ours drafts `lengths`, its clock is its own."""
    draw = np.random.default_rng(2)
    turns = []
    for number in range(40):
        for arm, (tokens, seconds) in speeds.items():
            length = 0 if arm == NONE else int(arm.removeprefix("K="))
            turns.append(
                {
                    "rotation": number,
                    "arm": arm,
                    "tokens": 10 * tokens,
                    "seconds": 10 * seconds * np.exp(noise * draw.standard_normal()),
                    "drafted": {str(length): 10},
                }
            )
        ours = {"rotation": number, "arm": ADAPTIVE, "tokens": 1, "seconds": 99.0, "drafted": lengths}
        turns.append(ours)
    return turns


SPEEDS = {NONE: (10, 1.0), "K=1": (15, 1.2), "K=3": (18, 2.0)}


@pytest.mark.parametrize(
    ("lengths", "worth"),
    [
        ({"1": 10}, 1.0),
        ({"0": 10}, 10 / 12.5),
        ({"0": 5, "1": 5}, (12.5 / 1.1) / 12.5),
        ({"2": 4}, (16.5 / 1.6) / 12.5),  # between K = 1 and K = 3
    ],
)
def test_choices_are_worth_what_their_lengths_make_as_fixed_ones(lengths, worth):
    found = within_table.worth_of_choices(chosen(lengths, SPEEDS), "K=1")
    assert (found.low, found.value, found.high) == pytest.approx((worth, worth, worth))


def test_choices_of_the_best_length_are_worth_it_however_noisy_the_machine():
    noisy = within_table.worth_of_choices(chosen({"1": 9, "3": 1}, SPEEDS, noise=0.2), "K=1")
    assert noisy.high - noisy.low < 0.05
    assert noisy.low < (15.3 / 1.28) / 12.5 < noisy.high
    later = [turn for turn in chosen({"1": 9, "3": 1}, SPEEDS) if turn["rotation"] >= 8]
    assert within_table.worth_of_choices(later, "K=1").value == pytest.approx((15.3 / 1.28) / 12.5)


@pytest.mark.parametrize(
    ("arm", "verified", "drafts", "is_whole"),
    [
        ("K=5", 99, 20, True),
        ("K=5", 63, 20, False),
        ("K=5", 101, 20, False),
        ("K=5", 0, 0, False),
        (NONE, 0, 0, True),
        (NONE, 3, 3, False),
        (within_table.TRIMMING, 7, 3, True),
        (ADAPTIVE, 7, 3, True),
    ],
)
def test_drafts_that_are_not_of_their_arms_length_compare_nothing(arm, verified, drafts, is_whole):
    turns = [
        {"arm": arm, "verified": verified, "drafts": drafts},
        {"arm": ADAPTIVE, "verified": 1, "drafts": 1},
    ]
    with (
        contextlib.nullcontext()
        if is_whole
        else pytest.raises(ValueError, match=f"In turns of {arm} {drafts}")
    ):
        within_table.check_whole(turns)


def line_with_trimming(speed):
    """A line of results as tables take it; trimmed drafts make so many tokens a second, K = 2 and ours 80."""
    speeds = {NONE: 50.0, "K=2": 80.0, within_table.TRIMMING: speed, ADAPTIVE: 80.0}
    found = line(speeds, dict.fromkeys(speeds, 50))
    for turn in found["turns"]:
        turn |= {"requests": 12, "verified": 18}
        if turn["arm"] == within_table.TRIMMING:
            turn["drafted"] = {"8": 3}
    return within_table.comparable(found, 8)


def test_what_trimming_by_request_makes_is_said_beside_the_adaptive_window():
    found = line_with_trimming(88.0)
    said = within_table.remark(found, turns_table.judge(found, 8))
    assert "worth 1.000 (1.000 … 1.000) of K=2" in said
    # 1/80 and 1/88 s a token, and in each the same time for prompts
    assert "by request it makes 1.086 (1.086 … 1.086) of what it makes without, " in said
    assert said.endswith(" of K=2, verifying 1.5 tokens a request and step")
    other = {**found, "concurrency": 16}
    remarks = within_table.remarks_by_request([found, other])
    assert remarks[0].startswith(
        "by request, met: at every concurrency at least 98% of the best fixed K: least is 1.0"
    )
    assert (
        remarks[2] == "by request, met: better than every fixed K, interval clear of 1: at concurrency 4, 16"
    )
    assert remarks[4].startswith(
        "by request, tokens and step times over those of one length of as many verified "
    )
    assert remarks[5].startswith("by request, all concurrencies together (geometric mean) it makes 1.086")
    assert remarks[5].endswith(" of K=2, 1.086 (1.086 … 1.086) of adaptive")
    levels, said = serve_within.judge([found, other], {"warm_rotations": 8})
    assert {level.ours for level in levels} == {ADAPTIVE}
    assert said[-6:] == remarks


def test_trimming_is_compared_with_one_length_of_as_many_verified_tokens():
    def made(arm, verified, tokens, seconds):
        return {
            "arm": arm,
            "requests": 10,
            "verified": verified,
            "tokens": tokens,
            "seconds": seconds,
            "drafted": {"1": 5},
        }

    turns = [
        made(NONE, 0, 10, 1.0),
        made("K=2", 20, 20, 2.0),
        made(within_table.TRIMMING, 10, 18, 1.8),
        made(ADAPTIVE, 20, 99, 9.0),
    ]
    assert within_table.of_as_many_verified(turns) == pytest.approx((18 / 15, 1.8 / 1.5))


def test_trimming_by_request_that_loses_misses_the_aims_though_the_adaptive_window_meets_them():
    found = line_with_trimming(60.0)
    (verdict, _), *_ = turns_table.aims([turns_table.judge(found, 0)])
    assert verdict == "met"
    assert within_table.remarks_by_request([found])[0].startswith("by request, MISSED: ")


# ---------------------------------------------------------------- the command


def turn(rotation, position, began_at):
    return {"rotation": rotation, "position": position, "began_at": began_at}


def test_rotations_that_began_before_the_load_was_there_or_are_not_over_do_not_count():
    lines = [turn(0, 0, 5.0), turn(0, 1, 9.0), turn(1, 0, 11.0), turn(1, 1, 13.0), turn(2, 0, 15.0)]
    assert within_table.whole_rotations(lines, since=6.0, arms=2) == [turn(0, 0, 11.0), turn(0, 1, 13.0)]


def test_a_run_goes_on_after_its_last_whole_level(tmp_path, monkeypatch):
    measured = []

    def measure_level(server, settings, concurrency, output, on_rotations):
        measured.append(concurrency)
        on_rotations(40)
        speeds, prompts = {NONE: 50.0, "K=1": 60.0, ADAPTIVE: 70.0}, dict.fromkeys([NONE, "K=1", ADAPTIVE], 9)
        made = line(speeds, prompts, rotations=40)
        for one in made["turns"]:
            one["drafted"] = {"0" if one["arm"] == NONE else "1": 3}
        return {**made, "concurrency": concurrency}

    monkeypatch.setattr(serve_within, "measure_level", measure_level)
    server = contextlib.nullcontext({ADAPTIVE: None})
    monkeypatch.setattr(serve_within.serve_sweep, "running", lambda *_: server)
    arguments = ["--output", str(tmp_path), "--adapter", "a", "--windows", "1", "--levels"]
    assert CliRunner().invoke(serve_within.main, [*arguments, "8"]).exit_code == 0
    with (tmp_path / "results.jsonl").open("a") as stream:
        stream.write('{"concurrency": 32, "tur')  # killed there
    done = CliRunner().invoke(serve_within.main, [*arguments, "1,8,32"])
    assert done.exit_code == 0, done.output
    assert measured == [8, 1, 32]
    table = (tmp_path / "table.md").read_text()
    assert within_table.NOTE in table
    assert (
        "- concurrency 8: its choices are worth 1.000 (1.000 … 1.000) of K=1 (1: 100% of its steps)" in table
    )
    assert [row.split(" | ")[0] for row in table.splitlines()[4:7]] == ["| 1", "| 8", "| 32"]
    assert "(geometric mean) it makes 1.1" in table


@pytest.mark.parametrize(
    ("option", "says"),
    [
        (["--rotations", "20"], "--rotations must be at least"),
        (["--levels", "8,64"], "above --max-num-seqs 32"),
    ],
)
def test_what_would_measure_nothing_is_refused_before_a_server_starts(tmp_path, option, says):
    result = CliRunner().invoke(serve_within.main, ["--output", str(tmp_path), *option])
    assert result.exit_code == 2
    assert says in result.output


def test_committed_results_give_their_table_again_and_do_not_meet_all_aims(tmp_path, monkeypatch):
    kept = REPOSITORY / "examples" / "benchmarks" / "within-2026-11-27"
    results = (kept / "results.jsonl").read_text()
    (tmp_path / "results.jsonl").write_text(results)
    facts = json.loads(results.partition("\n")[0])["facts"]
    machine = {key: facts[key] for key in ("machine", "versions")}
    monkeypatch.setattr(serve_within.serve_sweep, "machine_facts", lambda: machine)
    arguments = ["--target", facts["target"], "--adapter", facts["adapter"], "--dtype", facts["dtype"]]
    arguments += ["--turn-seconds", "2", "--rotations", "36", "--output", str(tmp_path), "--report-only"]
    shown = CliRunner().invoke(serve_within.main, arguments)
    assert shown.exit_code == 0, shown.output
    assert (tmp_path / "table.md").read_text() == (kept / "table.md").read_text()
    assert CliRunner().invoke(serve_within.main, [*arguments, "--check"]).exit_code == 1


ENGINE = """
import json, sys
from pathlib import Path
sys.path.insert(0, str(Path("tests").resolve()))
from serving_pair import VOCAB, build_pair, random_adapter
from serving_engine import engine, expected, generate

root = Path(sys.argv[1])
pair = build_pair(root)
adapter = random_adapter(root, "causal_lm", pair)
spec = {"method": "ppow", "model": str(adapter.directory), "num_speculative_tokens": 4,
        "ppow": {"per_request": True}}
with engine(pair.target, spec, async_scheduling=False, distributed_executor_backend=sys.argv[2]) as llm:
    right = all(generate(llm) == expected(VOCAB) for _ in range(16))
    window = llm.llm_engine.engine_core.engine_core.scheduler.ppow_window
    print(json.dumps({"right": right, "asked": sum(window.counts.chosen)}))
"""


@pytest.mark.engine
@pytest.mark.parametrize(
    "executor", ["uni", "mp"]
)  # the drafter in the scheduler's process, and in another as `serve` has
def test_in_an_engine_that_loads_the_plugin_every_turn_drafts_its_arms_length(executor, tmp_path):
    settings = {"windows": (1, 4), "turn_seconds": 0.01, "seed": 0, "per_request": True}
    variables = serve_within.environment(tmp_path / "out", settings)
    path = f"{variables['PYTHONPATH']}:{REPOSITORY / 'train'}:{REPOSITORY}"
    ran = subprocess.run(
        [sys.executable, "-c", ENGINE, str(tmp_path), executor],
        env={**os.environ, **variables, "PYTHONPATH": path},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    told = json.loads(next(line for line in ran.stdout.splitlines() if line.startswith('{"right"')))
    assert told["right"], "greedy output does not depend on who drafts"
    turns = within_table.read_turns(tmp_path / "out" / "turns.jsonl")
    trimming = within_table.TRIMMING
    assert {one["arm"] for one in turns} == {NONE, "K=1", "K=4", ADAPTIVE, trimming}
    for one in turns:
        forced = {NONE: 0, "K=1": 1, "K=4": 4}.get(one["arm"])
        assert forced is None or set(one["drafted"]) == {str(forced)}, one
        assert one["arm"] != trimming or set(one["drafted"]) <= {"0", "4"}, "what it may draft at most"
    within_table.check_whole(turns)
    trimmed = [one for one in turns if one["arm"] == trimming]
    assert sum(one["verified"] for one in trimmed) < 0.9 * 4 * sum(one["drafts"] for one in trimmed)
    own = sum(one["begun"] for one in turns if one["arm"] in {ADAPTIVE, trimming})
    assert own <= told["asked"] < 0.6 * sum(one["begun"] for one in turns), "asked in their own turns"


def test_arms_have_windows_of_their_own_and_an_engine_that_cannot_trim_is_refused():
    built = Window(WindowCounts([0], layers=("step",)))
    arms = {NONE: 0, "K=1": 1, ADAPTIVE: None}
    assert windows_of(Assignment(arms, 1.0, "0", "out"), built, None) == {ADAPTIVE: built}
    trimming = Assignment({**arms, within_table.TRIMMING: None}, 1.0, "0", "out", within_table.TRIMMING)
    with pytest.raises(RuntimeError, match="does not trim drafts by request"):
        windows_of(trimming, built, None)
