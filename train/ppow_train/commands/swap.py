"""`ppow swap`: another adapter for a running server. Left out: the server's part (vllm_ppow/compat/endpoints.py)."""

from __future__ import annotations

import contextlib
import http.client
import json
import time
import urllib.error
import urllib.request
from typing import Any

import click

from ppow_train.commands.base_url import BaseUrl

PATH = "/v1/ppow/adapter"


@click.command()
@click.option(
    "--url",
    type=BaseUrl(),
    default="http://localhost:8000",
    show_default=True,
    help="base URL of the server",
)
@click.option(
    "--adapter",
    help="a path as the server knows it, relative to its --hot-swap directory, or its Hub repo id",
)
@click.option("--adapter-revision", "--revision", "revision", help="Hub revision of the adapter")
@click.option("--undo", is_flag=True, help="go back to the adapter before the last swap")
@click.option(
    "--max-drop",
    type=click.FloatRange(0, 1, True, True),
    help="swap back if more acceptance is lost  [default: 0.2]",
)
@click.option("--drafts", type=click.IntRange(1), help="drafts to compare before and after  [default: 1000]")
@click.option("--no-watch", is_flag=True, help="keep it whatever is accepted")
@click.option("--wait", is_flag=True, help="wait for the comparison; exit with 1 if it was swapped back")
@click.option("--api-key", envvar="VLLM_API_KEY", help="the server's key  [default: $VLLM_API_KEY]")
def swap(
    url: str,
    adapter: str | None,
    revision: str | None,
    undo: bool,
    max_drop: float | None,
    drafts: int | None,
    no_watch: bool,
    wait: bool,
    api_key: str | None,
) -> None:
    """Swap the adapter of a running server, which must have been started with `ppow serve --hot-swap`.

    Without --adapter or --undo it prints which adapter is running. No request is dropped. The server swaps back by
    itself when accepted tokens per draft fall.
    """
    if adapter and undo:
        raise click.UsageError("--adapter and --undo exclude each other: leave one out.")
    _check_usage(
        adapter, revision, no_watch, {"--max-drop": max_drop, "--drafts": drafts, "--wait": wait or None}
    )
    asked: dict[str, Any] = {"adapter": adapter, "revision": revision, "max_drop": max_drop, "drafts": drafts}
    asked = {key: value for key, value in asked.items() if value is not None}
    if no_watch:
        asked["watch"] = False
    if undo:
        asked["undo"] = True
    if api_key:
        from ppow_train.endpoint import clean_key

        api_key = clean_key(api_key)
    answer = _call(url, asked or None, api_key)
    while wait and answer["comparing"]:
        time.sleep(1)
        answer = _call(url, None, api_key)
    click.echo(json.dumps(answer, indent=2))
    if wait and adapter and (answer["last"] or {}).get("event") == "swapped back":
        raise click.ClickException(f"swapped back: {answer['last']['why']}.")


def _check_usage(
    adapter: str | None, revision: str | None, no_watch: bool, of_comparing: dict[str, Any]
) -> None:
    """Refuse options that would change nothing.

    Args:
        of_comparing: options of the comparison before and after, None where one is not given.

    Raises:
        click.UsageError: what to leave out.
    """
    if adapter == "":
        raise click.UsageError("--adapter is empty: give the adapter's path or Hub repo id.")
    comparing = [option for option, value in of_comparing.items() if value is not None]
    given = [*comparing, *["--adapter-revision"] * (revision is not None), *["--no-watch"] * no_watch]
    if given and not adapter:
        raise click.UsageError(f"{given[0]} goes with --adapter: give that too, or leave it out.")
    if comparing and no_watch:
        raise click.UsageError(
            f"{comparing[0]} has no effect with --no-watch, which compares nothing: leave one out."
        )


def _call(url: str, asked: dict[str, Any] | None, api_key: str | None) -> dict[str, Any]:
    """GET, or POST what is asked.

    Raises:
        click.ClickException: with the server's own sentence, or why there was no answer.
    """
    headers = {
        "Content-Type": "application/json",
        **({"Authorization": f"Bearer {api_key}"} if api_key else {}),
    }
    from ppow_train.endpoint import NoRedirect

    body = None if asked is None else json.dumps(asked).encode()
    request = urllib.request.Request(url + PATH, body, headers)
    try:
        with urllib.request.build_opener(NoRedirect).open(request, timeout=3600) as answer:
            return _checked(url, answer.read())
    except urllib.error.HTTPError as error:
        raise click.ClickException(_sentence(url, error)) from error
    except OSError as error:
        raise click.ClickException(
            f"{url} does not answer ({error}): is the server running there?"
        ) from error
    except http.client.HTTPException as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise click.ClickException(
            f"{url} gave no whole HTTP answer ({why}): check --url and the server's log."
        ) from error


def _checked(url: str, body: bytes) -> dict[str, Any]:
    """What the server says, if it is what our server says.

    Raises:
        click.ClickException: it is something else.
    """
    with contextlib.suppress(ValueError):
        answer = json.loads(body)
        if (
            isinstance(answer, dict)
            and "comparing" in answer
            and isinstance(answer.get("last", ""), dict | None)
        ):
            return answer
    raise click.ClickException(
        f"{url} answered {body[:60]!r}, which says of no adapter: give the base URL of a server that "
        "ppow serve --hot-swap started."
    )


def _sentence(url: str, error: urllib.error.HTTPError) -> str:
    """Why the server refused."""
    if error.code == 404:
        return f"{url} has no {PATH}: start it with ppow serve --hot-swap, on vLLM 0.32 or newer."
    if error.code == 401:
        return "the server wants its API key: give --api-key."
    text = ""
    with contextlib.suppress(OSError, http.client.HTTPException):  # broken off: the status is all there is
        text = " ".join(error.read().decode(errors="replace").split())
    with contextlib.suppress(ValueError, KeyError, TypeError):
        told = json.loads(text)["error"]  # our own sentence, or vLLM's {"message": …}
        return str(told if isinstance(told, str) else told["message"])
    return f"{url} answered with status {error.code} ({text[:200] or error.reason}): see the server's log."
