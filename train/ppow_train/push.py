"""An adapter onto the Hugging Face Hub: asked before training whether it can, done after parity has passed.

What goes there names no path of this machine: a copy of the adapter, made beside it and kept if the upload fails.
Left out: the card (card.py); uploading while training, which
transformers would do with these options and which is why they are taken from the configuration here.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from ppow_train.card import last_name, write_card
from ppow_train.errors import UserError
from ppow_train.options import PPOWOptions
from vllm_ppow.artifact import PEFT_CONFIG, PPOW_CONFIG, Adapter, AdapterConfig

_LOGIN = "run `hf auth login` or set HF_TOKEN, or drop --push-to-hub"


@dataclasses.dataclass(frozen=True)
class Push:
    """Where an adapter goes.

    Attributes:
        repo_id: with its namespace.
        private: of the repo, where it does not exist yet.
    """

    repo_id: str
    private: bool


def take_push(values: dict[str, Any], output: Path) -> Push | None:
    """Take push_to_hub, hub_model_id and hub_private_repo out of the options, and ask the Hub whether it would do.

    Args:
        values: options of a run; without the three afterwards.
        output: its directory names the repo unless hub_model_id does.

    Returns:
        Where to, or None if nothing shall be uploaded.

    Raises:
        UserError: no valid name, not logged in, no right to write there.
    """
    wanted = values.pop("push_to_hub", PPOWOptions.push_to_hub)
    name = values.pop("hub_model_id", PPOWOptions.hub_model_id) or output.resolve().name
    private = values.pop("hub_private_repo", PPOWOptions.hub_private_repo)
    if not wanted:
        return None
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"hub_model_id {name!r} is no name for a repo ({error}): give another.") from error
    user = _who()
    namespace = name.partition("/")[0] if "/" in name else user["name"]
    allowed = [user["name"], *(org["name"] for org in user.get("orgs", []))]
    if namespace not in allowed:
        raise UserError(
            f"{user['name']} cannot write to {namespace} on the Hub: give a hub_model_id in {' or '.join(allowed)}."
        )
    return Push(name if "/" in name else f"{namespace}/{name}", private)


def _who() -> dict[str, Any]:
    try:
        user = HfApi().whoami()
    except LocalTokenNotFoundError as error:
        raise UserError(f"push_to_hub needs a login to the Hugging Face Hub: {_LOGIN}.") from error
    except Exception as error:  # the Hub client raises a dozen kinds; each means that nothing can be uploaded
        raise UserError(
            f"The Hugging Face Hub does not take the login ({_reason(error)}): {_LOGIN}."
        ) from error
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(f"The token of {user['name']} may only read: take one that may write, {_LOGIN}.")
    return user


def push_adapter(adapter: Adapter, push: Push, parity: dict[str, Any] | None) -> str:
    """Upload a copy of a finished adapter directory that names no path of this machine.

    Args:
        parity: as in `write_card`.

    Returns:
        The repo's address.

    Raises:
        UserError: it could not be uploaded; the directory is as it was, the copy is kept, and the message names it.
    """
    place = adapter.directory.resolve()
    copy = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    try:
        shutil.copytree(place, copy, ignore=shutil.ignore_patterns(".*"), dirs_exist_ok=True)
        _drop_paths(copy, adapter.config)
        write_card(copy, adapter.config, parity, push.repo_id)
        try:
            url = HfApi().create_repo(push.repo_id, private=push.private, exist_ok=True)
            HfApi().upload_folder(
                repo_id=push.repo_id, folder_path=copy, commit_message="Adapter trained by vllm-ppow"
            )
        except Exception as error:  # as above
            kept = _keep(copy, place)
            private = " --private" if push.private else ""
            raise UserError(
                f"The adapter could not be uploaded to {push.repo_id} ({_reason(error)}): it is in "
                f"{adapter.directory}; a copy that names no path of this machine is in {kept}, upload that with "
                f"`hf upload {push.repo_id} {shlex.quote(str(kept))}{private}`."
            ) from error
    finally:
        shutil.rmtree(copy, ignore_errors=True)
    return str(url)


def _keep(copy: Path, adapter: Path) -> Path:
    """Give the copy a name beside the adapter that nothing else has, and return it."""
    kept = adapter.with_name(f"{adapter.name}.upload")
    if kept.exists():
        # Empty: the copy takes its place.
        kept = Path(tempfile.mkdtemp(prefix=f"{kept.name}-", dir=kept.parent))
    return copy.rename(kept)


def _drop_paths(directory: Path, config: AdapterConfig) -> None:
    """Local models go by their last name: who serves the adapter names the drafter in any case."""
    drafter = last_name(config.base_drafter.name_or_path)
    for name, keys in ((PPOW_CONFIG, ("base_drafter", "target")), (PEFT_CONFIG, ())):
        file = directory / name
        values = json.loads(file.read_text(encoding="utf-8"))
        for key in keys:
            values[key]["name_or_path"] = last_name(values[key]["name_or_path"])
        if values.get("base_model_name_or_path"):
            # PEFT records where the drafter was read: of one from the Hub, a directory named by a commit.
            values["base_model_name_or_path"] = drafter
        file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
