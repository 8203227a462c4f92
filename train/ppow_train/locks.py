"""One process at a time makes what several need, and the others find it.

Left out: a directory that one run alone writes, where a second process is refused (trajectory_store.only_writer).
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Wait until no other process makes a directory, and make others wait; look again then whether it is there.

    Args:
        directory: that is made, or found; its parent is made where it is missing, and holds the lock meanwhile.
    """
    file = directory.with_name(f".{directory.name}.lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with file.open("w") as handle:
            _wait(handle, directory)
            # Else it is a lock that its last owner has removed, and another process may hold the new one.
            if _is_at(handle, file):
                try:
                    yield
                finally:
                    file.unlink(missing_ok=True)
                return


def _wait(handle: IO[str], directory: Path) -> None:
    # The kernel drops a lock with its process, however that ends.
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        logger.warning("%s is being made by another process: waiting for it.", directory)
        fcntl.flock(handle, fcntl.LOCK_EX)


def _is_at(handle: IO[str], file: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle.fileno()), file.stat())
    return False
