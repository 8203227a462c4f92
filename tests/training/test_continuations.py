"""Several continuations of every training prompt: what is drawn, what is stored, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from interrupted_writer import FACTS, PROMPTS, Continuer
from training_pair import K

from ppow_train.cli import run
from ppow_train.commands import training_run
from ppow_train.config import PPOWConfig
from ppow_train.data import collate
from ppow_train.generation import Round, continuation_rounds
from ppow_train.study.plan import Cell, Plan
from ppow_train.study.run import CellBench
from ppow_train.trajectory_store import fill, is_held_out, open_store, read_manifest, read_records
from ppow_train.types import Trajectories

TEXTS = [f"windows of draft {n}" for n in range(12)]
TIMES = 3


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": text}) for text in TEXTS), encoding="utf-8")
    return path


# ---------------------------------------------------------------- what is drawn


def test_the_first_round_is_what_a_single_one_was():
    assert continuation_rounds(5, 1.0, 1, 0.7) == (Round(5, 1.0),)
    rounds = continuation_rounds(5, 1.0, 4, 0.7)
    assert rounds[0] == Round(5, 1.0)
    assert {drawn.temperature for drawn in rounds} == {1.0}
    assert len({drawn.seed for drawn in rounds}) == 4
    assert continuation_rounds(5, 1.0, 6, 0.7)[:4] == rounds, "more of them later cost only what is new"


def test_after_a_greedy_one_the_others_are_sampled():
    assert [drawn.temperature for drawn in continuation_rounds(5, 0.0, 3, 0.7)] == [0.0, 0.7, 0.7]


def test_parts_of_other_lengths_join():
    short, long = collate([[1]], [[2, 3]]), collate([[4, 5], [6]], [[7, 8, 9], [1]])
    joined = Trajectories.join([short, long])
    assert joined.same_as(collate([[1], [4, 5], [6]], [[2, 3], [7, 8, 9], [1]]))


def test_a_run_knows_how_often_it_reads_a_token(tmp_path):
    config = PPOWConfig(output_dir=str(tmp_path), use_cpu=True, max_steps=10, windows_per_step=128)
    assert config.passes(1024, 10) == 10 * 128 * 8 / 1024
    assert config.passes(1024, 5) == config.passes(1024, 10) / 2, "one that stopped early read less"
    drafted = PPOWConfig(output_dir=str(tmp_path), use_cpu=True, max_steps=10, objective="ppow")
    assert drafted.passes(1024, 10) == 10 * 128 / 8 * 8 / 1024, "its windows of one start are one"


# ---------------------------------------------------------------- the directory of `ppow data`


def write(directory: Path, stop_after: int | None = None) -> tuple[Continuer, Continuer]:
    """Two rounds, the second of ten prompts; interrupted when `stop_after` shards are there."""
    first, second = Continuer(), Continuer()
    with open_store(directory, FACTS, len(PROMPTS) + 10) as store:
        rounds = [(PROMPTS, first), (PROMPTS[:10], second)]
        if stop_after is None:
            fill(store, rounds)
            return first, second
        add = store.add

        def counted(*records: Any) -> None:
            if len(store.manifest.shards) == stop_after:
                raise KeyboardInterrupt
            add(*records)

        store.add = counted  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            fill(store, rounds)
    return first, second


def test_no_shard_holds_records_of_two_rounds(tmp_path):
    first, second = write(tmp_path / "whole")
    assert (first.calls, second.calls) == (8, 2)
    manifest = read_manifest(tmp_path / "whole")
    assert [shard.records for shard in manifest.shards] == [8] * 7 + [5] + [8, 2]
    stored, continuations = read_records(tmp_path / "whole", held_out=False)
    trained = [ids for ids in PROMPTS if not is_held_out(ids, FACTS["held_out_share"])]
    again = [ids for ids in PROMPTS[:10] if not is_held_out(ids, FACTS["held_out_share"])]
    assert stored == trained + again
    assert continuations[: len(again)] != continuations[len(trained) :], "each shard has a seed of its own"


@pytest.mark.parametrize("stop_after", [3, 7, 8, 9])
def test_stopped_in_any_round_it_goes_on(stop_after, tmp_path):
    write(tmp_path / "whole")
    write(tmp_path / "stopped", stop_after)
    first, second = write(tmp_path / "stopped")
    assert first.calls == max(0, 8 - stop_after)
    assert second.calls == 10 - max(8, stop_after)
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "stopped" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_prompts_to_train_on_are_continued_again(temperature, directories, prompts, tmp_path, capsys):
    out = tmp_path / "set"
    command = ["data", "--target", str(directories.target), "--prompts", str(prompts), "--output", str(out)]
    command += ["--max-new-tokens", "24", "--held-out-share", "0.3", "--shard-size", "5", "--json"]
    command += ["--temperature", str(temperature), "--continuations", str(TIMES)]
    assert run(command) == 0
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    assert 0 < result["held_out"] < len(TEXTS)
    assert result["train"] == TIMES * (len(TEXTS) - result["held_out"])
    assert f"continued {TIMES} times" in shown.err
    assert result["facts"]["further_temperature"] == (temperature or 0.7)
    stored, continuations = read_records(out, held_out=False)
    number = len(stored) // TIMES
    assert stored == stored[:number] * TIMES, "round by round, in the same order"
    for prompt in range(number):
        drawn = {tuple(continuations[round_ * number + prompt]) for round_ in range(TIMES)}
        assert len(drawn) == TIMES, "sampled anew"
    if temperature == 0.0:
        alone = [*command[:-1], "1", "--limit", str(len(TEXTS))]
        alone[alone.index(str(out))] = str(tmp_path / "alone")
        assert run(alone) == 0
        assert read_records(tmp_path / "alone", held_out=False)[1] == continuations[:number]
    capsys.readouterr()
    assert run([*command[:-1], "4"]) == 1
    assert "continuations 3 (now 4)" in capsys.readouterr().err


# ---------------------------------------------------------------- training on them


def test_train_continues_prompts_again_and_reuses_what_is_there(directories, prompts, tmp_path, capsys):
    train = ["train", "--target", str(directories.target), "--drafter", str(directories.drafter["causal_lm"])]
    train += ["--prompts", str(prompts), "--max-new-tokens", "24", "--cache", str(tmp_path / "cache")]
    train += ["--num-speculative-tokens", str(K), "--device", "cpu", "--max-steps", "60", "--json"]
    train += ["--trajectories-per-step", "4", "--windows-per-step", "8"]

    def trained(continuations: int) -> tuple[dict[str, Any], str]:
        output = tmp_path / f"adapter-{continuations}"
        assert run([*train, "--output", str(output), "--continuations", str(continuations)]) == 0
        shown = capsys.readouterr()
        return json.loads(shown.out)["training"], shown.err

    facts, said = trained(1)
    assert facts["passes"] > 5
    assert "Warning: beyond about 5 times texts are learned by heart" in said
    assert len(list((tmp_path / "cache").iterdir())) == 1
    more, said = trained(16)
    assert more["options"]["continuations"] == 16
    assert more["tokens"] > 8 * facts["tokens"]
    assert more["passes"] < 1
    assert "would read them all" in said
    assert "by heart" not in said
    assert len(list((tmp_path / "cache").iterdir())) == 16, "the first one is the same set"


@pytest.mark.parametrize(
    ("passes", "advice"),
    [
        (320.0, "give more prompts, --continuations 64, or a"),
        (321.0, "give more prompts, or a lower --max-steps."),
    ],
)
def test_no_more_continuations_are_advised_than_would_help(passes, advice, capsys):
    config = SimpleNamespace(passes=lambda tokens, updates: passes, continuations=1, max_steps=10)
    training_run._tell_passes(config, collate([[1]], [[2, 3]]))
    assert advice in capsys.readouterr().err


def test_continuations_of_a_stored_set_are_recorded_not_asked_for(directories, prompts, tmp_path, capsys):
    data = ["data", "--target", str(directories.target), "--prompts", str(prompts), "--max-new-tokens", "24"]
    assert run([*data, "--continuations", str(TIMES), "--output", str(tmp_path / "set")]) == 0
    train = ["train", "--target", str(directories.target), "--drafter", str(directories.drafter["causal_lm"])]
    train += ["--data", str(tmp_path / "set"), "--output", str(tmp_path / "adapter"), "--no-parity", "--json"]
    train += ["--num-speculative-tokens", str(K), "--device", "cpu", "--max-steps", "1"]
    train += ["--trajectories-per-step", "4", "--windows-per-step", "8"]
    capsys.readouterr()
    assert run(train) == 0
    assert json.loads(capsys.readouterr().out)["training"]["options"]["continuations"] == TIMES
    assert run([*train, "--overwrite", "--continuations", "2"]) == 2
    assert "settled by `ppow data`" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ["--greedy-sampling-temperature", "0.5", "--continuations", "2"],
        ["--greedy-sampling-temperature", "0.5", "--temperature", "0"],
    ],
)
def test_a_temperature_without_effect_is_refused(options, prompts, tmp_path, capsys):
    command = ["data", "--target", "t", "--prompts", str(prompts), "--output", str(tmp_path / "set")]
    assert run([*command, *options]) == 2
    assert "--greedy-sampling-temperature has no effect" in capsys.readouterr().err


def test_a_study_trains_on_them(directories, prompts, tmp_path):
    place = Cell("here", str(directories.drafter["eagle3"]), str(prompts), str(prompts), 0.0)
    options = {"num_speculative_tokens": K, "trajectories_per_step": 2, "windows_per_step": 4}
    arms = {"one": {"objective": "cst:tv"}, "many": {"objective": "cst:tv", "continuations": TIMES}}
    plan = Plan(str(directories.target), (place,), arms, "one", (0,), (1e-3,), 2, (1,), options, 24, 8)
    bench = CellBench(plan, place, tmp_path / "cache")
    one = bench.training(bench.config("one", tmp_path, seed=3, max_steps=1).continuation_rounds())
    many = bench.training(bench.config("many", tmp_path, seed=3, max_steps=1).continuation_rounds())
    assert len(one) < len(many) <= TIMES * (len(TEXTS) - plan.tuning_prompts)
    same, alone = (trajectories.select(torch.arange(len(one))) for trajectories in (many, one))
    assert same.lengths.equal(alone.lengths)
    assert same.input_ids.equal(alone.input_ids)


def test_further_continuations_at_another_temperature_are_refused(directories, prompts, tmp_path, capsys):
    data = ["data", "--target", str(directories.target), "--prompts", str(prompts), "--max-new-tokens", "24"]
    data += ["--temperature", "0", "--continuations", "2", "--greedy-sampling-temperature", "1.5"]
    assert run([*data, "--output", str(tmp_path / "set")]) == 0
    train = ["train", "--target", str(directories.target), "--drafter", str(directories.drafter["causal_lm"])]
    train += ["--data", str(tmp_path / "set"), "--output", str(tmp_path / "adapter"), "--device", "cpu"]
    train += ["--serving-temperature", "0", "--num-speculative-tokens", str(K), "--estimate"]
    capsys.readouterr()
    assert run(train) == 1
    assert "give --greedy-sampling-temperature 1.5" in capsys.readouterr().err
    assert run([*train, "--greedy-sampling-temperature", "1.5"]) == 0
