"""YAML files that a user writes, read the same way whatever else the process has imported.

Dates stay text: no option of ours is one, `run_name: 2026-11-24` means the name, and PyYAML's own answer is not a
given, as a library that vLLM imports (lm-format-enforcer) changes it for the whole process. Left out: what the values
may be (config.py, study/plan.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, without dates."""


def _text(_loader: _Loader, node: yaml.ScalarNode) -> str:
    return str(node.value)


_Loader.add_constructor("tag:yaml.org,2002:timestamp", _text)


def read_yaml(path: Path) -> Any:
    """What a YAML file holds: None if it is empty.

    Raises:
        ValueError: it cannot be read, is no UTF-8 or no YAML; the message is the reason, on one line.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(" ".join(str(error).split())) from error  # YAML's own runs over several lines
