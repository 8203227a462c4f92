"""Whether a drafter's config.json and its tensors agree, told to `ppow doctor` by the code that loads it for training.

Only the headers of its files are read. Left out: what the tensors hold, what an adapter changes (vllm_ppow/merge.py).
"""

from __future__ import annotations

from pathlib import Path

from ppow_train.errors import UserError
from vllm_ppow.artifact import ArtifactError


def compare_sizes(drafter: Path, target: Path) -> tuple[bool, str]:
    """Compare them.

    Args:
        target: directory of the target, to which an EAGLE-3 head may leave its embeddings.

    Returns:
        Whether nothing speaks against serving it, and a sentence, with the remedy where something does. Where a library
        is absent that only training brings, nothing does.
    """
    try:
        from ppow_train.drafters import check_drafter
        from ppow_train.progress import quiet_libraries

        quiet_libraries()
        check_drafter(drafter, target)
    except ModuleNotFoundError as error:
        return True, f"not compared with its config.json: {error.name} is not installed"
    except (UserError, ArtifactError) as error:
        return False, str(error)
    return True, "its config.json fits its tensors"
