"""`ppow train`: what wins over what, what is kept apart, what is said before anything is trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from serving_profile import PROFILE
from training_pair import K, sliding_copy

from ppow_train import cli
from ppow_train.generation import Round, load_tokenizer
from ppow_train.trajectory_store import derive_seed
from vllm_ppow.cost_profile import write_cost_profile

TEXTS = [f"windows of draft {n}" for n in range(8)]


def jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("\n".join(json.dumps({"prompt": text}) for text in texts), encoding="utf-8")
    return path


@pytest.fixture
def command(directories, tmp_path, monkeypatch) -> list[str]:
    """Trains one update on TEXTS; whether so little gains anything is not asked here."""
    monkeypatch.setattr("ppow_train.training.held_out_facts", lambda *args: {})
    train = ["train", "--target", str(directories.target), "--drafter", str(directories.drafter["causal_lm"])]
    train += [
        "--prompts",
        str(jsonl(tmp_path / "prompts.jsonl", TEXTS)),
        "--output",
        str(tmp_path / "adapter"),
    ]
    train += ["--max-new-tokens", "16", "--cache", str(tmp_path / "cache"), "--device", "cpu", "--no-parity"]
    train += ["--num-speculative-tokens", str(K), "--max-steps", "1", "--trajectories-per-step", "2"]
    return [*train, "--windows-per-step", "4", "--json"]


@pytest.fixture
def continued(monkeypatch) -> list[tuple[str, list[str], tuple[Round, ...], int]]:
    """What the target was asked to continue: name of the file, texts, rounds, tokens."""
    from ppow_train import training

    own, asked = training.get_trajectories, []

    def get(pair: Any, file: Path, *, texts: list[str], rounds: Any, max_new_tokens: int, **more: Any) -> Any:
        asked.append((file.name, texts, tuple(rounds), max_new_tokens))
        return own(pair, file, texts=texts, rounds=rounds, max_new_tokens=max_new_tokens, **more)

    monkeypatch.setattr(training, "get_trajectories", get)
    return asked


# ---------------------------------------------------------------- what is refused before anything is continued


def test_an_occupied_output(command, continued, tmp_path, capsys):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "thesis.txt").write_text("precious")
    assert cli.run(command) == 1
    assert "exists and is not a PPOW adapter" in capsys.readouterr().err
    assert not continued


@pytest.fixture
def unfinished(tmp_path) -> Path:
    """Training state of a run that was killed, and the log of its windows."""
    state = tmp_path / "adapter.checkpoints"
    state.mkdir()
    (state / "run.json").write_text("{}")
    (state / "windows.jsonl").write_text("lines")
    return state


@pytest.mark.parametrize("keeps", ["no", "steps"])
def test_an_unfinished_run(command, continued, unfinished, capsys, keeps):
    assert cli.run([*command, "--save-strategy", keeps]) == 1
    assert "holds an unfinished run: add --resume" in capsys.readouterr().err
    assert not continued
    assert (unfinished / "windows.jsonl").read_text() == "lines"


def test_resuming_what_keeps_no_state(command, continued, unfinished, capsys):
    assert cli.run([*command, "--save-strategy", "no", "--resume"]) == 1
    assert "--resume needs training state, and --save-strategy no keeps none" in capsys.readouterr().err
    assert not continued
    assert (unfinished / "windows.jsonl").read_text() == "lines"


# ---------------------------------------------------------------- what is held out is not trained on


def test_prompts_that_are_held_out_are_not_trained_on(command, continued, tmp_path, capsys):
    held_out = jsonl(tmp_path / "held_out.jsonl", [TEXTS[3], "of", TEXTS[5]])
    assert cli.run([*command, "--held-out", str(held_out)]) == 0
    shown = capsys.readouterr()
    assert "2 of 8 prompts are held out too: they are not trained on." in shown.err
    (_, trained, _, _), (_, measured, _, _) = continued
    assert trained == [text for number, text in enumerate(TEXTS) if number not in (3, 5)]
    assert measured == [TEXTS[3], "of", TEXTS[5]]
    assert json.loads(shown.out)["training"]["trajectories"] <= 6


def test_chats_are_trained_on_and_held_out_by_what_the_target_sees(
    command, continued, tmp_path, capsys, directories
):
    target = shutil.copytree(directories.target, tmp_path / "target")
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (target / "chat_template.jinja").write_text(template, encoding="utf-8")
    command[command.index("--target") + 1] = str(target)
    chats = [
        {"messages": [{"role": "user", "content": text}]} for text in ("windows of", TEXTS[3], "many drafts")
    ]
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("\n".join(map(json.dumps, chats)), encoding="utf-8")
    assert cli.run([*command, "--held-out", str(held_out)]) == 0
    assert "1 of 8 prompts are held out too" in capsys.readouterr().err
    (_, trained, _, _), (_, measured, _, _) = continued
    assert TEXTS[3] not in trained
    tokenizer = load_tokenizer(target)
    assert [tokenizer.decode(ids) for ids in measured] == ["windows of", TEXTS[3], "many drafts"]


def test_nothing_is_said_or_dropped_without_an_overlap(command, continued, tmp_path, capsys):
    assert cli.run([*command, "--held-out", str(jsonl(tmp_path / "held_out.jsonl", ["of", "draft"]))]) == 0
    assert "held out too" not in capsys.readouterr().err
    assert continued[0][1] == TEXTS


def test_nothing_left_to_train_on(command, continued, tmp_path, capsys):
    held_out = jsonl(tmp_path / "held_out.jsonl", TEXTS[::-1])
    assert cli.run([*command, "--held-out", str(held_out)]) == 1
    assert "All 8 prompts" in capsys.readouterr().err
    assert not continued


def test_a_held_out_prompt_that_is_too_long_is_told_before_any_is_continued(
    command, continued, tmp_path, capsys
):
    """With K tokens more than a trained one: 16 + 4 + 109 is one more than the target's 128."""
    from ppow_train.generation import load_tokenizer
    from ppow_train.prompts import text_ids

    tokenizer = load_tokenizer(Path(command[2]))
    text = "windows"
    while len(text_ids([text + "~"], tokenizer)[0]) <= 109:
        text += "~"
    assert len(text_ids([text], tokenizer)[0]) == 109
    held_out = jsonl(tmp_path / "held_out.jsonl", ["of", text])
    assert cli.run([*command, "--held-out", str(held_out)]) == 1
    assert "need 129 tokens" in capsys.readouterr().err
    assert not continued


def test_drafting_beyond_sliding_attention_is_told_before_any_is_continued(
    command, continued, tmp_path, capsys
):
    """Of the target or of the drafter; what reads along the path trains."""
    for option in ("--target", "--drafter"):
        at = command.index(option) + 1
        sliding = str(sliding_copy(Path(command[at]), tmp_path / f"sliding{option}", span=12))
        changed = [*command[:at], sliding, *command[at + 1 :]]
        assert cli.run([*changed, "--objective", "ppow", "--num-generations", "2"]) == 1
        error = capsys.readouterr().err
        assert "attend to 12 tokens" in error
        assert "take another objective" in error
        assert not continued
        assert cli.run([*changed, "--output", str(tmp_path / f"adapter{option}")]) == 0
        continued.clear()


# ---------------------------------------------------------------- flag, file, default


@pytest.mark.parametrize(
    ("file", "flags", "seed"),
    [
        ("", [], 0),
        ("seed: 5", [], 5),
        ("", ["--seed", "7"], 7),
        ("seed: 5", ["--seed", "7"], 7),
        ("seed: 5", ["--seed", "0"], 0),
    ],
)
def test_the_seed_of_a_run_is_the_flags_then_the_files(
    file, flags, seed, command, continued, tmp_path, capsys
):
    """The held-out continuations follow it."""
    (tmp_path / "run.yaml").write_text(f"continuations: 2\n{file}\n", encoding="utf-8")
    held_out = jsonl(tmp_path / "held_out.jsonl", ["of", "draft"])
    call = [*command, "--held-out", str(held_out), "--config", str(tmp_path / "run.yaml"), *flags]
    assert cli.run(call) == 0
    (_, _, trained, _), (_, _, measured, _) = continued
    assert trained == (Round(seed, 1.0), Round(derive_seed(seed, 1), 1.0))
    assert measured == (Round(seed + 1, 1.0),)
    assert json.loads(capsys.readouterr().out)["training"]["seed"] == seed


@pytest.mark.parametrize(
    ("line", "remedy"), [("output_dir: x", "--checkpoints"), ("use_cpu: true", "--device")]
)
def test_what_the_command_decides_is_refused_in_a_file(line, remedy, command, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(line, encoding="utf-8")
    assert cli.run([*command, "--config", str(tmp_path / "run.yaml")]) == 1
    shown = capsys.readouterr().err
    assert f"run.yaml sets '{line.split(':')[0]}'" in shown
    assert remedy in shown


# ---------------------------------------------------------------- lists by flag


def values_of(call: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The training options that a call comes to."""
    requests: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "ppow_train.commands.training_run.estimate", lambda request: requests.append(request.values)
    )
    assert cli.run([*call, "--estimate"]) == 0
    [values] = requests
    return values


@pytest.mark.parametrize(
    ("given", "names"),
    [("none", ["none"]), ("tensorboard", ["tensorboard"]), ("tensorboard, wandb", ["tensorboard", "wandb"])],
)
def test_lists_are_given_with_commas(given, names, command, tmp_path, monkeypatch):
    (tmp_path / "run.yaml").write_text("report_to: [mlflow]\nlora_targets: [o_proj]\n", encoding="utf-8")
    call = [*command, "--config", str(tmp_path / "run.yaml")]
    assert values_of(call, monkeypatch)["report_to"] == ["mlflow"]
    values = values_of([*call, "--report-to", given, "--lora-targets", "q_proj,v_proj"], monkeypatch)
    assert values["report_to"] == names
    assert values["lora_targets"] == ["q_proj", "v_proj"]


def test_lists_by_flag_are_trained_with(command, tmp_path, capsys):
    assert cli.run([*command, "--report-to", "none", "--lora-targets", "q_proj,v_proj"]) == 0
    options = json.loads(capsys.readouterr().out)["training"]["options"]
    assert options["lora_targets"] == ["q_proj", "v_proj"]
    assert cli.run([*command, "--overwrite", "--report-to", "nowhere"]) == 1
    assert "report_to must name none, all, or some of" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["", "q_proj,", ",", "q_proj,,v_proj"])
def test_lists_with_holes_are_refused(given, command, capsys):
    assert cli.run([*command, "--lora-targets", given]) == 2
    assert "separated by commas" in capsys.readouterr().err


# ---------------------------------------------------------------- options that change nothing


def test_a_measured_cost_that_nothing_uses_is_said(command, tmp_path, monkeypatch, capsys):
    file = write_cost_profile(tmp_path, PROFILE)
    values = values_of([*command, "--cost-profile", str(file)], monkeypatch)
    assert values["draft_cost_ratio"] == pytest.approx(PROFILE.draft_cost_ratio())
    assert "draft_cost_ratio is not used by objective cst:jsd.\n" in capsys.readouterr().err
    values_of([*command, "--cost-profile", str(file), "--objective", "overlap"], monkeypatch)
    assert "not used" not in capsys.readouterr().err
    values_of([*command, "--beta", "0.1", "--ppow-credit", "published"], monkeypatch)
    assert "beta, ppow_credit are not used by objective cst:jsd.\n" in capsys.readouterr().err
