"""`--engine-arg NAME=VALUE`: vLLM's own engine arguments, so that what is measured or written runs as it is served.

Left out: those that the commands set themselves.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from typing import Any

import click

# Set by the commands: by options of their own, or because a comparison would mean nothing otherwise.
_OWN_OPTIONS = {
    "model": "--target",
    "max_model_len": "",
    "max_num_seqs": "",
    "tensor_parallel_size": "--tensor-parallel-size",
    "enforce_eager": "--compile/--eager",
    "dtype": "--dtype",
}
_KEPT = (
    "seed", "speculative_config", "scheduler_cls", "disable_log_stats", "logprobs_mode", "enable_prefix_caching",
    "tokenizer", "skip_tokenizer_init",
)  # fmt: skip


def engine_argument_option(of: str = "") -> Callable:
    """The option; the command gets `engine_arguments`, a dict.

    Args:
        of: what the engine is for, where that is not the whole command.
    """
    return click.option(
        "--engine-arg",
        "engine_arguments",
        multiple=True,
        metavar="NAME=VALUE",
        callback=_read,
        help=f"{of}argument of vLLM's engine as the server has it, such as quantization=fp8 or kv_cache_dtype=fp8; "
        "VALUE is JSON, or text as it stands; may be repeated",
    )


def _read(context: click.Context, parameter: click.Parameter, given: tuple[str, ...]) -> dict[str, Any]:
    arguments = dict(_pair(text) for text in given)
    for name in arguments:
        if name in _OWN_OPTIONS:
            raise click.BadParameter(f"{name} is set by this command{_instead(context, _OWN_OPTIONS[name])}.")
        if name in _KEPT:
            raise click.BadParameter(
                f"{name} is set by this command: what it compares or keeps depends on it."
            )
    if arguments:
        _check_known(arguments)
    return arguments


def _instead(context: click.Context, own: str) -> str:
    """What sets it: an option of its own, if this command has it."""
    if not own:
        return ", from its other options"
    flags = {flag for option in context.command.params for flag in option.opts}
    return f": use {own}" if own.partition("/")[0] in flags else " and cannot be chosen here"


def _pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    name = name.strip().removeprefix("--").replace("-", "_")
    if not name or not equals:
        raise click.BadParameter(f"expected NAME=VALUE, such as quantization=fp8, got {text!r}.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _check_known(arguments: dict[str, Any]) -> None:
    from vllm_ppow.compat.capabilities import engine_arguments

    known = engine_arguments()
    for name in arguments:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            meant = f"; did you mean {near[0]}?" if near else "."
            raise click.BadParameter(f"this vLLM's engine has no argument {name}{meant}")
