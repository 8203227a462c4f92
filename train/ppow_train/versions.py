"""Which packages made something: recorded beside what was trained or measured, so that it can be made again."""

from __future__ import annotations

import importlib.metadata
import platform

# What a training run's outcome depends on.
TRAINED_BY = ("vllm-ppow", "torch", "transformers", "trl", "peft", "speculators")


def installed_versions() -> dict[str, str]:
    """Package -> version, of all that training takes."""
    return {name: importlib.metadata.version(name) for name in TRAINED_BY}


def made_with() -> str:
    """The same in one line, with interpreter and machine."""
    packages = ", ".join(f"{name} {version}" for name, version in installed_versions().items())
    return f"{packages}, Python {platform.python_version()}, {platform.machine()}"
