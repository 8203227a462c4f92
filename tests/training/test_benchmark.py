"""What the benchmark concludes from its runs, and what the demo refuses; engines are stood in for."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
import types

import click
import pytest
import torch
from rich.console import Console

from ppow_train.benchmark import ArmResult, Work, _compare_all, run_benchmark, sum_counts
from ppow_train.commands.demo import _judge
from ppow_train.identity import Comparison
from ppow_train.report import as_json, print_table, write_json, write_plot
from ppow_train.serving_eval import (
    ADAPTER,
    ADAPTIVE,
    BASE,
    NONE,
    Engine,
    EngineOptions,
    Run,
    clearness,
    gpu_share,
    start_engine,
)
from ppow_train.step_times import timed_steps
from vllm_ppow.compat.capabilities import V2_RUNNER
from vllm_ppow.metrics import SpecDecodeCounts

COUNTS = SpecDecodeCounts(10, 40, 20, (9, 6, 4, 1))
ERRORS = Comparison(4, 3, 0, ("prompt 0 parts at token 2, decided by 9.000 nats",))


def arm(
    name: str, temperature: float, counts: SpecDecodeCounts | None = COUNTS, identical: bool | None = True
) -> ArmResult:
    return ArmResult(
        name,
        temperature,
        counts,
        100,
        [1.5, 1.0, 2.0],
        [1.1, 1.0, 1.2],
        Comparison(4, 4, 0, ()) if identical and temperature == 0 else ERRORS if temperature == 0 else None,
    )


def table(adapter_counts=COUNTS, identical=True) -> list[ArmResult]:
    return [
        result
        for t in (0.0, 1.0)
        for result in (arm(NONE, t, None), arm(BASE, t), arm(ADAPTER, t, adapter_counts, identical))
    ]


def test_demo_fails_when_greedy_output_differs():
    with pytest.raises(click.ClickException, match="differs from no speculation"):
        _judge(table(SpecDecodeCounts(9, 36, 22, (9, 7, 5, 1)), identical=False))


def test_demo_takes_a_tie_on_a_gpu_only(monkeypatch):
    tied = [
        arm(NONE, 0.0, None),
        arm(BASE, 0.0),
        arm(ADAPTER, 0.0, SpecDecodeCounts(9, 36, 22, (9, 7, 5, 1))),
    ]
    tied[2] = dataclasses.replace(tied[2], greedy=Comparison(4, 3, 1, ()))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    _judge(tied)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(click.ClickException, match="differs from no speculation"):
        _judge(tied)


def test_demo_fails_when_the_adapter_changed_nothing():
    with pytest.raises(click.ClickException, match="adapter was not applied"):
        _judge(table())


def test_demo_passes_an_adapter_that_changed_the_counts():
    _judge(table(SpecDecodeCounts(9, 36, 22, (9, 7, 5, 1))))


def test_counts_add_up_by_position():
    total = sum_counts([COUNTS, SpecDecodeCounts(1, 4, 2, (1, 1, 0, 0))])
    assert total == SpecDecodeCounts(11, 44, 22, (10, 7, 4, 1))


def test_json_has_what_people_read():
    row = as_json(table(), {"demo": "x"})["arms"][1]
    assert row["acceptance_length"] == pytest.approx(3.0)
    assert row["acceptance_per_position"] == pytest.approx([0.9, 0.6, 0.4, 0.1])
    assert row["speed_ratio"] == {"median": 1.5, "min": 1.0, "max": 2.0}


def test_files_are_written_whole(tmp_path):
    write_json(tmp_path / "a" / "b.json", {"x": 1})
    with (tmp_path / "a" / "b.json").open() as reader:
        write_json(tmp_path / "a" / "b.json", {"x": 2})
        assert json.load(reader) == {"x": 1}, "who reads meanwhile sees the old one whole"
    (tmp_path / "a" / "b.png").write_bytes(b"old")
    with (tmp_path / "a" / "b.png").open("rb") as reader:
        write_plot(tmp_path / "a" / "b.png", table(), "title")
        assert reader.read() == b"old"
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["b.json", "b.png"]


class FakeEngine:
    """Answers like an engine; the adapter's arms change a token if told to. Counts how many are up."""

    different = False
    tie = False
    up = 0
    most_up = 0

    def __init__(self, name, options, spec):
        self.name, self.spec, self.options = name, spec, options

    def __enter__(self):
        FakeEngine.up += 1
        FakeEngine.most_up = max(FakeEngine.up, FakeEngine.most_up)
        assert FakeEngine.up <= self.options.neighbours + 1
        assert self.options.sampled_drafts  # as the adapter's: every arm must know
        return self

    def __exit__(self, *exc_info):
        FakeEngine.up -= 1

    def wait_until_ready(self):
        return None

    def run(self, prompts, *, max_tokens, temperature, with_gaps=False):
        token = 7 if self.different and self.name in (ADAPTER, ADAPTIVE) else 3
        return Run(
            [[token] * max_tokens for _ in prompts],
            2.0 if self.spec is None else 1.0,
            self.spec and COUNTS,
            [[0.001 if self.tie else 5.0] * max_tokens for _ in prompts] if with_gaps else None,
        )


def benchmark(monkeypatch, *, side_by_side=True, different=False, tie=False):
    """Results of stand-in engines by arm."""
    monkeypatch.setattr("ppow_train.benchmark.Engine", FakeEngine)
    for name, value in {"different": different, "tie": tie, "up": 0, "most_up": 0}.items():
        monkeypatch.setattr(FakeEngine, name, value)
    config = types.SimpleNamespace(drafter_type="eagle3", draft_sample_method="probabilistic")
    adapter = types.SimpleNamespace(config=config, directory="a")
    results = run_benchmark(
        adapter,
        "base",
        EngineOptions("t"),
        Work([[1, 2]], max_tokens=5, temperatures=[0.0], rounds=3),
        num_speculative_tokens=4,
        side_by_side=side_by_side,
    )
    return {result.arm: result for result in results}


@pytest.mark.parametrize("side_by_side", [True, False])
@pytest.mark.parametrize("different", [False, True])
def test_identity_and_ratios_are_against_no_speculation(monkeypatch, different, side_by_side):
    by_arm = benchmark(monkeypatch, different=different, side_by_side=side_by_side)
    assert by_arm[NONE].speed_ratios == [1.0] * 3
    assert by_arm[BASE].speed_ratios == [2.0] * 3
    assert by_arm[NONE].speed_over_base == [0.5] * 3
    assert by_arm[ADAPTER].speed_over_base == [1.0] * 3
    assert by_arm[BASE].counts.num_drafts == 30
    assert not by_arm[BASE].changes_output
    for arm_name in (ADAPTER, ADAPTIVE):
        assert by_arm[arm_name].changes_output is different
        assert by_arm[arm_name].as_json()["greedy_output_identical"] is not different
    assert FakeEngine.most_up == (4 if side_by_side else 1)


def test_a_tie_of_the_target_is_no_change_and_is_told(monkeypatch, capsys):
    """Only where it is an exception: a drafter whose every text differs is refused, ties or not."""
    by_arm = benchmark(monkeypatch, different=True, tie=True)
    assert by_arm[ADAPTER].changes_output  # one prompt of one
    rare = ArmResult(ADAPTER, 0.0, COUNTS, 100, [1.0], [1.0], Comparison(8, 7, 1, ()))
    assert not rare.changes_output
    assert rare.as_json()["greedy_output_identical"] is False
    print_table([rare], "title", Console(width=130))
    assert "1 ties" in capsys.readouterr().out


def test_what_is_a_tie_is_told_by_the_engine_in_its_own_dtype(monkeypatch):
    """Raw logits of the engine without speculation; "auto" says nothing of the dtype."""
    entries = [[{1: types.SimpleNamespace(logprob=40.25), 2: types.SimpleNamespace(logprob=40.0)}]]
    for dtype, limit in ((torch.bfloat16, 0.5), (torch.float32, 0.05)):
        config = types.SimpleNamespace(model_config=types.SimpleNamespace(dtype=dtype))
        llm = types.SimpleNamespace(llm_engine=types.SimpleNamespace(vllm_config=config))
        assert clearness(llm, entries) == ([[0.25]], [[limit]])
    reference = Run([[1]] * 4, 1.0, None, [[0.25]] * 4, [[0.5]] * 4)
    found = _compare_all(reference, [Run([[2], [1], [1], [1]], 1.0, None)] * 2)
    assert (found.prompts, found.ties, found.holds) == (8, 2, True)

    monkeypatch.setattr("ppow_train.serving_eval.gpu_share", lambda *_: None)
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(LLM=lambda target, **given: given))
    options = dataclasses.asdict(EngineOptions("t"))
    assert start_engine(options, None)["logprobs_mode"] == "raw_logits"
    assert "logprobs_mode" not in start_engine(options, {"method": "ppow"})

    monkeypatch.setattr("ppow_train.serving_eval.gpu_share", lambda *_: 0.4)
    more = dataclasses.asdict(EngineOptions("t", more={"quantization": "fp8"}))
    started = start_engine(more, None)
    assert (started["gpu_memory_utilization"], started["quantization"]) == (0.4, "fp8")
    more["more"]["gpu_memory_utilization"] = 0.7
    assert start_engine(more, None)["gpu_memory_utilization"] == 0.7, "what the user says"


@pytest.mark.parametrize(
    ("sampled", "needed", "given", "found"),
    [
        (True, True, None, "0"),
        (True, True, "1", "1"),  # the user's own: method ppow says what is wrong with it
        (True, False, None, None),
        (False, True, None, None),
    ],
)
def test_arms_run_on_the_v1_runner_where_sampled_drafts_need_it(monkeypatch, sampled, needed, given, found):
    monkeypatch.setenv(V2_RUNNER, given or "")  # so that what is left is undone
    if given is None:
        del os.environ[V2_RUNNER]
    monkeypatch.setattr("ppow_train.serving_eval.gpu_share", lambda *_: None)
    monkeypatch.setattr("ppow_train.serving_eval.sampled_drafts_need_v1", lambda: needed)
    seen = []
    llm = types.SimpleNamespace(LLM=lambda target, **given: seen.append(os.environ.get(V2_RUNNER)))
    monkeypatch.setitem(sys.modules, "vllm", llm)
    start_engine(dataclasses.asdict(EngineOptions("t", sampled_drafts=sampled)), None)
    assert seen == [found]


def test_an_arm_that_drafted_nothing_is_shown_and_its_json_is_json(capsys):
    idle = ArmResult(ADAPTIVE, 1.0, SpecDecodeCounts(0, 0, 0, ()), 100, [1.0], [1.0], None)
    row = json.loads(json.dumps(idle.as_json(), allow_nan=False))
    assert row["num_drafts"] == 0
    assert "accepted_per_draft" not in row
    print_table([idle], "title", Console(width=130))
    assert ADAPTIVE in capsys.readouterr().out


def test_engines_on_a_gpu_claim_what_is_free_and_leave_room_for_their_neighbours(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_share(1, 0) is None
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    free = {0: 76, 1: 40}
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda gpu: (free[gpu], 80))
    assert gpu_share(1, 0) == pytest.approx(0.9)
    assert gpu_share(2, 0) == pytest.approx(0.95 * 40 / 80)
    assert gpu_share(1, 3) == pytest.approx(0.9 / 4)


def test_an_engine_that_cannot_start_says_why():
    from ppow_train.errors import UserError

    with (
        Engine("adapter", EngineOptions("/nowhere/at/all"), None) as engine,
        pytest.raises(UserError, match="nowhere"),
    ):
        engine.wait_until_ready()


def test_every_step_of_a_pass_is_timed():
    class LLMEngine:
        def step(self):
            time.sleep(0.001)
            return []

    engine = LLMEngine()
    with timed_steps(engine) as seconds:
        assert engine.step() == engine.step() == []
    engine.step()
    assert len(seconds) == 2
    assert min(seconds) >= 0.001
