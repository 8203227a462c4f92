"""Turns under load without vLLM: who runs when, what is counted, intervals, verdicts that can fail, resuming."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time

import click
import numpy as np
import psutil
import pytest
import serve_turns
import turns_table
from bench_server import REPOSITORY
from click.testing import CliRunner
from sweep_table import ADAPTIVE, NONE

BENCHMARKS = REPOSITORY / "examples" / "benchmarks"

ARMS = [NONE, "K=1", "K=3", ADAPTIVE]


class FakeArm:
    """Server and client in one: makes tokens at its speed while it runs, on a clock of the test's."""

    def __init__(self, now, speed):
        self.now, self.speed, self.made, self.since, self.alive = now, speed, 0.0, now[0], True

    def _count(self):
        if self.since is not None:
            self.made += (self.now[0] - self.since) * self.speed
            self.since = self.now[0]

    def signal(self, number):
        self._count()
        self.since = self.now[0] if number == signal.SIGCONT else None

    def metrics(self):
        self._count()
        return {"vllm:generation_tokens_total": self.made}

    def cpu_seconds(self):
        return 0.0

    def check_alive(self):
        if not self.alive:
            raise click.ClickException("The load ended")


def make_runners(speeds):
    now = [0.0]
    runners = {}
    for arm, speed in speeds.items():
        fake = FakeArm(now, speed)
        runners[arm] = serve_turns.Runner(fake, fake, clock=lambda: now[0])
        runners[arm].pause()
    return now, runners


def test_only_the_seconds_of_its_own_turns_count_for_an_arm():
    now, runners = make_runners({NONE: 100.0, "K=1": 50.0})
    ticks = []

    def sleep(seconds):
        now[0] += seconds

    lines = serve_turns.take_turns(
        runners, [[NONE, "K=1"]] * 3, 2.0, lambda: ticks.append(now[0]), sleep=sleep
    )
    assert ticks == [4.0, 8.0, 12.0], "one arm at a time"
    assert [(x["arm"], x["rotation"], x["seconds"], x["tokens"]) for x in lines] == [
        (NONE, 1, 2.0, 200), ("K=1", 1, 2.0, 100), (NONE, 2, 2.0, 200), ("K=1", 2, 2.0, 100),
    ]  # fmt: skip


def test_a_load_that_ends_ends_the_benchmark():
    _, runners = make_runners({NONE: 1.0})
    runners[NONE].client.alive = False
    with pytest.raises(click.ClickException, match="load ended"):
        serve_turns.take_turns(runners, [[NONE]], 1.0, lambda: None, sleep=lambda s: None)


def test_a_client_that_ended_says_so_and_one_that_runs_is_stopped_at_a_signal(tmp_path, monkeypatch):
    monkeypatch.setattr(serve_turns, "_bench", lambda arguments, log: time.sleep(float(arguments[0])))
    ended = serve_turns.Client(["0"], tmp_path / "log")
    ended._process.join()
    with pytest.raises(click.ClickException, match="more --requests"):
        ended.check_alive()
    running = serve_turns.Client(["60"], tmp_path / "log")
    running.check_alive()
    running.signal(signal.SIGSTOP)
    process = psutil.Process(running._process.pid)
    deadline = time.monotonic() + 10
    while process.status() != psutil.STATUS_STOPPED and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.status() == psutil.STATUS_STOPPED
    running.stop()
    assert not process.is_running(), "killed though it was stopped"


def test_a_stopped_server_computes_nothing(monkeypatch):
    from bench_server import Server

    server = object.__new__(Server)
    busy = "import time\nwhile True: pass"
    server._process = subprocess.Popen([sys.executable, "-c", busy], start_new_session=True)
    try:
        server.signal(signal.SIGSTOP)
        time.sleep(0.2)
        before = server.cpu_seconds()
        time.sleep(0.5)
        assert server.cpu_seconds() == before
        server.signal(signal.SIGCONT)
        deadline = time.monotonic() + 20
        while server.cpu_seconds() < before + 0.2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert server.cpu_seconds() >= before + 0.2
    finally:
        server._process.kill()
        server._process.wait()


def test_every_arm_has_one_turn_in_each_rotation_in_an_order_that_can_be_had_again():
    orders = serve_turns.rotations(ARMS, 12, "0 8")
    assert all(sorted(order) == sorted(ARMS) for order in orders)
    assert orders == serve_turns.rotations(ARMS, 12, "0 8")
    assert len({tuple(order) for order in orders}) > 4
    assert orders != serve_turns.rotations(ARMS, 12, "1 8")


class FakeServer(FakeArm):
    """As `loaded` sees a server: what it was sent, and requests that its client keeps coming."""

    name, url = "K=1", "http://127.0.0.1:1"

    def __init__(self, running):
        super().__init__([0.0], 1.0)
        self.running, self.sent = running, []

    def signal(self, number):
        self.sent.append(number)

    def metrics(self):
        return {"vllm:num_requests_running": self.running, "vllm:num_requests_waiting": 0.0}


SETTINGS = {
    "requests": 9, "temperature": 0.0, "output_len": 4, "seed": 0, "target": "t", "prompts": "p.jsonl",
}  # fmt: skip


@pytest.fixture
def clients(monkeypatch):
    """Every client made, with what it was sent; `stop` ends its server's requests."""
    made = []

    class FakeClient(FakeServer):
        def __init__(self, arguments, log):
            super().__init__(0.0)
            self.arguments, self.stopped = arguments, False
            made.append(self)

        def stop(self):
            self.stopped = True
            for server in self.servers:
                server.running = 0.0

    monkeypatch.setattr(serve_turns, "Client", FakeClient)
    return made


@pytest.mark.parametrize("fails", [False, True])
def test_loaded_servers_are_paused_and_run_again_afterwards_whatever_happens(tmp_path, clients, fails):
    server = FakeServer(running=4.0)
    with contextlib.suppress(RuntimeError), serve_turns.loaded({"K=1": server}, SETTINGS, 4, tmp_path):
        assert server.sent == clients[0].sent == [signal.SIGSTOP]
        clients[0].servers = [server]
        if fails:
            raise RuntimeError
    assert server.sent == [signal.SIGSTOP, signal.SIGCONT]
    assert clients[0].stopped
    assert clients[0].arguments[clients[0].arguments.index("--max-concurrency") + 1] == "4"


def test_a_server_that_does_not_get_its_load_is_told(tmp_path, clients, monkeypatch):
    monkeypatch.setattr(serve_turns, "LOADED_S", 0.0)
    server = FakeServer(running=3.0)
    monkeypatch.setattr(FakeServer, "servers", [server], raising=False)
    with (
        pytest.raises(click.ClickException, match="server of K=1 had too few requests for 0 s"),
        serve_turns.loaded({"K=1": server}, SETTINGS, 4, tmp_path),
    ):
        pytest.fail("not loaded")
    assert clients[0].stopped
    assert server.sent[-1] == signal.SIGCONT


# ---------------------------------------------------------------- comparing


def line(speeds, concurrency=1, rotations=48, wander=0.3, noise=0.0, warm=None):
    """A level on a machine whose pace wanders by `wander` from one rotation to the next, all arms alike."""
    draw = np.random.default_rng(3)
    pace = np.exp(wander * np.sin(np.arange(rotations) / 3.0))
    turns = []
    for arm, speed in speeds.items():
        for number in range(rotations):
            made = 100 * speed * pace[number] * np.exp(noise * draw.standard_normal())
            if warm is not None and number < warm:
                made *= 0.1 if arm == ADAPTIVE else 1.0
            turns.append(
                {"rotation": number, "position": 0, "arm": arm, "seconds": 2.0, "tokens": int(2 * made)}
            )
    drafts = {arm: {} for arm in speeds} | {ADAPTIVE: {"1": 30, "3": 10}}
    return {"concurrency": concurrency, "drafts_by_length": drafts, "turns": turns}


def test_a_pace_that_wanders_does_not_widen_the_interval():
    level = turns_table.judge(line({NONE: 1.0, "K=1": 1.2, "K=3": 1.5, ADAPTIVE: 1.5}), 0)
    found = level.over_every["K=3"]
    assert level.best == "K=3"
    assert found.value == pytest.approx(1.0, abs=0.005)
    assert found.high - found.low < 0.01
    assert level.over_none["K=1"].value == pytest.approx(1.2, abs=0.01)
    assert level.mean_length == 1.5


def test_noise_of_single_turns_does_widen_it_about_as_much_as_it_moves_the_value():
    inside, number = (
        0,
        28,
    )  # as few as there are in most results: blocks drawn as often as there are cover 0.87
    for seed in range(200):
        draw = np.random.default_rng(seed)
        noise = draw.standard_normal((2, number))
        found = turns_table.ratio(*(np.stack([100 * np.exp(0.15 * one), np.ones(number)]) for one in noise))
        inside += found.low <= 1.0 <= found.high
    assert 0.9 <= inside / 200 < 0.98


def test_first_rotations_are_not_judged():
    slow_start = line({NONE: 1.0, "K=1": 1.2, ADAPTIVE: 1.2}, warm=8)
    assert turns_table.judge(slow_start, 0).over_every["K=1"].value < 0.9
    assert turns_table.judge(slow_start, 8).over_every["K=1"].value == pytest.approx(1.0, abs=0.005)


@pytest.mark.parametrize(
    ("ours", "noise", "verdicts"),
    [
        (1.5, 0.0, ["met", "met", "MISSED"]),
        (1.6, 0.0, ["met", "met", "met"]),
        (1.4, 0.0, ["MISSED", "met", "MISSED"]),
        (0.9, 0.0, ["MISSED", "MISSED", "MISSED"]),
        (1.47, 0.2, ["not resolved", "met", "not resolved"]),
    ],
)
def test_aims_are_met_missed_or_not_resolved(ours, noise, verdicts):
    speeds = {NONE: 1.0, "K=1": 1.2, "K=3": 1.505, ADAPTIVE: ours}
    level = turns_table.judge(line(speeds, noise=noise), 0)
    assert [verdict for verdict, _ in turns_table.aims([level])] == verdicts


def test_one_bad_level_speaks_for_all():
    good = turns_table.judge(line({NONE: 1.0, "K=1": 1.2, ADAPTIVE: 1.3}), 0)
    bad = turns_table.judge(line({NONE: 1.0, "K=1": 1.2, ADAPTIVE: 1.0}, concurrency=8), 0)
    (of_best, text), (of_none, _), (better, where) = turns_table.aims([good, bad])
    assert (of_best, of_none, better) == ("MISSED", "met", "met")
    assert "concurrency 8 (best there K=1)" in text
    assert where.endswith("at concurrency 1")


def test_the_best_of_the_other_half_is_chosen_without_looking_at_this_half():
    lucky = line({NONE: 1.0, "K=1": 1.2, "K=3": 1.2, ADAPTIVE: 1.2}, rotations=40, wander=0.0)
    for turn in lucky["turns"]:
        if turn["arm"] == "K=3" and turn["rotation"] < 20:
            turn["tokens"] *= 2
    level = turns_table.judge(lucky, 0)
    assert level.over_every[level.best].value == pytest.approx(1 / 1.5, abs=0.01), "K=3 by luck"
    assert level.over_chosen == pytest.approx(1.0, abs=0.01)


def test_over_all_levels_together_each_length_that_all_have_is_compared_by_the_geometric_mean():
    speeds = [{NONE: 1.0, "K=1": 1.5, "K=3": 1.0, ADAPTIVE: 1.5}, {NONE: 1.0, "K=1": 1.0, ADAPTIVE: 1.44}]
    levels = [turns_table.counts_of(line(each, noise=0.02), 0) for each in speeds]
    (arm, over), *others = turns_table.together(levels).items()
    assert (arm, others) == ("K=1", [])
    assert over.value == pytest.approx(1.2, abs=0.02)
    assert 1.15 < over.low < over.value < over.high < 1.25
    alone = turns_table.ratio(levels[1][ADAPTIVE], levels[1]["K=1"])
    assert (over.high - over.low) / over.value < 0.9 * (alone.high - alone.low) / alone.value


def test_table_and_plot_hold_every_level(tmp_path):
    levels = [turns_table.judge(line({NONE: 1.0, "K=1": 1.2, ADAPTIVE: 1.3}, n), 0) for n in (1, 8)]
    table = turns_table.make_table(levels).splitlines()
    assert [row.split(" | ")[0] for row in table[2:]] == ["| 1", "| 8"]
    assert table[2].split(" | ")[1:4] == [
        "106",
        str(levels[0].over_none["K=1"]),
        str(levels[0].over_none[ADAPTIVE]),
    ]
    turns_table.write_plot(tmp_path / "turns.svg", levels, 0.0)
    assert "#d1495b" in (tmp_path / "turns.svg").read_text(), "ours"


# ---------------------------------------------------------------- the command


def test_a_run_goes_on_after_its_last_whole_level(tmp_path, monkeypatch):
    measured = []

    def measure_level(servers, settings, concurrency, output, on_rotation):
        measured.append(concurrency)
        return line({NONE: 1.0, "K=1": 1.2, ADAPTIVE: 1.3}, concurrency)

    monkeypatch.setattr(serve_turns, "measure_level", measure_level)
    monkeypatch.setattr(serve_turns.serve_sweep, "running", lambda *_: contextlib.nullcontext({}))
    arguments = ["--output", str(tmp_path), "--adapter", "a", "--windows", "1", "--levels"]
    assert CliRunner().invoke(serve_turns.main, [*arguments, "8"]).exit_code == 0
    with (tmp_path / "results.jsonl").open("a") as stream:
        stream.write('{"concurrency": 32, "tur')  # killed there
    done = CliRunner().invoke(serve_turns.main, [*arguments, "1,8,32"])
    assert done.exit_code == 0, done.output
    assert measured == [8, 1, 32]
    rows = (tmp_path / "table.md").read_text().splitlines()[4:7]
    assert [row.split(" | ")[0] for row in rows] == ["| 1", "| 8", "| 32"]
    other = CliRunner().invoke(serve_turns.main, [*arguments, "8", "--seed", "1"])
    assert (other.exit_code, "other seed" in other.output) == (2, True)


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [("--rotations", "20", "--rotations must be at least"), ("--levels", "8,64", "above --max-num-seqs 32")],
)
def test_what_would_measure_nothing_is_refused_before_a_server_starts(tmp_path, option, value, says):
    result = CliRunner().invoke(serve_turns.main, ["--output", str(tmp_path), option, value])
    assert result.exit_code == 2
    assert says in result.output


@pytest.mark.parametrize(
    ("directory", "options"),
    [
        ("turns-2026-11-27", []),
        ("turns-2026-11-27-after", ["--windows", "1,2,3,5", "--turn-seconds", "3", "--rotations", "32"]),
        ("turns-2026-11-27-learning", ["--windows", "1,2,3,5", "--turn-seconds", "3", "--rotations", "32"]),
    ],
)
def test_committed_results_give_their_table_again_and_miss_their_aims(
    tmp_path, monkeypatch, directory, options
):
    kept = BENCHMARKS / directory
    results = (kept / "results.jsonl").read_text()
    (tmp_path / "results.jsonl").write_text(results)
    facts = json.loads(results.partition("\n")[0])["facts"]
    machine = {key: facts[key] for key in ("machine", "versions")}
    monkeypatch.setattr(serve_turns.serve_sweep, "machine_facts", lambda: machine)
    arguments = ["--target", "runs/costlier-32/target", "--adapter", "runs/costlier-32/adapter"]
    arguments += ["--dtype", "float32", "--output", str(tmp_path), "--report-only", *options]
    shown = CliRunner().invoke(serve_turns.main, arguments)
    assert shown.exit_code == 0, shown.output
    assert (tmp_path / "table.md").read_text() == (kept / "table.md").read_text()
    assert CliRunner().invoke(serve_turns.main, [*arguments, "--check"]).exit_code == 1
