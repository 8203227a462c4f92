"""The cost profile beside an adapter's files, where it holds for the engine that is being built. Left out: its form."""

from __future__ import annotations

from typing import Any

from vllm_ppow.compat import profiling
from vllm_ppow.config import ADAPTER_KEY, FINGERPRINT_KEY, TARGET_KEY
from vllm_ppow.cost_profile import CostProfile, CostProfileError, read_cost_profile


def usable_profile(vllm_config: Any) -> tuple[CostProfile | None, str | None]:
    """The cost profile beside an adapter's files, or None; why one that is there cannot be used, or None."""
    extra = vllm_config.speculative_config.draft_load_config.model_loader_extra_config
    try:
        profile = read_cost_profile(extra[ADAPTER_KEY])
    except CostProfileError as error:
        return None, str(error)
    if profile is None:
        return None, None
    here = {
        **profiling.machine(vllm_config),
        "adapter_fingerprint": extra[FINGERPRINT_KEY],
        "target_fingerprint": extra.get(TARGET_KEY),
    }
    if differences := profile.differences(**here):
        return None, (
            f"the adapter's cost profile is of another set-up ({'; '.join(differences)}); measure again with ppow "
            "profile."
        )
    return profile, None
