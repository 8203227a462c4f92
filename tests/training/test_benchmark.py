"""What the benchmark concludes from its runs, and what the demo refuses; engines are stood in for."""

from __future__ import annotations

import click
import pytest

from ppow_train.benchmark import ArmResult, run_benchmark, sum_counts
from ppow_train.commands.demo import _judge
from ppow_train.report import as_json, write_json, write_plot
from ppow_train.serving_eval import ADAPTER, BASE, NONE, Engine, EngineOptions, Run
from vllm_ppow.metrics import SpecDecodeCounts

COUNTS = SpecDecodeCounts(10, 40, 20, (9, 6, 4, 1))


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
        identical if temperature == 0 else None,
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
    write_plot(tmp_path / "a" / "b.png", table(), "title")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["b.json", "b.png"]


class FakeEngine:
    """Answers like an engine; the adapter's arm changes a token if told to."""

    different = False

    def __init__(self, name, options, spec):
        self.name, self.spec = name, spec

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        return None

    def wait_until_ready(self):
        return None

    def run(self, prompts, *, max_tokens, temperature):
        token = 7 if self.different and self.name == ADAPTER else 3
        return Run(
            [[token] * max_tokens for _ in prompts], 2.0 if self.spec is None else 1.0, self.spec and COUNTS
        )


@pytest.mark.parametrize("different", [False, True])
def test_identity_and_ratios_are_against_no_speculation(monkeypatch, different):
    import types

    monkeypatch.setattr("ppow_train.benchmark.Engine", FakeEngine)
    monkeypatch.setattr(FakeEngine, "different", different)
    config = types.SimpleNamespace(drafter_type="eagle3", draft_sample_method="probabilistic")
    adapter = types.SimpleNamespace(config=config, directory="a")
    results = run_benchmark(
        adapter,
        "base",
        [[1, 2]],
        EngineOptions("t"),
        num_speculative_tokens=4,
        max_tokens=5,
        temperatures=[0.0],
        rounds=3,
    )
    by_arm = {result.arm: result for result in results}
    assert by_arm[NONE].speed_ratios == [1.0] * 3
    assert by_arm[BASE].speed_ratios == [2.0] * 3
    assert by_arm[NONE].speed_over_base == [0.5] * 3
    assert by_arm[ADAPTER].speed_over_base == [1.0] * 3
    assert by_arm[BASE].counts.num_drafts == 30
    assert by_arm[BASE].identical is True
    assert by_arm[ADAPTER].identical is not different


def test_an_engine_that_cannot_start_says_why():
    from ppow_train.errors import UserError

    with (
        Engine("adapter", EngineOptions("/nowhere/at/all"), None) as engine,
        pytest.raises(UserError, match="nowhere"),
    ):
        engine.wait_until_ready()
