"""The command `ppow`: its subcommands, loaded when they are called, and how errors reach the user.

Left out: what the subcommands do (commands/). Nothing here imports torch, transformers or vLLM, so that
`ppow --help` answers at once and works where they are not installed.
"""

from __future__ import annotations

import errno
import importlib
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from ppow_train.errors import UserError
from vllm_ppow import __version__
from vllm_ppow.artifact import ArtifactError

# name -> (module:attribute of the click command, its line in `ppow --help`)
COMMANDS: dict[str, tuple[str, str]] = {
    "data": ("ppow_train.commands.data:data", "Let the target continue prompts, and keep it on disk."),
    "train": ("ppow_train.commands.train:train", "Train a LoRA adapter for a drafter."),
    "demo": ("ppow_train.commands.demo:demo", "The whole loop once: train, serve, compare."),
    "serve": ("ppow_train.commands.serve:serve", "vllm serve, with an adapter."),
    "doctor": (
        "ppow_train.commands.doctor:doctor",
        "Check what would happen if it were served here, and why.",
    ),
    "export": ("ppow_train.commands.export:export", "Write the merged drafter, for vLLM alone."),
    "swap": ("ppow_train.commands.swap:swap", "Another adapter for a running server."),
    "bench": ("ppow_train.commands.bench:bench", "Measure a drafter in vLLM, with and without its adapter."),
    "profile": ("ppow_train.commands.profile:profile", "Measure what drafting costs on this machine."),
    "compare": (
        "ppow_train.commands.compare:compare",
        "Train several objectives alike and compare what they earn.",
    ),
    "study": (
        "ppow_train.commands.study:study",
        "Compare training arms by a plan: tuned, seeded, with intervals.",
    ),
    "windows": (
        "ppow_train.commands.windows:windows",
        "Draw which windows a run trained on, and what they earned.",
    ),
    "tiny": ("ppow_train.commands.tiny:tiny", "Build the small target and drafter that the demo uses."),
}

# Import names that an extra brings, and what to install when one of them is missing.
_TRAIN_NAMES = (
    "torch transformers datasets peft trl accelerate speculators hs_connectors yaml rich matplotlib numpy"
)
_REMEDIES = dict.fromkeys(_TRAIN_NAMES.split(), "pip install '.[train]' in vllm-ppow's checkout") | {
    "vllm": "pip install '.[cpu]', or '.[gpu]' for an NVIDIA GPU, in vllm-ppow's checkout"
}

# What a user can mend, and how.
_MAKE_ROOM = "free some room or name another output; what was there is untouched"
_NO_ACCESS = "you have no access there, name another path"
_DISK_TROUBLE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), _MAKE_ROOM),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _NO_ACCESS),
    **dict.fromkeys((errno.ENAMETOOLONG, errno.ELOOP), "name another path"),
    errno.ENOENT: "check the path, or name another",
    errno.EEXIST: "name another output, or remove what is there",
    errno.ENOTDIR: "a file is where a directory is needed, name another path",
    errno.EISDIR: "a directory is where a file is needed, name another path",
}
# An errno as safetensors tells it, newer ones and older ones.
_RUST_ERROR = re.compile(r"os error (\d+)|Os \{ code: (\d+)")
# All that torch.save says where the disk is full: of a large file, of one that broke off, of a small one.
_TORCH_WRITES = ("unexpected pos", "PytorchStreamWriter failed", "basic_ios::clear: iostream error")


class LazyGroup(click.Group):
    """A click group that imports a subcommand's module only when that subcommand is asked for."""

    def __init__(self, *args: Any, lazy_commands: dict[str, tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lazy_commands = lazy_commands

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the subcommands, in the order in which a reader meets them."""
        return [*self.lazy_commands, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The subcommand, its module imported now; None when there is no such subcommand."""
        if cmd_name not in self.lazy_commands:
            return super().get_command(ctx, cmd_name)
        module_name, _, attribute = self.lazy_commands[cmd_name][0].partition(":")
        return getattr(importlib.import_module(module_name), attribute)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the subcommands without importing them: click's own listing loads each for its help text."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_line) for name, (_, help_line) in self.lazy_commands.items()])


@click.group(cls=LazyGroup, lazy_commands=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ppow")
def ppow() -> None:
    """Train speculative-decoding drafters on your own traffic, and serve them in vLLM."""


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Entry point of the console script.

    Exit codes: 0 done, 1 an error the user can act on, 2 wrong usage, 130 interrupted. Any other exception is
    a bug and keeps its traceback.

    Args:
        args: command line without the program name; None takes the process's own.
    """
    sys.exit(run(args))


def run(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code (see `main`)."""
    try:
        result = ppow.main(args=args, prog_name="ppow", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort as abort:
        # click turns both Ctrl-C and the end of input at a prompt into Abort.
        if isinstance(abort.__cause__, EOFError):
            return _fail("input ended before the question was answered: answer it, or give the option.")
        click.echo("Interrupted", err=True)
        return 130
    except KeyboardInterrupt:
        click.echo("Interrupted", err=True)
        return 130
    except Exception as error:
        sentence = _sentence(error)
        if sentence is None:
            raise
        return _fail(sentence)
    return result if isinstance(result, int) else 0  # click hands back the code of `ctx.exit(code)`


def _sentence(error: Exception) -> str | None:
    """What the user is told of an error that they can act on; None for any other."""
    told, kind = str(error), type(error).__name__  # by its name: nothing here imports torch
    if isinstance(error, (ArtifactError, UserError)):
        return told
    if isinstance(error, ModuleNotFoundError):
        remedy = _REMEDIES.get((error.name or "").partition(".")[0])
        return remedy and f"{error.name} is not installed: {remedy}."
    if isinstance(error, OSError):
        return _disk_sentence(error.errno, error.strerror, error.filename2 or error.filename)
    if kind == "SafetensorError" and (found := _RUST_ERROR.search(told)):
        code = int(found[1] or found[2])
        return _disk_sentence(code, os.strerror(code))
    if kind == "OutOfMemoryError":
        return (
            "the GPU ran out of memory: stop what else uses it, lower --windows-per-forward (train), --batch-size "
            "(data) or --max-new-tokens, or give --target-dtype bfloat16."
        )
    if isinstance(error, RuntimeError) and any(sign in told for sign in _TORCH_WRITES):
        return f"a file could not be written whole, as on a full disk ({told.splitlines()[0]}): {_MAKE_ROOM}."
    return None


def _disk_sentence(code: int | None, reason: str | None, path: object = None) -> str | None:
    remedy = None if code is None else _DISK_TROUBLE.get(code)
    if code == errno.ENOENT and not path:
        return None  # of what? A bug, then
    return remedy and f"{reason}{f' ({path})' if path else ''}: {remedy}."


def _fail(message: str) -> int:
    click.echo(f"Error: {message}", err=True)
    return 1


if __name__ == "__main__":
    main()
