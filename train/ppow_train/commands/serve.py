"""`ppow serve`: `vllm serve` with the speculative config spelled out. Left out: everything that vLLM does.

vLLM's own options pass through as they are. What would be refused half a minute later, in the middle of a traceback of
vLLM's, is refused first. The process becomes vLLM's, so signals and exit codes are its own.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import click

# How vLLM's parser spells the options that say the same as ours (it takes underscores for dashes, "=" and dotted keys).
_OURS = re.compile(r"^(--speculative-config|--spec-(method|model|tokens)|-sc)([.=+].*)?$")


class _Serve(click.Command):
    """vLLM has short options of several letters, such as -dph, in which -h must not be found: only by itself."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does, -h taken for --help."""
        return super().parse_args(ctx, ["--help" if arg == "-h" else arg for arg in args])


@click.command(
    cls=_Serve,
    context_settings={"ignore_unknown_options": True, "help_option_names": ["--help"]},
    options_metavar="",  # after TARGET, see vllm_options
)
@click.argument("target")
@click.option("--adapter", required=True, help="adapter directory or Hub repo id")
@click.option("--adapter-revision", help="Hub revision of the adapter")
@click.option(
    "-K",
    "--num-speculative-tokens",
    type=click.IntRange(1),
    help="tokens per draft  [default: the adapter's]",
)
@click.option(
    "--draft-sample-method",
    type=click.Choice(["greedy", "probabilistic"]),
    help="how drafts are sampled  [default: as the adapter was trained for]",
)
@click.option(
    "--drafter", help="directory or Hub repo id of the base drafter, if it is not where it was in training"
)
@click.option(
    "--allow-target-mismatch",
    is_flag=True,
    help="serve another target than the one trained for, with a warning",
)
@click.option(
    "--hot-swap",
    type=click.Path(exists=True, file_okay=False, resolve_path=True),
    help="let `ppow swap` load other adapters from this directory while the server runs",
)
@click.option(
    "--speculative-options",
    default="{}",
    metavar="JSON",
    help='further keys of the speculative config, those under "ppow" included',
)
@click.option("--dry-run", is_flag=True, help="print the command instead of running it")
@click.argument("vllm_options", nargs=-1, type=click.UNPROCESSED, metavar="[OPTIONS] [VLLM OPTIONS]")
def serve(target: str, dry_run: bool, vllm_options: tuple[str, ...], **ours: Any) -> None:
    """Serve TARGET with an adapter: `vllm serve`, the speculative config spelled for you.

    TARGET comes first; options that are not below are vLLM's (`vllm serve --help`).
    """
    if target.startswith("-"):
        raise click.UsageError(f"give the target first: ppow serve TARGET {target} …")
    for option in vllm_options:
        if _OURS.match(option.replace("_", "-")):
            raise click.UsageError(
                f"{option.partition('=')[0]} says what --adapter and -K say: leave it out, or use `vllm serve`. "
                "Further keys go into --speculative-options."
            )
    spec = speculative_config(**ours)
    _check_files(spec, target, vllm_options, dry_run)
    command = ["serve", target, "--speculative-config", json.dumps(spec), *vllm_options]
    plugins = _plugins() if ours["hot_swap"] else None
    if dry_run:
        prefix = f"VLLM_PLUGINS={shlex.quote(plugins)} " if plugins else ""
        click.echo(prefix + shlex.join(["vllm", *command]))
        return
    if importlib.util.find_spec("vllm") is None:
        raise ModuleNotFoundError("No module named 'vllm'", name="vllm")
    if plugins:
        os.environ["VLLM_PLUGINS"] = plugins
    # As a module of this interpreter, not the script on PATH: that one may belong to another environment.
    os.execv(sys.executable, [sys.executable, "-m", "vllm.entrypoints.cli.main", *command])


def speculative_config(
    adapter: str,
    adapter_revision: str | None,
    num_speculative_tokens: int | None,
    draft_sample_method: str | None,
    drafter: str | None,
    allow_target_mismatch: bool,
    hot_swap: str | None,
    speculative_options: str,
) -> dict[str, Any]:
    """The speculative config that the options stand for.

    Raises:
        click.UsageError: --speculative-options is no JSON object, says again what another option says, or has keys or
            values that method ppow does not take.
    """
    from vllm_ppow.config import PPOWServingError, check_keys

    try:
        more = json.loads(speculative_options)
    except ValueError as error:
        raise click.UsageError(f"--speculative-options is not JSON: {error}.") from error
    if not isinstance(more, dict) or not isinstance(more.get("ppow", {}), dict):
        raise click.UsageError('--speculative-options must be a JSON object, and "ppow" in it too.')
    own = {
        "method": "ppow",
        "model": adapter,
        "revision": adapter_revision,
        "num_speculative_tokens": num_speculative_tokens,
        "draft_sample_method": draft_sample_method,
    }
    under_ppow = {
        "base_drafter": drafter,
        "allow_target_mismatch": allow_target_mismatch or None,
        "hot_swap": True if hot_swap else None,
        "hot_swap_directory": hot_swap,
    }
    spec = _joined({key.replace("-", "_"): value for key, value in more.items() if key != "ppow"}, own)
    if ppow := _joined(more.get("ppow", {}), under_ppow):
        spec["ppow"] = ppow
    try:
        check_keys(spec)
    except PPOWServingError as error:
        raise click.UsageError(str(error)) from error
    return spec


def _joined(more: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    given = {key: value for key, value in own.items() if value is not None}
    if twice := sorted(set(more) & set(given)):
        raise click.UsageError(
            f"--speculative-options says {twice[0]!r} again, which another option says: leave one out."
        )
    return {**given, **more}


def _check_files(spec: dict[str, Any], target: str, vllm_options: Sequence[str], dry_run: bool) -> None:
    """Refuse an adapter that vLLM would not be able to serve with this target; a dry run downloads nothing for it.

    Raises:
        ArtifactError: with the remedy.
    """
    from vllm_ppow.config import check
    from vllm_ppow.resolve import NotHereError

    told = {flag: _value(vllm_options, flag) for flag in ("--revision", "--download-dir", "--config")}
    try:
        check(
            spec,
            # A file of vLLM's options may name another revision of the target.
            target if told["--config"] is None else None,
            target_revision=told["--revision"],
            download_dir=told["--download-dir"],
            download=not dry_run,
        )
    except NotHereError as error:
        click.echo(f"Not checked whether it can be served: {error}", err=True)


def _value(vllm_options: Sequence[str], flag: str) -> str | None:
    """The value of one of vLLM's options, if it is given; its parser takes underscores for dashes."""
    value = None
    for option, following in itertools.zip_longest(vllm_options, vllm_options[1:]):
        name, equals, given = option.partition("=")
        if name.replace("_", "-") == flag:
            value = given if equals else following
    return value


def _plugins() -> str:
    """VLLM_PLUGINS with which vLLM adds our HTTP routes, and loads the plugins of other packages as it would without.

    Unset, it loads all plugins but those with HTTP routes; set, it loads those that it names.
    """
    given = os.environ.get("VLLM_PLUGINS")
    if given is not None:
        return ",".join(dict.fromkeys([*filter(None, given.split(",")), "ppow"]))
    points = [point for package in importlib.metadata.distributions() for point in package.entry_points]
    groups = {point.group for point in points if point.group.startswith("vllm.")} - {"vllm.endpoint_plugins"}
    names = {point.name for point in points if point.group in groups}
    return ",".join(sorted(names | {"ppow"}))
