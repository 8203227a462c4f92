"""What a run leaves behind: the facts that the adapter records, and the files beside its tensors.

Left out: when it is written (training.py); the schema of the directory (vllm_ppow/artifact.py); the text of the card
(card.py).
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from ppow_train.card import write_card
from ppow_train.config import PPOWConfig
from ppow_train.options import PPOWOptions
from ppow_train.pair import Pair
from ppow_train.report import CURVE, write_curve
from ppow_train.selection import BestOnHeldOut
from ppow_train.types import Trajectories
from ppow_train.versions import installed_versions
from ppow_train.walk import ExpectedWalk
from vllm_ppow.artifact import AdapterConfig

# Options that say nothing of what was learned.
_UNRECORDED = ("push_", "hub_", "report_", "save_")


def training_facts(config: PPOWConfig, trajectories: Trajectories, updates: int) -> dict[str, Any]:
    """What was trained: options, and how many updates of how many windows on how many tokens."""
    values = config.to_dict()
    tokens = trajectories.num_continuation_tokens
    return {
        "objective": config.objective,
        "seed": config.seed,
        "updates": updates,
        "windows_per_update": config.windows_per_step,
        "learning_rate": config.learning_rate,
        "trajectories": len(trajectories),
        "tokens": tokens,
        "passes": round(config.passes(tokens, updates), 2),
        "options": {
            option.name: values[option.name]
            for option in dataclasses.fields(PPOWOptions)
            if not option.name.startswith(_UNRECORDED)
        },
    }


def held_out_facts(
    before: ExpectedWalk | None, after: ExpectedWalk | None, best: BestOnHeldOut | None
) -> dict[str, Any]:
    """What it gained on held-out prompts, as far as there are any, and how the adapter was chosen on others.

    A gain of the adapter that is written has to be seen on both: on the others it is mostly the best of several
    evaluations, and one of them is easily above the untrained drafter by chance.
    """
    facts: dict[str, Any] = {}
    if before and after:
        facts["report"] = {"prompts": len(before.num_drafts)} | _gain(before, after)
        facts["gain_above_zero"] = after.mean_accepted > before.mean_accepted
    if best:
        facts["selection"] = best.facts()
        facts["gain_above_zero"] = best.gains and facts.get("gain_above_zero", True)
    return facts


def _gain(before: ExpectedWalk, after: ExpectedWalk) -> dict[str, Any]:
    """Accepted tokens per draft, in all and by position."""
    return {
        name: {
            "accepted_per_draft": round(walk.mean_accepted, 4),
            "per_position": [round(share, 4) for share in walk.acceptance_per_position],
        }
        for name, walk in (("before", before), ("after", after))
    }


def adapter_config(pair: Pair, config: PPOWConfig, training: dict[str, Any]) -> AdapterConfig:
    """All that the adapter records; `training` are its facts."""
    return AdapterConfig(
        drafter_type=pair.drafter.drafter_type,
        base_drafter=pair.drafter_ref,
        target=pair.target_ref,
        num_speculative_tokens=config.num_speculative_tokens,
        draft_cost_ratio=config.draft_cost_ratio,
        draft_sample_method=config.draft_sample_method,
        temperature=config.serving_temperature,
        training=training,
        versions=installed_versions(),
    )


def write_files(directory: Path, recorded: AdapterConfig, peft_model: Any, window_log: Path) -> None:
    """PEFT's two files, the log of windows, the curve of selection if there was any, and the card.

    Embeddings are never saved, they are the base drafter's own.
    """
    with tempfile.TemporaryDirectory() as scratch:
        peft_model.save_pretrained(scratch, save_embedding_layers=False)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (directory / name).write_bytes((Path(scratch) / name).read_bytes())
    (directory / window_log.name).write_bytes(window_log.read_bytes())
    if "selection" in recorded.training:
        write_curve(directory / CURVE, recorded.training["selection"])
    write_card(directory, recorded)
