"""A Hub for tests: repos laid out in a directory as the Hub client's own cache lays them out, read offline."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path


def add_to_cache(cache: Path, repo: str, source: Path, branch: str = "main") -> str:
    """Put a directory's files into the cache as a commit of a repo, which a branch then points to.

    Returns:
        The commit.
    """
    root = cache / f"models--{repo.replace('/', '--')}"
    files = sorted(path for path in source.rglob("*") if path.is_file())
    commit = hashlib.sha1(b"".join(path.read_bytes() for path in files)).hexdigest()
    snapshot = root / "snapshots" / commit
    for file in files:
        blob = root / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blob)
        link = snapshot / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(blob)
    reference = root / "refs" / branch
    reference.parent.mkdir(parents=True, exist_ok=True)
    reference.write_text(commit)
    return commit
