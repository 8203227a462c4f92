"""The log of windows as it is read: `windows.jsonl`, one JSON line per logging interval.

Left out: gathering the numbers (window_log.py), the plot (window_plot.py). Nothing here needs torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ppow_train.errors import UserError

LOG_NAME = "windows.jsonl"
# What the parts of a line hold that the plot shows; a line without a part had nothing to tell of it.
_PARTS = {
    "criticality": ("kind", "edges", "chosen", "candidates", "chosen_mean", "candidates_mean"),
    "accepted": ("per_position",),
}


def complete_lines(path: Path) -> list[Any]:
    """Parsed lines of a log; a last one that a kill has cut short is left out.

    Raises:
        ValueError: says which line is no JSON, or that it is no text.
    """
    if not path.exists():
        return []
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError("it is no UTF-8 text") from error
    lines = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), start=1):
        try:
            lines.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"line {number} is not JSON") from error
    return lines


def read_window_log(path: Path) -> list[dict[str, Any]]:
    """Lines of a log, given as a file or as the directory that holds it.

    Raises:
        UserError: no such file, not such a log, or nothing in it.
    """
    file = path / LOG_NAME if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"{file} does not exist: give the directory or the {LOG_NAME} that `ppow train` wrote."
        )
    try:
        lines = complete_lines(file)
        for number, line in enumerate(lines, start=1):
            _check_line(line, number)
    except ValueError as error:
        raise UserError(
            f"{file} is not a log of windows ({error}): give the directory or the {LOG_NAME} that `ppow train` wrote."
        ) from error
    if not lines:
        raise UserError(f"{file} holds no interval yet: wait for the run's first log line.")
    return lines


def _check_line(line: Any, number: int) -> None:
    """Raise ValueError unless it is one of such a log."""
    if not isinstance(line, dict):
        raise ValueError(f"line {number} must be an object, got {type(line).__name__}")
    if type(line.get("step")) is not int:
        raise ValueError(f"line {number} lacks step, a number of updates")
    for part, keys in _PARTS.items():
        content = line.get(part, dict.fromkeys(keys))
        if not isinstance(content, dict) or not set(keys) <= set(content):
            raise ValueError(f"line {number} has {part} without {', '.join(keys)}")
