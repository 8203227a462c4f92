"""The window replayed: what an engine of real texts gives its requests, step times out of turns, and the table."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import statistics

import pytest
import replay_window
from bench_adapters import make_adapter
from click.testing import CliRunner
from replay_engine import Engine, Machine
from replay_texts import Text, Texts, load_texts, make_texts
from serving_profile import PROFILE
from sweep_table import NONE

from vllm_ppow.acceptance import AcceptanceEstimate, TrimmedAcceptance
from vllm_ppow.cost_profile import write_cost_profile
from vllm_ppow.request_window import RequestWindow
from vllm_ppow.step_cost import StepCost
from vllm_ppow.window import DraftWindow

STEPS, DRAFTING = (0.02, 0.022, 0.026, 0.032), (0.001, 0.002, 0.003, 0.004)
QUIET = Machine(2, STEPS, DRAFTING, prompt_tokens=90, prompt_seconds=0.0, pace_spread=1e-9, pace_seconds=1.0)


def text(accepted: list[int], length: int = 3) -> Text:
    """A text whose drafter knows what will be accepted."""
    return Text(accepted, [[950 if at < count else 50 for at in range(length)] for count in accepted])


# Half of a text is easy, half is hard: drafts of three are worth it in the mean.
TEXTS = [text([3, 2, 1, 0] * 5 + [3] * 20), text([3] * 40)]


def test_requests_are_given_what_their_texts_say():
    engine = Engine(QUIET, [text([2, 1, 0, 1, 0])], seed=0)
    for request in engine._requests:
        request.produced = 0
    made = engine.fixed(2, 4)
    # 1: the prompt, one token. 2: a draft of 2 behind token 1, whole: tokens 2 to 4. 3: behind token 4, 1 of 2, and the
    # text is over. 4: the next one's prompt.
    assert made.tokens == 2 * (1 + 3 + 2 + 1)
    assert made.drafted == [0, 0, 4, 0]
    assert (
        made.verified == 2 * 2 * 2
    )  # behind the first step, and behind the prompts of the last, is no draft
    first = STEPS[0] - DRAFTING[0] + DRAFTING[2]  # verifies none
    assert made.seconds == pytest.approx(2 * first + 2 * STEPS[2])


def test_steps_that_read_prompts_take_as_much_longer_and_are_not_timed():
    class Told:
        def __init__(self):
            self.steps = self.drafts = 0
            self.contexts = []

        def choose(self, batch, context, decodes):
            self.contexts.append(context)
            return 1

        def observe_draft(self, drafted, accepted):
            self.drafts += drafted > 0

        def observe_step(self, *arguments):
            self.steps += 1

        observe_change = observe_step

    machine = Machine(1, (0.02, 0.02), (0.0, 0.0), 90, 0.5, 1e-9, 1.0)
    engine, told = Engine(machine, [text([1, 1])], seed=0), Told()
    engine._requests[0].produced = 0
    made = engine.adaptive(told, 6)  # prompt, both tokens, prompt, both tokens, ...
    assert made.seconds == pytest.approx(6 * 0.02 + 3 * 0.5)
    assert (told.steps, told.drafts) == (3, 3)
    assert told.contexts == [90, 91] * 3


def test_the_pace_wanders_as_it_is_told_to():
    engine = Engine(Machine(1, (0.02,), (0.0,), 90, 0.0, 0.1, 2.0), TEXTS, seed=0)
    logs = [math.log(engine._pace(0.2)) for _ in range(20_000)]
    assert statistics.pstdev(logs) == pytest.approx(math.hypot(0.1, 0.05), rel=0.1)
    after = statistics.correlation(logs[:-10], logs[10:]) * (0.1**2 + 0.05**2) / 0.1**2
    assert after == pytest.approx(math.exp(-1), abs=0.08)


def turns_of(step_seconds, prompt_token=0.001, rotations=400, spread=0.1):
    """Turns a second apart whose pace keeps half from one to the next."""
    drawn, log, turns = random.Random(0), 0.0, []
    for rotation in range(rotations):
        for arm, seconds in step_seconds.items():
            log = 0.5 * log + drawn.gauss(0.0, spread * math.sqrt(0.75))
            prefilled = drawn.randrange(200)
            turns.append(
                {
                    "rotation": rotation,
                    "arm": arm,
                    "began_at": float(len(turns)),
                    "seconds": 50 * seconds * math.exp(log) + prompt_token * prefilled,
                    "tokens": 100,
                    "prefilled": prefilled,
                    "drafted": {arm.removeprefix("K=").replace(NONE, "0"): 50},
                }
            )
    return turns


def test_step_times_and_pace_out_of_turns():
    turns = turns_of({NONE: 0.02, "K=1": 0.024, "K=3": 0.034, "adaptive": 9.0})
    machine = replay_window.machine_of({"concurrency": 4, "turns": turns}, 20, 5)
    assert machine.batch == 4
    wanted = [0.02, 0.024, 0.029, 0.034, 0.039, 0.044]
    assert machine.step_seconds == pytest.approx(wanted, rel=0.03)
    assert machine.draft_seconds == (0.0,) * 6
    profiled = replay_window.machine_of({"concurrency": 4, "turns": turns}, 20, 5, PROFILE)
    assert profiled.draft_seconds[:3] == pytest.approx([PROFILE.drafting_seconds(4, n) for n in range(3)])
    assert machine.prompt_tokens == pytest.approx(64 * 0.995, rel=0.05)
    assert machine.prompt_seconds == pytest.approx(0.001 * machine.prompt_tokens, rel=0.25)
    assert machine.pace_spread == pytest.approx(0.1, rel=0.2)
    assert machine.pace_seconds == pytest.approx(1 / math.log(2), rel=0.35)


def test_a_window_that_is_right_is_worth_what_the_best_length_is_and_a_wrong_one_less():
    speeds = replay_window.fixed_speeds(QUIET, TEXTS)
    assert speeds.index(max(speeds)) == 3

    def replayed(make):
        return replay_window.replay(QUIET, TEXTS, make, speeds, seeds=4, warm_seconds=6, seconds=12)

    ours = replayed(lambda: (DraftWindow(range(4), AcceptanceEstimate(3), StepCost()), None))
    assert min(ours.worths) > 0.97
    assert statistics.mean(ours.speeds) == pytest.approx(statistics.mean(ours.worths), abs=0.03)
    short = replayed(lambda: (DraftWindow(range(2), AcceptanceEstimate(1), StepCost()), None))
    assert short.drafted[1] > 0.9
    assert max(short.worths) < 0.9


class Ignored:
    def observe(self, *arguments):
        """A clock that nobody reads."""


class Known:
    """Trims to what will be accepted, as the confidences of `text` say, and looks one token further."""

    def __init__(self):
        self.verify_price = self.pass_price = Ignored()
        self.seen, self.steps, self.pauses = [], [], 0

    def pause(self):
        self.pauses += 1

    def begin(self, limit, sampled, active):
        self.limit, self.active, self.confidences = limit, active, [[] for _ in active]

    def add(self, confidences):
        for row, confidence in enumerate(confidences):
            self.confidences[row].append(confidence)
        return any(confidence > 0.5 for confidence in confidences)

    def lengths(self):
        rows = zip(self.confidences, self.active, strict=True)
        return [sum(sure > 0.5 for sure in row) if active else 0 for row, active in rows]

    def observe(self, *arguments):
        self.seen.append(arguments)

    def observe_step(self, *arguments):
        self.steps.append(arguments)


def test_trimmed_drafts_are_verified_for_fewer_tokens_than_passes_were_made():
    accepted = [3, 0, 0, 0] * 3
    engine, trimming = Engine(dataclasses.replace(QUIET, batch=1), [text(accepted)], seed=0), Known()
    engine._requests[0].produced = 1
    window = DraftWindow([3], AcceptanceEstimate(3), StepCost(), TrimmedAcceptance(), by_request=True)
    made = engine.adaptive(window, 3, trimming)
    # 1: no draft, one token; behind token 2 nothing will be accepted: one pass, no token. 2: none, one token; the same
    # behind token 3. 3: one token; the same behind token 4.
    assert (made.tokens, made.verified) == (3, 0)
    assert made.seconds == pytest.approx(3 * (STEPS[0] - DRAFTING[0] + DRAFTING[1]))
    made = engine.adaptive(window, 2, trimming)
    # 4: one token, and behind token 5 three will be accepted: three passes. 5: they are; behind token 9 again three.
    assert (made.tokens, made.verified) == (1 + 4, 3)
    assert made.seconds == pytest.approx(STEPS[0] - DRAFTING[0] + DRAFTING[3] + STEPS[3])
    assert trimming.seen == [(False, [0.95] * 3, 3)]
    batch, tokens, seconds = trimming.steps[-1]
    assert (batch, tokens) == (1, 4)
    assert seconds == pytest.approx(STEPS[3], rel=0.3)  # each pass has a noise of its own


def test_a_step_without_drafts_is_told_to_what_trims_as_the_engine_does():
    engine, trimming = Engine(dataclasses.replace(QUIET, batch=1), [text([0] * 12)], seed=0), Known()
    engine._requests[0].produced = 1
    window = DraftWindow([0], AcceptanceEstimate(1), StepCost())
    engine.adaptive(window, 3, trimming)
    assert trimming.pauses == 3
    assert [(batch, tokens) for batch, tokens, _ in trimming.steps] == [(1, 1)] * 2, (
        "none was made before the first"
    )


def test_trimming_makes_more_than_every_fixed_length_where_the_drafter_knows():
    texts = [text([3, 2, 1, 0, 0, 0, 0] * 6)]
    speeds = replay_window.fixed_speeds(QUIET, texts)

    def trimmed():
        window = DraftWindow([0, 3], AcceptanceEstimate(3), StepCost(), TrimmedAcceptance(), by_request=True)
        return window, RequestWindow(3)

    found = replay_window.replay(QUIET, texts, trimmed, speeds, seeds=4, warm_seconds=6, seconds=12)
    assert found.worths == ()
    assert statistics.mean(found.speeds) > 1.03
    assert 0 < found.verified < 3


def test_the_command_says_the_same_again(tmp_path):
    lines = [
        {"facts": {"warm_rotations": 1}},
        {"concurrency": 2, "turns": turns_of({NONE: 0.02, "K=1": 0.022, "K=3": 0.032}, rotations=30)},
    ]
    (tmp_path / "turns.jsonl").write_text("\n".join(map(json.dumps, lines)))
    Texts(3, TEXTS).write(tmp_path / "texts.json")
    assert load_texts(None, tmp_path / "texts.json", "", 0) == Texts(3, TEXTS)
    times = {
        name: ((row,),)
        for name, row in (("target_step_seconds", (0.018, 0.022)), ("draft_seconds", (0.001, 0.003)))
    }
    profile = dataclasses.replace(
        PROFILE, context_lengths=(64,), batch_sizes=(2,), draft_lengths=(0, 3), num_speculative_tokens=3,
        overhead_seconds=(((0.0, 0.0),),), acceptance_per_position=(0.7, 0.5, 0.4), **times,
    )  # fmt: skip
    write_cost_profile(tmp_path, profile)
    arguments = [
        "--turns",
        str(tmp_path / "turns.jsonl"),
        "--seeds",
        "2",
        "--seconds",
        "4",
        "--warm-seconds",
        "1",
    ]
    told = []
    for name in ("first", "second"):
        more = ["--texts", str(tmp_path / "texts.json"), "--output", str(tmp_path / name)]
        more += ["--profile", str(tmp_path)]
        result = CliRunner().invoke(replay_window.main, [*arguments, *more], catch_exceptions=False)
        assert result.exit_code == 0
        told.append(json.loads((tmp_path / name / "replay.json").read_text())["windows"])
    assert told[0] == told[1]
    rows = {row["window"]: row for row in told[0]}
    assert list(rows) == ["cost profile", "by request", "clock", "step times known"]
    assert {row["concurrency"] for row in told[0]} == {2}
    assert [len(row["worths"]) for row in told[0]] == [2, 0, 2, 2]
    assert (tmp_path / "first" / "table.md").read_text() == result.output
    refused = CliRunner().invoke(replay_window.main, [*arguments, "--output", str(tmp_path / "third")])
    assert refused.exit_code == 2
    assert "--texts" in refused.output
    refused = CliRunner().invoke(replay_window.main, [*arguments, *more, "--seeds", "1"])
    assert refused.exit_code == 2, "one run has no spread"


@pytest.mark.slow
def test_texts_are_those_of_an_adapters_drafts(tmp_path):
    long = make_adapter(tmp_path / "long", 0.0, num_speculative_tokens=4)
    short = make_adapter(tmp_path / "short", 0.0, num_speculative_tokens=2)
    texts = make_texts(long.directory, "tests_held_out", 3).texts
    assert len(texts) == 3
    assert {max(text.accepted) for text in texts} <= {1, 2, 3, 4}
    cut = make_texts(short.directory, "tests_held_out", 3).texts
    for whole, of_short in zip(texts, cut, strict=True):  # a shorter draft is the beginning of a longer one
        starts = min(len(whole.accepted), len(of_short.accepted))
        assert starts >= 60
        assert [min(2, accepted) for accepted in whole.accepted[:starts]] == of_short.accepted[:starts]
        for confidences, beginning in zip(whole.confidences[:starts], of_short.confidences, strict=False):
            assert confidences[:2] == pytest.approx(beginning, abs=2)
        assert all(0 < confidence <= 1000 for row in whole.confidences for confidence in row)
    pairs = [(c[0], a > 0) for text in texts for c, a in zip(text.confidences, text.accepted, strict=True)]
    sure, unsure = ([kept for confidence, kept in pairs if (confidence > 700) == high] for high in (1, 0))
    assert statistics.mean(sure) > statistics.mean(unsure) + 0.2, "what it is sure of is accepted more often"
