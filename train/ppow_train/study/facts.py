"""What results of a study depend on beside the names in their keys: facts of every cell and every arm, on disk.

    DIR/facts.json   {"cells": {name: facts}, "arms": {name: facts}}

A plan may grow by cells, arms, seeds and steps; where a cell or an arm has results, its own facts must stay. Results
that an older version wrote have no record: what the plan says then is taken for it. Left out: results (results.py).
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ppow_train.errors import UserError
from ppow_train.options import PPOWOptions
from ppow_train.study.plan import DECIDED_ELSEWHERE, Cell, Plan
from ppow_train.study.results import Results

FACTS = "facts.json"

# Options that say nothing of what is learned, or where the plan says it otherwise: they may change.
_FREE = (*DECIDED_ELSEWHERE, "target_cache", "windows_per_forward", "logging_steps")
_FREE_KINDS = ("push_", "hub_", "report_", "save_", "log_")

Facts = dict[str, dict[str, dict[str, Any]]]  # "cells" or "arms" -> name -> facts


def plan_facts(plan: Plan) -> Facts:
    """What a plan says of its cells and arms; prompts by their content, as far as the files are there."""
    cells = {
        cell.name: {
            "temperature": cell.temperature,
            "tuning_prompts": plan.tuning_prompts,
            "max_new_tokens": plan.max_new_tokens,
            "max_tokens": plan.max_tokens,
            **_digests(cell),
        }
        for cell in plan.cells
    }
    arms = {arm: _bound({**_defaults(), **_plain(plan.options_of(arm))}) for arm in plan.arms}
    return {"cells": cells, "arms": arms}


def model_facts(target: str, drafter: str, device: str) -> dict[str, Any]:
    """What else the results of a cell depend on: models by their weights, and where they run."""
    from vllm_ppow.artifact import fingerprint_model
    from vllm_ppow.resolve import resolve_directory

    found = {name: fingerprint_model(resolve_directory(name)[0]) for name in (target, drafter)}
    return {"target": found[target], "drafter": found[drafter], "device": device}


def check_facts(results: Results, now: Facts) -> None:
    """Refuse a plan under which the results that are there would not have come out.

    Raises:
        UserError: names the cell or arm, what it was and what the plan says.
    """
    _compare(results, read_facts(results.directory), now)


def record_facts(results: Results, now: Facts, say: Callable[[str], None] = lambda text: None) -> None:
    """Check them, and write down those that are not on record; `say` is told of results that had none.

    Raises:
        UserError: as `check_facts`.
    """
    directory = results.directory
    with (directory / ".facts.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes that begin at once
        recorded = read_facts(directory)
        _compare(results, recorded, now)
        used = _used(results)
        taken = [
            name for kind in now for name in used[kind] if name in now[kind] and name not in recorded[kind]
        ]
        merged: Facts = {kind: dict(recorded[kind]) for kind in now}
        for kind, named in now.items():
            for name, facts in named.items():
                known = recorded[kind].get(name, {}) if name in used[kind] else {}
                merged[kind][name] = {**known, **facts}
        if merged != recorded:
            temporary = directory / f".{FACTS}.part"
            temporary.write_text(json.dumps(merged, indent=1) + "\n", encoding="utf-8")
            temporary.replace(directory / FACTS)
    if taken:
        say(
            f"{directory} had no record of what its results were made with: what the plan says now was written down "
            f"for {'; '.join(taken)}."
        )


def read_facts(directory: Path) -> Facts:
    """What is on record; empty before.

    Raises:
        UserError: the file is damaged.
    """
    file = directory / FACTS
    if not file.exists():
        return {"cells": {}, "arms": {}}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {"cells": dict(found["cells"]), "arms": dict(found["arms"])}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is damaged: remove it, and what the plan says is written down anew."
        ) from error


def _used(results: Results) -> dict[str, list[str]]:
    """Names that have results, in order."""
    keys = list(results.read())
    return {
        "cells": list(dict.fromkeys(key.cell for key in keys)),
        "arms": list(dict.fromkeys(key.arm for key in keys if key.arm is not None)),
    }


def _compare(results: Results, recorded: Facts, now: Facts) -> None:
    from ppow_train.trajectory_store import describe_changes

    used = _used(results)
    for kind, named in now.items():
        for name in (one for one in used[kind] if one in recorded[kind] and one in named):
            before, after = _comparable(kind, recorded[kind][name], named[name])
            if changes := describe_changes(before, after):
                raise UserError(
                    f"{results.directory} holds results of the {kind[:-1]} {name!r} with {changes}: give the same "
                    "plan, another name in it, or another --output."
                )


def _comparable(
    kind: str, before: dict[str, Any], now: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of a cell what both know: a table is made without its models. Of an arm all that was ever set."""
    if kind == "cells":
        both = before.keys() & now.keys()
        return {name: before[name] for name in both}, {name: now[name] for name in both}
    if before.keys() == now.keys():
        return before, now
    from ppow_train.config import PPOWConfig

    # What one side does not have, as plans set TRL's own options or versions differ, is at its default there.
    known = {option.name: option.default for option in dataclasses.fields(PPOWConfig)}
    defaults = {name: known[name] for name in before.keys() | now.keys() if name in known}
    return {**defaults, **before}, {**defaults, **now}


def _defaults() -> dict[str, Any]:
    """Every default of PPOW, so that another one in a later version is noticed."""
    return {option.name: option.default for option in dataclasses.fields(PPOWOptions)}


def _bound(options: dict[str, Any]) -> dict[str, Any]:
    """Those that must stay where there are results."""
    lora = PPOWOptions(lora_rank=options["lora_rank"], lora_alpha=options["lora_alpha"])
    options = {**options, "lora_alpha": lora.resolved_lora_alpha}
    return {
        name: value
        for name, value in options.items()
        if name not in _FREE and not name.startswith(_FREE_KINDS)
    }


def _digests(cell: Cell) -> dict[str, str]:
    files = {"prompts": Path(cell.prompts), "held_out": Path(cell.held_out)}
    return {
        name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items() if file.is_file()
    }


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives them back."""
    return json.loads(json.dumps(values))
