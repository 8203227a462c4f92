"""Names that users give, turned into directories: a path or a Hub repo id, and the drafter that an adapter recorded.

Left out: what an adapter directory holds (artifact.py).
"""

from __future__ import annotations

from pathlib import Path

from vllm_ppow.artifact import (
    PEFT_WEIGHTS,
    SMALL_FILES,
    Adapter,
    ArtifactError,
    fingerprint_model,
    model_weight_files,
)

_NOT_HERE = (
    "{} is not a directory here, and the Hub cache does not hold it as a whole: download it (hf download)."
)


class NotHereError(ArtifactError):
    """A Hub repo that the cache does not hold as a whole, where nothing is to be downloaded."""


def resolve_directory(
    name_or_path: str, revision: str | None = None, cache_dir: str | None = None, *, download: bool = True
) -> tuple[Path, bool]:
    """Turn a directory or Hub repo id into a local directory.

    Only JSON, safetensors, tokenizer text and chat templates are fetched, and only from the repo that was named.

    Args:
        name_or_path: directory or Hub repo id.
        revision: Hub branch, tag or commit; None for the default branch.
        cache_dir: where Hub downloads go; None for the Hub client's own cache.
        download: fetch what the cache lacks.

    Returns:
        The directory, and whether it came from the Hub.

    Raises:
        NotHereError: a repo that would have to be downloaded.
        ArtifactError: it is a file, or neither a directory nor a repo that can be had.
    """
    path = existing(name_or_path)
    if path is not None:
        if not path.is_dir():
            raise ArtifactError(f"{name_or_path} is a file: give the directory that it belongs to.")
        return path, False
    looks_like_path = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") != 1
    if looks_like_path:
        raise ArtifactError(f"{name_or_path[:200]} does not exist: check the path.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        fetched = snapshot_download(
            name_or_path,
            revision=revision,
            cache_dir=cache_dir,
            # Else some versions ask the Hub what a pinned commit holds.
            local_files_only=is_offline() or not download,
            allow_patterns=["*.safetensors", *SMALL_FILES],
            ignore_patterns=["original/*", "consolidated*"],  # the same weights again (model_weight_files)
        )
    except Exception as error:  # the Hub client raises a dozen kinds; each means "cannot be had"
        if is_offline():
            at = f" at revision {revision}" if revision else ""
            raise ArtifactError(
                f"{name_or_path} is not a directory here, and the Hub cache does not hold it{at} while HF_HUB_OFFLINE "
                "is set: download it first (hf download), or unset HF_HUB_OFFLINE."
            ) from error
        if not download and isinstance(error, LocalEntryNotFoundError):
            raise NotHereError(_NOT_HERE.format(name_or_path)) from error
        raise ArtifactError(
            f"{name_or_path} is neither a directory here nor a Hub repo that can be had "
            f"({type(error).__name__}): check the name, the network and HF_TOKEN."
        ) from error
    if not download and not is_offline() and not _holds_weights(Path(fetched)):
        raise NotHereError(_NOT_HERE.format(name_or_path))
    return Path(fetched), True


def _holds_weights(directory: Path) -> bool:
    """Whether the cache has more of a repo than the configuration, which is often fetched alone."""
    if (directory / PEFT_WEIGHTS).is_file():
        return True
    try:
        return bool(model_weight_files(directory))
    except ArtifactError:
        return False


def existing(name: str) -> Path | None:
    """The file or directory of that name, `~` expanded; None where there is none, or can be none of such a name."""
    try:
        path = Path(name).expanduser()
        return path if path.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long; a null byte; the home of a user who is not there
        return None


def is_offline() -> bool:
    """Whether the Hub client may only use its cache (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def resolve_base_drafter(
    adapter: Adapter, from_hub: bool, override: str | None = None, *, download: bool = True
) -> Path:
    """Directory of the drafter that the adapter's deltas are added to, checked against its fingerprint.

    An adapter from the Hub may name a Hub repo or a directory inside itself, never a path of this machine.

    Args:
        adapter: the adapter.
        from_hub: whether the adapter came from the Hub.
        override: directory or repo id that the user named instead of the recorded one.
        download: as in `resolve_directory`.

    Raises:
        ArtifactError: it cannot be found, escapes the adapter, or is another drafter.
    """
    ref = adapter.config.base_drafter
    if override is not None:
        directory, _ = resolve_directory(override, download=download)
    else:
        directory = _recorded_drafter(adapter, from_hub, download)
    found = fingerprint_model(directory)
    if found != ref.fingerprint:
        raise ArtifactError(
            f"Adapter {adapter.directory} was trained on another drafter than {directory} (fingerprint {found[:19]}…, "
            f"recorded {ref.fingerprint[:19]}…): give the one it was trained on, recorded as {ref.name_or_path}."
        )
    return directory


def _recorded_drafter(adapter: Adapter, from_hub: bool, download: bool) -> Path:
    name = adapter.config.base_drafter.name_or_path
    inside = existing(str(adapter.directory / name))
    if (
        not Path(name).is_absolute()
        and inside is not None
        and inside.resolve().is_relative_to(adapter.directory.resolve())
        and inside.is_dir()
    ):
        return inside.resolve()
    escapes = (
        Path(name).is_absolute()
        or ".." in Path(name).parts
        or name.startswith("~")
        or existing(name) is not None
    )
    if from_hub and escapes:
        raise ArtifactError(
            f"Adapter {adapter.directory} came from the Hub and names the drafter {name!r}, a path of the machine it "
            'was trained on, or of this one: name the drafter yourself ("ppow": {"base_drafter": …}).'
        )
    try:
        return resolve_directory(name, adapter.config.base_drafter.revision, download=download)[0]
    except NotHereError:
        raise
    except ArtifactError as error:
        raise ArtifactError(
            f"The drafter of adapter {adapter.directory}, recorded as {name!r}, cannot be found ({error}) "
            'Name it yourself: "ppow": {"base_drafter": …}.'
        ) from error
