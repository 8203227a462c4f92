"""The base URL of a server as an argument of commands. Left out: what is asked of the server."""

from __future__ import annotations

import urllib.parse
from typing import Any

import click


class BaseUrl(click.ParamType):
    """An http(s) URL that a request can be made of, without a slash at its end."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            parts = urllib.parse.urlsplit(value)
            (parts.hostname or "").encode("idna")
            parts.path.encode("ascii")
            # Reading the port checks it; signs that cannot be in a URL are passed over by urlsplit.
            fits = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
            fits = fits and "@" not in parts.netloc and value.isprintable() and " " not in value
        except ValueError:
            fits = False
        if not fits:
            self.fail(f"must be an http(s) URL such as http://localhost:8000, got {value!r}.", param, ctx)
        return value.rstrip("/")
