"""Where commands write: what cannot be written to is refused before a model is loaded, and asking leaves nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ppow_train import cli
from ppow_train.errors import UserError
from ppow_train.preflight import check_writable

TINY = Path(__file__).parents[2] / "examples" / "tiny"
PAIR = ["--target", "T", "--drafter", "D", "--prompts", "p"]
COMMANDS = {
    "train": ["train", *PAIR],
    "data": ["data", "--target", "T", "--prompts", "p"],
    "bench": ["bench", "--adapter", "A", "--prompts", "p"],
    "export": ["export", "--adapter", "A"],
    "compare": ["compare", *PAIR, "--held-out", "h"],
    "study": ["study", "plan.yaml"],
    "demo": ["demo", "--tiny", str(TINY)],
    "tiny build": ["tiny", "build"],
    "tiny costlier": ["tiny", "costlier", "--tiny", str(TINY)],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_below_a_file_nothing_can_be_written(command, tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text("")
    assert cli.run([*COMMANDS[command], "--output", str(tmp_path / "prompts.jsonl" / "out")]) == 1
    shown = capsys.readouterr()
    assert shown.err.startswith(f"Error: Nothing can be written to {tmp_path / 'prompts.jsonl'}")
    assert shown.err.endswith(" (Not a directory): name another place with --output.\n")
    assert shown.out == ""


def test_training_state_and_cache_are_asked_for_as_well(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for option in ("--checkpoints", "--cache"):
        given = [*COMMANDS["train"], "--output", str(tmp_path / "a"), option, str(tmp_path / "file" / "x")]
        assert cli.run(given) == 1
        assert f"(Not a directory): name another place with {option}." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("output", "why"), [(".", "cannot be replaced as a whole"), ("/", "is a mount point")]
)
def test_an_adapter_has_a_name(output, why, capsys):
    assert cli.run([*COMMANDS["train"], "--output", output]) == 1
    assert f"Error: {output} {why}: name a directory inside it." in capsys.readouterr().err


def test_it_is_told_before_torch_is_loaded(tmp_path):
    (tmp_path / "file").write_text("")
    code = (
        "import sys; from ppow_train.cli import run; code = run(sys.argv[1:]); assert 'torch' not in sys.modules; "
        "sys.exit(code)"
    )
    for arguments in COMMANDS.values():
        call = [sys.executable, "-c", code, *arguments, "--output", str(tmp_path / "file" / "x")]
        done = subprocess.run(call, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr


def test_asking_leaves_nothing(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())


def test_a_link_to_nowhere_is_no_directory(tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(UserError, match="No such file or directory"):
        check_writable(tmp_path / "link" / "x")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs Linux's /proc")
def test_a_place_in_which_the_system_makes_nothing():
    with pytest.raises(UserError, match=r"Nothing can be written to /proc/x \(No such file or directory\)"):
        check_writable(Path("/proc/x"))


@pytest.fixture
def adapter(tmp_path):
    """What looks like an adapter, with a cost profile beside it."""
    directory = tmp_path / "adapter"
    directory.mkdir()
    for name in ("ppow_config.json", "cost_profile.json"):
        (directory / name).write_text("{}")
    return directory


def test_an_adapter_is_replaced_only_where_that_is_asked_for(adapter, tmp_path, capsys):
    given = [*COMMANDS["train"], "--output", str(adapter)]
    assert cli.run(given) == 1
    assert "holds an adapter: name another --output, or add --overwrite" in capsys.readouterr().err
    for asked in (["--overwrite"], ["--resume"]):
        if asked == ["--resume"]:
            (tmp_path / "adapter.checkpoints").mkdir()
            (tmp_path / "adapter.checkpoints" / "run.json").write_text("{}")
        assert cli.run([*given, *asked]) == 1
        assert "Prompts p cannot be read" in capsys.readouterr().err, "what comes next is asked"
    (tmp_path / "adapter.checkpoints" / "run.json").unlink()
    assert cli.run([*given, "--resume"]) == 1
    assert "holds an adapter" in capsys.readouterr().err, "nothing is resumed: a new run would replace it"


@pytest.mark.parametrize("state", ["out", "out/state", "."])
def test_training_state_and_adapter_lie_apart(state, tmp_path, capsys):
    """One would be replaced, or deleted, with the other."""
    given = [*COMMANDS["train"], "--output", str(tmp_path / "out"), "--checkpoints", str(tmp_path / state)]
    assert cli.run(given) == 1
    assert "must lie apart" in capsys.readouterr().err


def test_training_state_deletes_nobodys_readme(tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "windows.jsonl").write_text("")  # of a killed run that kept no state
    from ppow_train.checkpoints import check_unfinished, open_run

    check_unfinished(tmp_path / "state", resume=False, keeps=True)
    (tmp_path / "state" / "README.md").write_text("mine")
    with pytest.raises(UserError, match=r"holds a README.md, which the run would replace and delete"):
        check_unfinished(tmp_path / "state", resume=False, keeps=True)
    with pytest.raises(UserError, match=r"holds a README.md"), open_run(tmp_path / "state", {}, resume=True):
        raise AssertionError("it was opened")
    assert (tmp_path / "state" / "README.md").read_text() == "mine"
