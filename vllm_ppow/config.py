"""What a user may put under `"method": "ppow"`, and its translation into vLLM's native speculative config.

`rewrite` is a pure function of a dict: the adapter directory comes in, a native `eagle3` or `draft_model` config whose
drafter is loaded by our loader comes out. Every refusal that can be made from file headers is made here, in the process
the user started, so that it reaches the user as one sentence; `check` makes those that need no torch before vLLM is
started. Left out: where vLLM calls `rewrite` (compat/), and loading.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from vllm_ppow.artifact import (
    NATIVE_METHOD,
    Adapter,
    ArtifactError,
    compare_fingerprint,
    read_adapter,
    read_model_config,
)
from vllm_ppow.resolve import NotHereError, existing, resolve_base_drafter, resolve_directory

METHOD = "ppow"
LOAD_FORMAT = "ppow"
ADAPTER_KEY = "ppow_adapter"  # inside model_loader_extra_config: directory of the adapter
# inside model_loader_extra_config, only where swapping is on: from where adapters may come (hot_swap.py)
HOT_SWAP_KEY = "ppow_hot_swap"
WINDOW_KEY = "ppow_window"  # inside model_loader_extra_config: options of an adaptive window; absent: fixed
WINDOWS = ("auto", "adaptive", "fixed")
# Inside model_loader_extra_config: fingerprint of the target, None if it has none here.
TARGET_KEY = "ppow_target"
FINGERPRINT_KEY = "ppow_fingerprint"  # inside model_loader_extra_config: the adapter that was checked here

# vLLM takes these for another method when they occur anywhere in a draft model's path, even if a method is given
# (vllm/config/speculative.py, "Automatically detect the method"; 0.26 to 0.33).
_PATHS_TAKEN_FOR_ANOTHER_METHOD = ("eagle-", "eagle3", "dflash", "dspark")
_BASE_LOAD_FORMATS = (None, "auto", "hf", "safetensors")

# Under vLLM's own logger, so that lines look and are filtered as vLLM's.
logger = logging.getLogger("vllm.ppow.config")


class PPOWServingError(ArtifactError):
    """A speculative config that cannot be served; the message is one sentence with the remedy."""


@dataclasses.dataclass(frozen=True)
class PPOWOptions:
    """What a user may put under the key "ppow" of the speculative config.

    Attributes:
        base_drafter: directory or Hub repo id of the drafter, instead of the one the adapter recorded. Its
            fingerprint must be the recorded one all the same.
        allow_target_mismatch: serve a target other than the one the adapter was trained for, with a warning.
            Output stays the target's own; acceptance may drop.
        hot_swap: let the adapter be swapped while the engine runs (vllm_ppow.hot_swap).
        hot_swap_directory: directory whose adapters the server may be told over HTTP to swap to; besides them, the Hub
            repo that the adapter came from.
        window: "adaptive" drafts as many tokens per step as pay, at most num_speculative_tokens; "fixed" always
            drafts num_speculative_tokens; "auto" is "adaptive" but where vLLM would give up full CUDA graphs for it.
        min_tokens: tokens that an adaptive window drafts at least, 0 to num_speculative_tokens.
        per_request: let an adaptive window also trim drafts request by request, where this vLLM's runner can; None does
            on a CPU for which the adapter has a cost profile, while most requests are greedy.
    """

    base_drafter: str | None = None
    allow_target_mismatch: bool = False
    window: str = "auto"
    min_tokens: int = 0
    per_request: bool | None = None
    hot_swap: bool = False
    hot_swap_directory: str | None = None

    def __post_init__(self) -> None:
        if self.base_drafter is not None and not (isinstance(self.base_drafter, str) and self.base_drafter):
            raise PPOWServingError(
                f'"ppow": base_drafter must be a directory or Hub repo id, got {self.base_drafter!r}.'
            )
        for name in ("allow_target_mismatch", "per_request", "hot_swap"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (value is None and name == "per_request"):
                raise PPOWServingError(f'"ppow": {name} must be true or false, got {value!r}.')
        directory = self.hot_swap_directory
        if directory is not None and not (
            isinstance(directory, str) and _is_directory(directory) and self.hot_swap
        ):
            raise PPOWServingError(
                f'"ppow": hot_swap_directory must be an existing directory, and "hot_swap" true, got {directory!r}.'
            )
        if self.window not in WINDOWS:
            raise PPOWServingError(f'"ppow": window must be one of {list(WINDOWS)}, got {self.window!r}.')
        if isinstance(self.min_tokens, bool) or not isinstance(self.min_tokens, int) or self.min_tokens < 0:
            raise PPOWServingError(f'"ppow": min_tokens must be an integer >= 0, got {self.min_tokens!r}.')


def _is_directory(name: str) -> bool:
    path = existing(name)
    return path is not None and path.is_dir()


def parse_options(raw: Any) -> PPOWOptions:
    """Validate what stands under the key "ppow".

    Raises:
        PPOWServingError: not an object, an unknown key, or a value of the wrong kind.
    """
    if raw is None:
        return PPOWOptions()
    if not isinstance(raw, dict):
        raise PPOWServingError(f'"ppow" must hold an object of options, got {raw!r}.')
    known = [field.name for field in dataclasses.fields(PPOWOptions)]
    options = {str(key).replace("-", "_"): value for key, value in raw.items()}
    if unknown := sorted(set(options) - set(known)):
        raise PPOWServingError(f'"ppow" has unknown keys {unknown}: known are {known}.')
    return PPOWOptions(**options)


def is_ours(spec: Any) -> bool:
    """Whether a speculative config, as the user gave it, asks for method ppow."""
    return isinstance(spec, dict) and spec.get("method") == METHOD


def rewrite(
    spec: dict[str, Any],
    target: str,
    *,
    target_revision: str | None = None,
    download_dir: str | None = None,
    known_fields: Collection[str] | None = None,
) -> dict[str, Any]:
    """Translate a speculative config of method ppow into a native one; any other comes back as it is.

    Args:
        spec: the speculative config, `"model"` naming an adapter (directory or Hub repo id).
        target: directory or Hub repo id of the target being served.
        target_revision: Hub revision of the target.
        download_dir: where Hub downloads of the target go; None for the Hub client's own cache.
        known_fields: fields that this vLLM's SpeculativeConfig has; None to skip the check for keys unknown to it.

    Returns:
        A new dict of native fields. Rewriting it again changes nothing.

    Raises:
        ArtifactError: one sentence naming what is wrong and the remedy.
    """
    if not is_ours(spec):
        if isinstance(spec, dict) and "ppow" in spec:
            raise PPOWServingError(
                f'The key "ppow" needs "method": "ppow", got method {spec.get("method")!r}.'
            )
        return spec
    native, adapter = _translated(
        spec, target, target_revision=target_revision, download_dir=download_dir, known_fields=known_fields
    )
    from vllm_ppow.merge import Merger  # here, as it needs torch

    Merger(adapter).check_base(Path(native["model"]))
    return native


def check(
    spec: dict[str, Any],
    target: str | None,
    *,
    target_revision: str | None = None,
    download_dir: str | None = None,
    download: bool = True,
) -> None:
    """Make the refusals of `rewrite` that need neither torch nor vLLM; of a speculative config of method ppow.

    Args:
        spec, target_revision, download_dir: as in `rewrite`.
        target: as in `rewrite`; None where it is not known at which revision it will be served.
        download: fetch what the Hub cache lacks, as serving will.

    Raises:
        NotHereError: what is next to be checked would have to be downloaded.
        ArtifactError: as `rewrite`.
    """
    _translated(spec, target, target_revision=target_revision, download_dir=download_dir, download=download)


def check_keys(
    spec: dict[str, Any], known_fields: Collection[str] | None = None
) -> tuple[dict[str, Any], PPOWOptions]:
    """Make the refusals of `rewrite` that need no files.

    Returns:
        What of the speculative config is vLLM's, in its spelling, and what stands under "ppow".

    Raises:
        PPOWServingError: an unknown key, or a value that cannot be.
    """
    native = {key.replace("-", "_"): value for key, value in spec.items() if value is not None}
    options = parse_options(native.pop("ppow", None))
    _refuse_unknown(native, known_fields)
    if "num_speculative_tokens" in native:
        _check_length(native["num_speculative_tokens"])
    return native, options


def _translated(
    spec: dict[str, Any],
    target: str | None,
    *,
    target_revision: str | None,
    download_dir: str | None,
    known_fields: Collection[str] | None = None,
    download: bool = True,
) -> tuple[dict[str, Any], Adapter]:
    """The native config, and the adapter, whose tensors have not been looked at."""
    native, options = check_keys(spec, known_fields)
    name = native.pop("model", None)
    if not isinstance(name, str) or not name:
        raise PPOWServingError(
            f'Method ppow needs "model", the directory or Hub repo id of an adapter, got {name!r}.'
        )

    directory, from_hub = resolve_directory(name, native.pop("revision", None), download=download)
    adapter = read_adapter(directory)
    drafter = resolve_base_drafter(adapter, from_hub, options.base_drafter, download=download)
    base = Path(os.path.abspath(drafter))
    target_directory = fingerprint = None
    if target is not None:
        where = {"revision": target_revision, "cache_dir": download_dir, "download": download}
        target_directory, fingerprint = _check_target(adapter, target, options, where)
    if adapter.config.drafter_type == "eagle3":
        _check_taps(base, target_directory)
    else:
        check_draft_model_path(base)

    native["method"] = NATIVE_METHOD[adapter.config.drafter_type]
    native["model"] = str(base)
    native.setdefault("num_speculative_tokens", adapter.config.num_speculative_tokens)
    window = _window_options(options, native["num_speculative_tokens"])
    native["draft_load_config"] = _load_config(adapter, native.get("draft_load_config"), window)
    extra = native["draft_load_config"]["model_loader_extra_config"]
    extra[TARGET_KEY] = fingerprint
    if options.hot_swap:
        extra[HOT_SWAP_KEY] = _swappable(options.hot_swap_directory, name if from_hub else None)
    native.setdefault("draft_sample_method", adapter.config.draft_sample_method)
    return native, adapter


def _check_length(length: Any) -> None:
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise PPOWServingError(f"num_speculative_tokens must be an integer >= 1, got {length!r}.")


def _swappable(directory: str | None, repo: str | None) -> dict[str, str | None]:
    """Where adapters may be swapped from: a directory that the operator named, or the Hub repo of the first one."""
    return {"directory": os.path.abspath(Path(directory).expanduser()) if directory else None, "repo": repo}


def _refuse_unknown(spec: dict[str, Any], known_fields: Collection[str] | None) -> None:
    unknown = sorted(set(spec) - set(known_fields or ()))
    if misplaced := sorted(set(unknown) & {field.name for field in dataclasses.fields(PPOWOptions)}):
        raise PPOWServingError(f'The speculative config keys {misplaced} belong under the key "ppow": {{…}}.')
    if unknown and known_fields is not None:
        raise PPOWServingError(
            f'The speculative config has keys {unknown} that this vLLM does not know: known are "ppow" and '
            f"{sorted(known_fields)}."
        )


def _window_options(options: PPOWOptions, num_speculative_tokens: int) -> dict[str, Any] | None:
    """What travels to the scheduler of an adaptive window; None for a fixed one."""
    if options.window == "fixed":
        return None
    if options.min_tokens > num_speculative_tokens:
        raise PPOWServingError(
            f'"ppow": min_tokens must be at most num_speculative_tokens ({num_speculative_tokens}), got '
            f"{options.min_tokens}."
        )
    return {"min_tokens": options.min_tokens, "per_request": options.per_request}


def _load_config(adapter: Adapter, given: Any, window: dict[str, Any] | None) -> dict[str, Any]:
    """The draft_load_config that makes vLLM load the drafter with our loader; the user's own keys are kept."""
    load_config = dict(given) if isinstance(given, dict) else {}
    wrong_kind = given is not None and not isinstance(given, dict)
    if wrong_kind or load_config.get("load_format") not in _BASE_LOAD_FORMATS:
        raise PPOWServingError(
            "Method ppow reads the drafter's safetensors itself: draft_load_config must be an object with load_format "
            f"auto or safetensors, got {given!r}."
        )
    extra = load_config.get("model_loader_extra_config") or {}
    if not isinstance(extra, dict):
        raise PPOWServingError(
            f"draft_load_config: model_loader_extra_config must be an object, got {extra!r}: leave it out."
        )
    extra = dict(extra)
    extra[ADAPTER_KEY] = os.path.abspath(adapter.directory)
    extra[FINGERPRINT_KEY] = adapter.config.adapter_fingerprint
    if window is not None:
        extra[WINDOW_KEY] = window
    return {**load_config, "load_format": LOAD_FORMAT, "model_loader_extra_config": extra}


def _check_target(
    adapter: Adapter, target: str, options: PPOWOptions, where: dict[str, Any]
) -> tuple[Path | None, str | None]:
    """Check that the adapter was trained for this target; its directory and fingerprint, None if it has none here.

    Args:
        where: of the target, for `resolve_directory`.
    """
    recorded = adapter.config.target
    directory = found = None
    try:
        directory, _ = resolve_directory(target, **where)
        found, problem = compare_fingerprint(directory, recorded.fingerprint)
    except NotHereError:
        raise
    except ArtifactError as error:
        problem = f"it cannot be looked at: {str(error).rstrip('.')}"
    if not problem:
        return directory, found
    if options.allow_target_mismatch:
        logger.warning(
            "Adapter %s was trained for target %s; serving %s all the same (allow_target_mismatch): %s. Output stays "
            "the target's own, acceptance may drop.",
            adapter.directory,
            recorded.name_or_path,
            target,
            problem,
        )
        return directory, found
    raise PPOWServingError(
        f"Adapter {adapter.directory} was trained for target {recorded.name_or_path}, not for {target} ({problem}): "
        'serve that target, train an adapter for this one, or set "ppow": {"allow_target_mismatch": true}.'
    )


def _check_taps(base: Path, target: Path | None) -> None:
    """An EAGLE-3 head reads several hidden states of its target; refuse where vLLM would take fewer, and crash."""
    if target is None:
        return
    config = read_model_config(target)
    text = config.get("text_config")
    layers = config.get(
        "num_hidden_layers", text.get("num_hidden_layers") if isinstance(text, dict) else None
    )
    if not isinstance(layers, int):
        return  # vLLM reads it from a place only the architecture knows; it makes its own check
    head = read_model_config(base)
    eagle = head.get("eagle_config")
    key = "eagle_aux_hidden_state_layer_ids"
    named = head.get(key) or (eagle.get(key) if isinstance(eagle, dict) else None)
    taps = named or [2, layers // 2, layers - 3]
    if not isinstance(taps, list) or not all(type(tap) is int for tap in taps):
        raise PPOWServingError(
            f"{key} in {base / 'config.json'} must be a list of whole numbers, got {taps!r}: copy the drafter again."
        )
    if len(set(taps)) < len(taps) or not all(0 <= tap <= layers for tap in taps):
        raise PPOWServingError(
            f"Target {target} has {layers} layers, of which EAGLE-3 cannot read the hidden states {taps}, "
            f"{'named by the drafter' if named else 'the default'}: set eagle_aux_hidden_state_layer_ids to "
            f"different ones in {base / 'config.json'}, or use a target of at least 7 layers."
        )


def check_draft_model_path(base: Path) -> None:
    """Refuse a path under which vLLM would serve a draft_model by another method.

    Raises:
        PPOWServingError: it contains the name of one.
    """
    path = str(base).lower()
    if taken := [part for part in _PATHS_TAKEN_FOR_ANOTHER_METHOD if part in path]:
        raise PPOWServingError(
            f"The drafter's path {base} contains {taken[0]!r}, which vLLM takes for another speculative method: make a "
            'symbolic link to it under another path and name that ("ppow": {"base_drafter": LINK}).'
        )
