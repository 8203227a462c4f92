"""What `ppow bench` and `ppow profile` make sure of before the first engine starts. Left out: vLLM's own checks."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ppow_train.errors import UserError
from vllm_ppow.artifact import Adapter, compare_fingerprint
from vllm_ppow.resolve import resolve_directory


def check_writable(directory: Path) -> None:
    """Make sure that results can be written to a directory, which is made where it is missing.

    Raises:
        UserError: they cannot.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UserError(
            f"Nothing can be written to {directory} ({error.strerror}): name another place with --output."
        ) from error


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
