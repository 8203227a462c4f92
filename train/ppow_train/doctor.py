"""Whether an adapter would be served here, what vLLM would be told, and why: one check after another, nothing started.

Each check asks the code that serving itself uses (vllm_ppow.artifact, .merge, .config, .compat.capabilities), so that
what is fine here is fine there. A check that others build on ends the examination of what depends on it only. Left
out: printing (commands/doctor.py); starting an engine, whose memory and kernels no check of files can promise.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from ppow_train.context_length import UNDRAFTED, context_length, inner_config
from ppow_train.drafter_sizes import compare_sizes
from vllm_ppow.artifact import (
    Adapter,
    ArtifactError,
    fingerprint_model,
    model_weight_files,
    read_adapter,
    read_model_config,
    safetensors_ranges,
)
from vllm_ppow.compat.capabilities import installed_distribution, probe
from vllm_ppow.cost_profile import CostProfileError, read_cost_profile
from vllm_ppow.resolve import existing, is_offline, resolve_base_drafter, resolve_directory

Status = Literal["ok", "warn", "fail"]
_LOW_DISK = 2**30


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what.
        status: "fail" means that it would not be served; "warn" that it would, but perhaps not as wished.
        detail: what was found, and what follows from it.
        remedy: what to do; empty when nothing need be done.
    """

    name: str
    status: Status
    detail: str
    remedy: str = ""


@dataclasses.dataclass
class Diagnosis:
    """All checks, and the native speculative config that vLLM would be given (None if it would be refused)."""

    checks: list[Check] = dataclasses.field(default_factory=list)
    native: dict[str, Any] | None = None

    @property
    def serves(self) -> bool:
        """Whether no check failed."""
        return all(check.status != "fail" for check in self.checks)

    def add(self, name: str, status: Status, detail: str, remedy: str = "") -> None:
        """Note one check."""
        self.checks.append(Check(name, status, detail, remedy))

    def attempt(self, name: str, ask: Callable[[], tuple[Any, str]]) -> Any:
        """Note a check by what `ask` returns (value, detail) or refuses; the value, or None if it refused."""
        try:
            value, detail = ask()
        except ArtifactError as error:  # its sentence holds the remedy
            self.add(name, "fail", str(error))
            return None
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in ("torch", "safetensors"):
                raise
            self.add(
                name, "fail", f"not checked, {error.name} is not installed.", "install vLLM, which brings it."
            )
            return None
        self.add(name, "ok", detail)
        return value


@dataclasses.dataclass(frozen=True)
class Question:
    """What the user wants to serve; names are directories or Hub repo ids."""

    target: str
    adapter: str
    adapter_revision: str | None = None
    base_drafter: str | None = None
    num_speculative_tokens: int | None = None
    allow_target_mismatch: bool = False


def examine(question: Question) -> Diagnosis:
    """Make every check."""
    diagnosis = Diagnosis()
    _environment(diagnosis)
    _hub(diagnosis, question)
    adapter, base, target = _models(diagnosis, question)
    if adapter and base and target:
        fits, detail = compare_sizes(base, target)
        diagnosis.add("drafter sizes", "ok" if fits else "fail", detail)
        _vocabularies(diagnosis, adapter, base, target)
        _context_lengths(diagnosis, base, target)
    if adapter:
        _drafting(diagnosis, adapter, question.num_speculative_tokens)
        _cost_profile(diagnosis, adapter, question.allow_target_mismatch)
    if adapter and base:
        _native_config(diagnosis, question)
    return diagnosis


# ---------------------------------------------------------------- this machine


def _environment(diagnosis: Diagnosis) -> None:
    fine = (3, 11) <= sys.version_info[:2] <= (3, 13)
    diagnosis.add(
        "Python",
        "ok" if fine else "fail",
        platform.python_version(),
        "" if fine else "use Python 3.11, 3.12 or 3.13.",
    )
    try:
        import torch
    except ImportError as error:
        diagnosis.add("torch", "fail", f"cannot be imported: {error}.", "install vLLM, which brings it.")
    else:
        devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
        where = (
            f"{devices} × {torch.cuda.get_device_name(0)}" if devices else "no CUDA device, the CPU is used"
        )
        diagnosis.add("torch", "ok", f"{torch.__version__}; {where}")
    _vllm(diagnosis)


def _vllm(diagnosis: Diagnosis) -> None:
    found = installed_distribution()
    if found is None:
        diagnosis.add(
            "vLLM",
            "fail",
            "not installed: nothing can be served here; what follows was checked without it.",
            "pip install '.[cpu]', or '.[gpu]' for an NVIDIA GPU, in vllm-ppow's checkout.",
        )
        return
    try:
        has = probe()
    except Exception as error:  # a broken installation fails in a hundred ways
        diagnosis.add(
            "vLLM",
            "fail",
            f"{' '.join(found)} cannot be imported: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
            "python -m vllm_ppow.compat.cpu_install heals two known faults of CPU installs.",
        )
        return
    name = f"{has.distribution} {has.version}"
    if has.missing:
        for sentence in has.missing:
            diagnosis.add("vLLM", "fail", sentence)
    elif has.tested:
        diagnosis.add("vLLM", "ok", f"{name}, on which the tests of serving ran; all hooks are there")
    else:
        diagnosis.add("vLLM", "warn", f"{name} has every hook, but the tests did not run on it")
    _plugin(diagnosis, has.registered)
    for layer, there in has.layers.items():
        fine = there or layer.endswith("V2 model runner")  # that runner then does without, or is not used
        diagnosis.add(layer, "ok" if fine else "warn", f"this vLLM {'has' if there else 'does not have'} it")


def _plugin(diagnosis: Diagnosis, registered: bool) -> None:
    allowed = os.environ.get("VLLM_PLUGINS")
    if not registered:
        diagnosis.add(
            "plugin",
            "fail",
            "vLLM does not find the entry point.",
            "install vllm-ppow into this environment.",
        )
    elif allowed is not None and "ppow" not in allowed.split(","):
        diagnosis.add(
            "plugin",
            "fail",
            f"VLLM_PLUGINS={allowed!r} keeps it from being loaded.",
            "add ppow to it, or unset it.",
        )
    else:
        diagnosis.add(
            "plugin", "ok", f"vllm-ppow {importlib.metadata.version('vllm-ppow')} is registered with vLLM"
        )


def _hub(diagnosis: Diagnosis, question: Question) -> None:
    """Only where a Hub repo is named: nothing is asked of the network for directories."""
    named = [
        name
        for name in (question.target, question.adapter, question.base_drafter)
        if name and existing(name) is None and name.count("/") == 1 and name[0] not in "./~"
    ]
    if not named:
        return
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE)
    standing = next(path for path in (cache, *cache.parents) if path.exists())
    free = shutil.disk_usage(standing).free
    where = (
        "offline (HF_HUB_OFFLINE): only what is in its cache"
        if is_offline()
        else "downloads what its cache lacks"
    )
    diagnosis.add(
        "Hub",
        "ok" if is_offline() or free >= _LOW_DISK else "warn",
        f"{', '.join(named)}: {where}; {free / 2**30:.1f} GiB free at {cache}",
        "" if is_offline() or free >= _LOW_DISK else "free some room, or set HF_HOME to a larger disk.",
    )


# ---------------------------------------------------------------- adapter, drafter, target


def _models(diagnosis: Diagnosis, question: Question) -> tuple[Adapter | None, Path | None, Path | None]:
    def read() -> tuple[tuple[Adapter, bool], str]:
        directory, from_hub = resolve_directory(question.adapter, question.adapter_revision)
        adapter = read_adapter(directory)
        config = adapter.config
        return (
            adapter,
            from_hub,
        ), f"{directory}: {config.drafter_type}, {config.adapter_fingerprint[:19]}…, complete"

    found = diagnosis.attempt("adapter", read)
    target = diagnosis.attempt("target", lambda: _target(question, found[0] if found else None))
    if found is None:
        return None, None, target
    adapter, from_hub = found
    base = diagnosis.attempt("drafter", lambda: _drafter(adapter, from_hub, question.base_drafter))
    return adapter, base, target


def _target(question: Question, adapter: Adapter | None) -> tuple[Path, str]:
    directory, _ = resolve_directory(question.target)
    layers = inner_config(read_model_config(directory)).get("num_hidden_layers")
    trained_for = ""
    if adapter:
        same = fingerprint_model(directory) == adapter.config.target.fingerprint
        if not same and not question.allow_target_mismatch:
            raise ArtifactError(
                f"{directory} is not the target that the adapter was trained for, "
                f"{adapter.config.target.name_or_path}: serve that one, or give --allow-target-mismatch."
            )
        trained_for = (
            ", the one the adapter was trained for" if same else ", not the one the adapter was trained for"
        )
    return directory, f"{directory}: {layers} layers{trained_for}"


def _drafter(adapter: Adapter, from_hub: bool, override: str | None) -> tuple[Path, str]:
    base = resolve_base_drafter(adapter, from_hub, override)
    from vllm_ppow.merge import Merger

    merger = Merger(adapter)
    merger.check_base(base)
    return base, f"{base}: the adapter changes {len(merger.modules)} of its tensors, all of them are there"


def _vocabularies(diagnosis: Diagnosis, adapter: Adapter, base: Path, target: Path) -> None:
    of_target = inner_config(read_model_config(target)).get("vocab_size")
    config = read_model_config(base)
    of_drafter = inner_config(config).get("vocab_size")
    if adapter.config.drafter_type == "causal_lm":
        same = of_target == of_drafter
        diagnosis.add(
            "vocabulary",
            "ok" if same else "fail",
            f"{of_drafter} tokens of the drafter, {of_target} of the target",
            ""
            if same
            else "vLLM refuses a draft_model of another vocabulary: use a drafter of the target's own.",
        )
        return
    drafted = config.get("draft_vocab_size") or of_drafter
    if drafted == of_target:
        diagnosis.add("vocabulary", "ok", f"the drafter can draft each of the target's {of_target} tokens")
        return
    found = {
        name: shape
        for file in model_weight_files(base)
        for name, (shape, *_) in safetensors_ranges(file).items()
    }
    mapped = found.get("d2t", "").endswith(f"[{drafted}]")
    diagnosis.add(
        "vocabulary",
        "ok" if mapped else "fail",
        f"the drafter drafts {drafted} of the target's {of_target} tokens"
        + (", mapped by d2t" if mapped else f", its d2t is {found.get('d2t', 'missing')}"),
        "" if mapped else "copy the drafter again: d2t must map each of its tokens to the target's.",
    )


def _context_lengths(diagnosis: Diagnosis, base: Path, target: Path) -> None:
    drafter, whole = (context_length(directory) for directory in (base, target))
    if drafter is None or whole is None:
        diagnosis.add(
            "context", "ok", f"config.json of {base if drafter is None else target} does not say its length"
        )
    elif drafter >= whole:
        diagnosis.add("context", "ok", f"the drafter takes {drafter} tokens, the target {whole}")
    else:
        diagnosis.add(
            "context",
            "warn",
            f"the drafter takes {drafter} tokens, the target {whole}: {UNDRAFTED}",
            f"--max-model-len {drafter} if requests are never longer.",
        )


def _drafting(diagnosis: Diagnosis, adapter: Adapter, asked: int | None) -> None:
    config = adapter.config
    trained = config.num_speculative_tokens
    beyond = asked is not None and asked > trained
    diagnosis.add(
        "draft length",
        "warn" if beyond else "ok",
        f"{asked or trained} tokens at most, trained for {trained}",
        f"-K {trained}: later positions were not trained." if beyond else "",
    )
    diagnosis.add(
        "draft sampling",
        "ok",
        f"{config.draft_sample_method}, as the adapter was trained for at temperature {config.temperature:g}",
    )


def _cost_profile(diagnosis: Diagnosis, adapter: Adapter, another_target: bool) -> None:
    """What the draft window starts from. How a server will run (dtype, graphs, quantisation) is not known here."""
    try:
        profile = read_cost_profile(adapter.directory)
    except CostProfileError as error:
        diagnosis.add("cost profile", "warn", f"learned while serving: {error}")
        return
    if profile is None:
        detail = "none: costs are learned while serving, or measured by ppow profile"
        diagnosis.add(
            "cost profile", "ok", detail + ", which also has a CPU trim the drafts of greedy requests"
        )
        return
    found = installed_distribution()
    differences = profile.differences(
        vllm_version=found[1] if found else None,
        adapter_fingerprint=adapter.config.adapter_fingerprint,
        target_fingerprint=None if another_target else adapter.config.target.fingerprint,
    )
    if differences:
        detail = f"of another set-up ({'; '.join(differences)}), so that costs are learned while serving"
        diagnosis.add("cost profile", "warn", detail, "measure again with ppow profile.")
        return
    detail = f"of {profile.device}: {profile.set_up}; used by a server that runs so"
    diagnosis.add("cost profile", "ok", detail + ", which on a CPU trims the drafts of greedy requests")


def _native_config(diagnosis: Diagnosis, question: Question) -> None:
    def ask() -> tuple[dict[str, Any], str]:
        from vllm_ppow.config import rewrite

        ppow: dict[str, Any] = {"base_drafter": question.base_drafter} if question.base_drafter else {}
        if question.allow_target_mismatch:
            ppow["allow_target_mismatch"] = True
        spec = {
            "method": "ppow",
            "model": question.adapter,
            "revision": question.adapter_revision,
            "num_speculative_tokens": question.num_speculative_tokens,
            "ppow": ppow,
        }
        native = rewrite(spec, question.target)
        return (
            native,
            f"method ppow becomes vLLM's own {native['method']}, the adapter merged while its drafter loads",
        )

    diagnosis.native = diagnosis.attempt("config", ask)
