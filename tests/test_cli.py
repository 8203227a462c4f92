"""The command `ppow`: every subcommand answers `--help`, and errors reach the user as one sentence.

Left out: what the subcommands do (tests of their own).
"""

from __future__ import annotations

import dataclasses
import errno
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from safetensors import SafetensorError
from torch import OutOfMemoryError

from ppow_train import cli
from ppow_train.errors import UserError
from ppow_train.options import CHOICES, PPOWOptions
from vllm_ppow import __version__
from vllm_ppow.artifact import ArtifactError

PPOW = str(Path(sys.executable).with_name("ppow"))


def test_help_answers_within_a_second():
    begin = time.perf_counter()
    done = subprocess.run([PPOW, "--help"], capture_output=True, text=True, check=True)
    assert time.perf_counter() - begin < 1.0
    for name, (_, line) in cli.COMMANDS.items():
        assert name in done.stdout
        assert line in " ".join(done.stdout.split())


def test_version():
    done = subprocess.run([PPOW, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"ppow, version {__version__}"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_subcommand_answers_help(name):
    command = cli.ppow.get_command(click.Context(cli.ppow), name)
    assert command is not None
    assert command.name == name
    calls = [[name]]
    if isinstance(command, click.Group):
        inner = command.list_commands(click.Context(command))
        assert inner, f"group {name} has no commands"
        calls += [[name, sub] for sub in inner]
    for call in calls:
        shown = CliRunner().invoke(cli.ppow, [*call, "--help"])
        assert shown.exit_code == 0, shown.output
        assert f"Usage: ppow {' '.join(call)}" in shown.output


@pytest.mark.parametrize(
    ("name", "flags", "value"),
    [
        ("doctor", ("--drafter", "--base-drafter"), "base_drafter"),
        ("export", ("--adapter-revision", "--revision"), "revision"),
        ("swap", ("--adapter-revision", "--revision"), "revision"),
    ],
)
def test_what_other_commands_call_it_is_understood(name, flags, value):
    command = cli.ppow.get_command(click.Context(cli.ppow), name)
    given = ["--adapter", "a", *(["--target", "t"] if name == "doctor" else [])]
    given += ["--output", "o"] if name == "export" else []
    for flag in flags:
        assert command.make_context(name, [*given, flag, "x"]).params[value] == "x"


def test_every_training_option_is_a_flag():
    """Those of few values name them and take no other."""
    shown = CliRunner().invoke(cli.ppow, ["train", "--help"]).output
    for option in dataclasses.fields(PPOWOptions):
        assert f"  --{option.name.replace('_', '-')} " in shown, option.name
    for name in ("report-to", "lora-targets"):
        assert f"--{name} NAMES" in shown
    for name, choices in CHOICES.items():
        assert f"--{name.replace('_', '-')} [{'|'.join(choices)}]" in shown
    assert "draft_sample_method" in CHOICES


def test_a_value_that_an_option_does_not_have(tmp_path, capsys):
    needed = ["--target", "t", "--drafter", "d", "--prompts", str(tmp_path), "--output", str(tmp_path)]
    assert cli.run(["train", *needed, "--draft-sample-method", "tree"]) == 2
    assert "'tree' is not one of 'probabilistic', 'greedy'" in capsys.readouterr().err


NEEDED = ["--target", "t", "--drafter", "d", "--prompts", "p", "--output", "o"]
COMPARE = ["compare", *NEEDED, "--held-out", "h"]


@pytest.mark.parametrize(
    ("argv", "option", "said"),
    [
        *(
            (["train", *NEEDED], option, said)
            for option, said in (
                ("--num-speculative-tokens=0", "num_speculative_tokens must be >= 1, got 0"),
                ("--learning-rate=-1", "learning_rate must be > 0, got -1.0"),
                ("--learning-rate=nan", "learning_rate must be > 0, got nan"),
                ("--max-steps=0", "max_steps must be in 1..10000000, got 0"),
                ("--max-steps=99999999999999999999999", "max_steps must be in 1..10000000, got 9"),
                ("--lora-rank=-5", "lora_rank must be >= 1, got -5"),
                ("--windows-per-step=0", "windows_per_step must be >= 1, got 0"),
                ("--seed=99999999999", "not in the range 0<=x<=4294967295"),
                ("--objective=cst:foo", "objective must be one of ppow, exact"),
            )
        ),
        (["tiny", "costlier", "--output", "o"], "--layers=-1", "not in the range x>=1"),
        (["tiny", "build", "--output", "o"], "--target-steps=0", "not in the range x>=1"),
        (COMPARE, "--seed=-1", "not in the range"),
        (COMPARE, "--objective=foo", "objective must be one of"),
        (COMPARE, "--learning-rate=foo=1", "expected OBJECTIVE=RATE, got 'foo=1' (objective must be one of"),
        (COMPARE, "--learning-rate=exact=nan", "got 'exact=nan' (learning_rate must be > 0, got nan"),
        (
            ["data", "--target", "t", "--prompts", "p", "--output", "o"],
            "--continuations=99999999999",
            "1<=x<=10000",
        ),
    ],
)
def test_values_that_cannot_be_are_wrong_usage_told_without_torch(argv, option, said, tmp_path):
    code = (
        "import sys; from ppow_train.cli import run; code = run(sys.argv[1:]); assert 'torch' not in sys.modules; "
        "sys.exit(code)"
    )
    call = [sys.executable, "-c", code, *argv, option]
    done = subprocess.run(call, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert f"Invalid value for '{option.partition('=')[0]}': " in done.stderr
    assert said in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_subcommand_answers_help_without_torch(name):
    code = f"import sys; from ppow_train.cli import run; run([{name!r}, '--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- errors


@pytest.fixture
def raising(monkeypatch):
    """Adds a subcommand `fail` that raises the given exception, or calls it with the click context."""

    def add(outcome):
        @click.command("fail")
        @click.pass_context
        def fail(ctx):
            if isinstance(outcome, BaseException):
                raise outcome
            outcome(ctx)

        monkeypatch.setitem(cli.ppow.commands, "fail", fail)

    return add


@pytest.mark.parametrize(
    ("outcome", "code", "message"),
    [
        (
            UserError("steps must be >= 1, got 0: give --steps 100."),
            1,
            "Error: steps must be >= 1, got 0: give --steps 100.",
        ),
        (ArtifactError("x is not a directory."), 1, "Error: x is not a directory."),
        (click.UsageError("--a excludes --b"), 2, "Error: --a excludes --b"),
        (click.ClickException("no room"), 1, "Error: no room"),
        (KeyboardInterrupt(), 130, "Interrupted"),
        (EOFError(), 1, "Error: input ended before"),
        (
            ModuleNotFoundError("No module named 'trl'", name="trl.trainer"),
            1,
            "Error: trl.trainer is not installed: pip install '.[train]' in vllm-ppow's checkout.",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "out/x"),
            1,
            "device (out/x): free some room",
        ),
        (
            PermissionError(errno.EPERM, "Operation not permitted", "out.checkpoints"),
            1,
            "Error: Operation not permitted (out.checkpoints): you have no access there, name another path.",
        ),
        (OSError(errno.EROFS, "Read-only file system", "out"), 1, "no access there, name another path"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 1, "no access there, name another path"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "out/x"),
            1,
            "Error: No such file or directory (out/x): check the path, or name another.",
        ),
        (
            OSError(errno.ENAMETOOLONG, "File name too long", "out"),
            1,
            "Error: File name too long (out): name another path.",
        ),
        (
            RuntimeError(
                "[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598\nframe #0: x"
            ),
            1,
            "unexpected pos 704 vs 598): free some room or name another output",
        ),
        (RuntimeError("basic_ios::clear: iostream error"), 1, "as on a full disk (basic_ios"),
        (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            1,
            "Error: No space left on device: free some room",
        ),
        (
            SafetensorError(
                'IoError(Os { code: 28, kind: StorageFull, message: "No space left on device" })'
            ),
            1,
            "Error: No space left on device: free some room",
        ),
        (
            SafetensorError("Error while serializing: I/O error: Is a directory (os error 21)"),
            1,
            "Error: Is a directory: a directory is where a file is needed, name another path.",
        ),
        (
            FileExistsError(errno.EEXIST, "File exists", "out"),
            1,
            "Error: File exists (out): name another output, or remove what is there.",
        ),
        (
            NotADirectoryError(errno.ENOTDIR, "Not a directory", "out/x"),
            1,
            "Error: Not a directory (out/x): a file is where a directory is needed, name another path.",
        ),
        (
            IsADirectoryError(errno.EISDIR, "Is a directory", ".out.part", None, "out"),
            1,
            "Error: Is a directory (out): a directory is where a file is needed, name another path.",
        ),
        (ModuleNotFoundError("No module named 'vllm'", name="vllm"), 1, "pip install '.[cpu]'"),
        (
            OutOfMemoryError("CUDA out of memory."),
            1,
            "Error: the GPU ran out of memory: stop what else uses it",
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_errors_are_one_sentence_and_a_code(raising, capsys, outcome, code, message):
    raising(outcome)
    assert cli.run(["fail"]) == code
    shown = capsys.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert "frame #0" not in shown.err, "torch's own stack"
    assert shown.out == ""


@pytest.mark.parametrize("output", [".", "..", "/"])
def test_a_directory_is_no_picture(output, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "windows.jsonl").write_text('{"step": 1}\n')
    assert cli.run(["windows", str(tmp_path), "--output", output]) == 1
    assert f"Error: {output} is a directory: name the PNG to write, such as " in capsys.readouterr().err


def test_an_output_in_the_wrong_place_is_one_sentence(tmp_path, capsys):
    """As the system itself refuses it, at the end of a command."""
    (tmp_path / "windows.jsonl").write_text('{"step": 1}\n')
    for output in ("windows.jsonl/x.png", "windows.jsonl/x/y.png"):
        assert cli.run(["windows", str(tmp_path), "--output", str(tmp_path / output)]) == 1
        told = capsys.readouterr().err
        assert told.startswith(("Error: File exists (", "Error: Not a directory ("))
        assert "name another" in told


def test_a_code_that_a_command_chooses_is_kept(raising):
    raising(lambda ctx: ctx.exit(3))
    assert cli.run(["fail"]) == 3


def test_success_is_zero(raising):
    raising(lambda ctx: None)
    assert cli.run(["fail"]) == 0


@pytest.mark.parametrize(
    "bug",
    [
        ValueError("a bug"),
        RuntimeError("a bug"),
        RuntimeError(
            "[enforce fail at inline_container.cc:145] . PytorchStreamReader failed reading zip archive"
        ),
        SafetensorError("Error while deserializing header: header too large"),
        OSError(errno.EIO, "strange"),
        OSError("no number"),
        FileNotFoundError(errno.ENOENT, "No such file or directory"),
        ModuleNotFoundError("No module", name="ppow_train.nope"),
    ],
)
def test_a_bug_keeps_its_traceback(raising, bug):
    raising(bug)
    with pytest.raises(type(bug)):
        cli.run(["fail"])


def test_wrong_usage_is_two(capsys):
    assert cli.run(["no-such-command"]) == 2
    assert "No such command" in capsys.readouterr().err
    assert cli.run([]) == 2


def test_main_exits_with_the_code(raising):
    raising(UserError("no."))
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["fail"])
    assert exit_info.value.code == 1
