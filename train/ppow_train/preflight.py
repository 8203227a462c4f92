"""What commands make sure of before they load a model or start an engine. Left out: vLLM's own checks."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ppow_train.errors import UserError
from vllm_ppow.artifact import Adapter, compare_fingerprint
from vllm_ppow.resolve import resolve_directory

RUN = "run.json"  # in a directory of training state, from the first moment of a run (checkpoints.py)


def check_writable(directory: Path, option: str = "--output") -> None:
    """Make sure that results can be written to a directory, or that it can be made; nothing is left behind.

    Args:
        option: by which the user names another.

    Raises:
        UserError: they cannot.
    """
    try:
        # Asked of the system: permissions alone do not say it, of root for one.
        with tempfile.TemporaryFile(dir=_standing(directory)):
            pass
    except OSError as error:
        raise UserError(
            f"Nothing can be written to {directory} ({error.strerror}): name another place with {option}."
        ) from error


def _standing(directory: Path) -> Path:
    """The directory, or the nearest above it that is there."""
    for place in (directory, *directory.parents):
        try:
            place.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        return place
    return directory


def find_target(adapter: Adapter, given: str | None, *, allow_mismatch: bool) -> tuple[Path, str | None]:
    """The target to measure with.

    Args:
        given: directory or Hub repo id; None: the one that the adapter was trained for.
        allow_mismatch: another target, such as a quantised copy, is what the user wants.

    Returns:
        Its directory, and its fingerprint; None where none can be taken, as of weights that are no safetensors.

    Raises:
        UserError: it is another target.
        ArtifactError: it is not there.
    """
    recorded = adapter.config.target
    directory, _ = (
        resolve_directory(given) if given else resolve_directory(recorded.name_or_path, recorded.revision)
    )
    found, problem = compare_fingerprint(directory, recorded.fingerprint)
    if problem and not allow_mismatch:
        raise UserError(
            f"{directory} is not the target that the adapter was trained for, {recorded.name_or_path} ({problem}): "
            "give that one, or --allow-target-mismatch to measure with this one, such as a quantised copy."
        )
    return directory, found
