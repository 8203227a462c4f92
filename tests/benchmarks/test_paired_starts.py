"""Starts in turns, with programs in place of engines: only their own seconds count, failures are told."""

from __future__ import annotations

import json
import time

import click
import pytest
from paired_starts import Start, StartPlan, time_pair

WORK = """
import sys, time
def work(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end: pass
work({imports}); print("MARK imported", flush=True)
print("some line of a log", flush=True)
work({engine}); print("MARK engine", flush=True)
"""


def plan(arm, imports=0.4, engine=0.4):
    return StartPlan(arm, {}, program=WORK.format(imports=imports, engine=engine))


def test_seconds_of_the_other_one_do_not_count():
    began = time.perf_counter()
    found = time_pair([plan("a"), plan("b", engine=1.2)])
    whole = time.perf_counter() - began
    assert list(found) == ["a", "b"]
    a, b = found["a"], found["b"]
    assert a["whole_cpu_s"] == pytest.approx(0.8, abs=0.2)
    assert b["whole_cpu_s"] - a["whole_cpu_s"] == pytest.approx(0.8, abs=0.1)
    for seconds in (a, b):
        assert seconds["whole_s"] >= 0.95 * seconds["whole_cpu_s"]
        assert 0 < seconds["engine_s"] < seconds["whole_s"]
    assert a["whole_s"] + b["whole_s"] <= whole, "never both at once"
    assert b["engine_s"] > a["engine_s"]


def test_it_computes_nothing_outside_its_turns():
    start = Start(plan("a", imports=0.5))
    try:
        while "imported" not in start.marks:
            assert start.turn(0.1)
        time.sleep(1.0)
        turns = 0
        while start.turn(0.1):
            turns += 1
        assert turns >= 2, "the second that passed did not bring it further"
        assert start.seconds()["engine_s"] < start.ran
    finally:
        start.close()


def test_a_start_that_fails_says_why_and_leaves_no_process_behind(monkeypatch):
    made = []
    init = Start.__init__
    monkeypatch.setattr(Start, "__init__", lambda self, plan: (made.append(self), init(self, plan))[1])
    failing = StartPlan("ours", {}, program="raise SystemExit('no such adapter')")
    with pytest.raises(click.ClickException, match="arm ours did not start: no such adapter"):
        time_pair([plan("bare", imports=30), failing])
    assert [start._process.poll() is not None for start in made] == [True, True]


def test_a_start_without_an_engine_is_a_failure():
    with pytest.raises(click.ClickException, match="did not start"):
        time_pair([StartPlan("ours", {}, program="print('MARK imported')")])


def test_the_environment_of_an_arm_reaches_it():
    program = (
        "import os; assert os.environ['VLLM_PLUGINS'] == ''\nprint('MARK imported'); print('MARK engine')"
    )
    found = time_pair([StartPlan("bare", {}, {"VLLM_PLUGINS": ""}, program)])
    assert found["bare"]["whole_s"] > 0


def test_an_engine_of_the_options_given_is_what_starts(tmp_path):
    """The real program, on a stand-in for vLLM that is slow to import and writes down what it is made with."""
    made = tmp_path / "made.json"
    (tmp_path / "vllm.py").write_text(
        "import json, time\ntime.sleep(0.3)\n"
        f"def LLM(**options): time.sleep(0.3); open({str(made)!r}, 'w').write(json.dumps(options))\n"
    )
    options = {"model": "target", "speculative_config": {"method": "ppow"}}
    found = time_pair([StartPlan("ours", options, {"PYTHONPATH": str(tmp_path)})])["ours"]
    assert json.loads(made.read_text()) == options
    assert 0.25 < found["engine_s"] < found["whole_s"] - 0.25
