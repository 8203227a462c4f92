"""The model card of an adapter: README.md beside its tensors, made from what ppow_config.json records.

No path of the machine that trained stands in it: local models and prompts go by their last name. Left out: uploading
(push.py); measuring.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from ppow_train.objectives.formulas import formula
from ppow_train.options import PPOWOptions
from ppow_train.report import CURVE
from vllm_ppow.artifact import AdapterConfig, ModelRef

CARD = "README.md"


def write_card(
    directory: Path, config: AdapterConfig, parity: dict[str, Any] | None = None, repo_id: str | None = None
) -> None:
    """Write `CARD`, whole or not at all.

    Args:
        directory: the adapter's, with `report.CURVE` in it if there is one.
        config: what the adapter records.
        parity: `Parity.as_json()`, or None if it was not checked.
        repo_id: where the adapter will be on the Hub, if it will.
    """
    data = ModelCardData(library_name="peft", tags=["speculative-decoding", "vllm", "ppow"])
    if not _is_local(config.base_drafter):  # the Hub refuses what is no repo id
        data.base_model = config.base_drafter.name_or_path
        data["base_model_relation"] = "adapter"
    parts = [
        _head(config),
        _acceptance(config, parity),
        _selection(config) if (directory / CURVE).is_file() else "",
        _serving(config, repo_id or "ADAPTER"),
        _training(config),
        _limits(config),
    ]
    text = f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"
    temporary = directory / f".{CARD}.part"
    ModelCard(text).save(temporary)
    temporary.replace(directory / CARD)


def _is_local(ref: ModelRef) -> bool:
    return Path(ref.name_or_path).is_absolute()


def last_name(name_or_path: str) -> str:
    """A model's repo id, or the last part of its path: what may be told to others."""
    return Path(name_or_path).name if Path(name_or_path).is_absolute() else name_or_path


def _options(config: AdapterConfig) -> PPOWOptions:
    """As far as they are recorded, and known to this version."""
    known = {option.name for option in dataclasses.fields(PPOWOptions)}
    recorded = {name: value for name, value in config.training.get("options", {}).items() if name in known}
    return PPOWOptions(**recorded | {"objective": config.training["objective"]})


def _head(config: AdapterConfig) -> str:
    kind = {"eagle3": "EAGLE-3 head", "causal_lm": "causal LM"}[config.drafter_type]
    target, drafter = last_name(config.target.name_or_path), last_name(config.base_drafter.name_or_path)
    return (
        f"# Drafter adapter for {target}\n\n"
        f"A LoRA adapter for the speculative-decoding drafter `{drafter}` ({kind}) of the target `{target}`, trained "
        f"by vllm-ppow (after [arXiv 2605.14978](https://arxiv.org/abs/2605.14978)) for drafts of "
        f"{config.num_speculative_tokens} tokens, {config.draft_sample_method} at temperature {config.temperature:g}. "
        "The target verifies every token: the adapter changes speed, not what is said."
    )


def _acceptance(config: AdapterConfig, parity: dict[str, Any] | None) -> str:
    report = config.training.get("report")
    if report is None:
        return "## Acceptance\n\nNot measured: there were no held-out prompts."
    rows = "\n".join(
        f"| {arm} | {report[key]['accepted_per_draft']:.3f} | "
        + " ".join(f"{share:.3f}" for share in report[key]["per_position"])
        + " |"
        for arm, key in (("drafter alone", "before"), ("with this adapter", "after"))
    )
    return (
        "## Acceptance\n\n| | accepted tokens per draft | share of drafts accepted up to position 1, 2, … |\n"
        f"|---|---|---|\n{rows}\n\n"
        f"Expected along the target's continuations of {report['prompts']} held-out prompts, bonus token excluded; "
        f"neither trained nor selected on. {_parity(parity)}"
    )


def _parity(parity: dict[str, Any] | None) -> str:
    if parity is None:
        return "Parity with vLLM's counters: not checked."
    verdict = "agrees at every position" if parity["holds"] else "**differs**: do not trust these figures"
    return (
        f"Parity with vLLM's counters: {verdict} ({parity['served_accepted_per_draft']:.3f} counted, "
        f"{parity['simulated_accepted_per_draft']:.3f} simulated)."
    )


def _selection(config: AdapterConfig) -> str:
    selection = config.training["selection"]
    diverged = selection.get("diverged_at_update")
    ended = "" if diverged is None else f" (update {diverged} diverged and ended the run)"
    updates = config.training["updates"]
    written = (
        f"after {selection['written_after_updates']} of {updates} updates{ended}, by its expected"
        if selection.get("keep_best", True)  # adapters of earlier versions do not say
        else f"after the last of {updates} updates (`keep_best: false`), which need not be the best. Expected"
    )
    return (
        f"Written is the adapter {written} acceptance on {selection['prompts']} other held-out prompts:\n\n"
        f"![accepted tokens per draft over updates]({CURVE})"
    )


def _serving(config: AdapterConfig, name: str) -> str:
    spec: dict[str, Any] = {"method": "ppow", "model": name}
    if _is_local(config.base_drafter):
        spec["ppow"] = {"base_drafter": last_name(config.base_drafter.name_or_path)}
    return (
        "## Serve\n\nWith vllm-ppow installed:\n\n```\n"
        f"vllm serve {last_name(config.target.name_or_path)} --speculative-config '{json.dumps(spec)}'\n```"
    )


def _further(config: AdapterConfig) -> str:
    """What is to be added of continuations after the first."""
    continuations = _options(config).continuations
    if continuations == 1:
        return ""
    sampled = ", the first greedy, the others sampled" if config.temperature == 0 else ""
    return f" ({continuations} of each prompt{sampled})"


def _training(config: AdapterConfig) -> str:
    facts = config.training
    versions = ", ".join(f"{name} {version}" for name, version in config.versions.items())
    options = yaml.safe_dump(facts.get("options", {}), sort_keys=False, allow_unicode=True)
    source = facts.get("prompts") or "not recorded"
    return (
        f"## Training\n\nData: {facts['trajectories']:,} continuations by the target at temperature "
        f"{config.temperature:g}{_further(config)}, {facts['tokens']:,} tokens, of the prompts in `{source}`.\n\n"
        f"Objective `{facts['objective']}`: {formula(_options(config))}. {facts['updates']} updates of "
        f"{facts['windows_per_update']} windows, seed {facts['seed']}; {versions}.\n\n```yaml\n{options}```"
    )


def _limits(config: AdapterConfig) -> str:
    lines = [
        "Speed was not measured for this card (`ppow bench` does): more accepted tokens are faster only where a draft "
        "step is cheap.",
        "Prompts unlike the training prompts may gain nothing, or lose.",
        f"It fits this drafter (`{config.base_drafter.fingerprint[:19]}…`) and this target "
        f"(`{config.target.fingerprint[:19]}…`) only; others are refused.",
    ]
    if config.training.get("gain_above_zero") is False:
        lines.insert(
            0, "**On held-out prompts it accepted no more than the drafter alone: do not serve it.**"
        )
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)
