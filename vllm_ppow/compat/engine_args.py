"""vLLM's EngineArgs: accepts method ppow and hands vLLM a native speculative config.

Every shim here works on 0.26 to 0.33, and can go when vLLM lets plugins register a speculative method. Left out:
the translation itself (config.py).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

from vllm_ppow.compat import hot_swap, seams
from vllm_ppow.config import LOAD_FORMAT, METHOD, PPOWServingError, is_ours, parse_options, rewrite

_MODULE = "vllm.engine.arg_utils"
# Module, class, method and parameters of what is wrapped here.
SEAMS: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    (
        _MODULE,
        "EngineArgs",
        "create_speculative_config",
        ("target_model_config", "target_parallel_config"),
    ),
    (_MODULE, "EngineArgs", "create_engine_config", ()),
    (_MODULE, "EngineArgs", "add_cli_args", ("parser",)),
)
# vLLM's short flags and the speculative config's keys they stand for.
_FLAGS = {"spec_method": "method", "spec_model": "model", "spec_tokens": "num_speculative_tokens"}


def install() -> None:
    """Wrap the three methods of EngineArgs.

    Raises:
        SeamMissingError: this vLLM lacks one of them.
    """
    makers = (_rewriting_speculative_config, _proving_engine_config, _offering_ppow)
    for seam, make in zip(SEAMS, makers, strict=True):
        seams.wrap(*seam, make)


def serves_ppow(speculative_config: Any) -> bool:
    """Whether a validated SpeculativeConfig (or None) loads its drafter with our loader."""
    if speculative_config is None or speculative_config.draft_load_config is None:
        return False
    return speculative_config.draft_load_config.load_format == LOAD_FORMAT


def requested(args: Any) -> dict[str, Any] | None:
    """The speculative config that EngineArgs ask for, short flags folded in, if its method is ppow; else None.

    A key given both ways is left alone: vLLM refuses it with its own words.
    """
    spec = dict(args.speculative_config or {})
    for flag, key in _FLAGS.items():
        value = getattr(args, flag)
        if value is not None:
            if key in spec:
                return None
            spec[key] = value
    return spec if is_ours(spec) or (spec and "ppow" in spec) else None


def _rewriting_speculative_config(original: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM validates the method against a fixed Literal here: rewrite the user's dict just before."""

    def create_speculative_config(self: Any, target_model_config: Any, target_parallel_config: Any) -> Any:
        spec = requested(self)
        if spec is None:
            return original(self, target_model_config, target_parallel_config)
        from vllm.config import SpeculativeConfig

        from vllm_ppow.compat import window, worker

        install()  # nothing is served unless the proof of the engine's config and those of the workers are in place
        worker.require()
        known_fields = _user_fields(SpeculativeConfig)
        native = rewrite(
            spec,
            target_model_config.model,
            target_revision=target_model_config.revision,
            download_dir=self.download_dir,
            known_fields=known_fields,
        )
        window.prepare(native, self, known_fields)
        self.speculative_config = dict(native)  # vLLM adds the target's configs to this very dict
        for flag in _FLAGS:
            setattr(self, flag, None)
        config = original(self, target_model_config, target_parallel_config)
        if config.method != native["method"]:
            raise PPOWServingError(
                f"vLLM turned method {native['method']!r} of drafter {native['model']} into {config.method!r}, which "
                "would not load the adapter: give the drafter another path."
            )
        return config

    return create_speculative_config


def _proving_engine_config(original: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM replaces the method when TARGET is itself a drafter in speculators format: never serve that silently."""

    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm_ppow.compat import engine_choice, window

        engine_choice.forget()
        spec = requested(self)
        if spec is None or not is_ours(spec):
            # Arguments that a config was built of before hold a native one that is still ours.
            config = _built_again(original(self, *args, **kwargs), lambda: original(self, *args, **kwargs))
            _check_stages(config)
            window.attach(config)
            return config
        options = parse_options(spec.get("ppow"))
        if options.hot_swap:
            hot_swap.prepare(self)
        given = copy.copy(self)  # vLLM fills in arguments while it builds

        def build(changes: dict[str, Any]) -> Any:
            """The config with other options of ours; from then on it is the one of these arguments."""
            vars(self).update(vars(given))
            self.speculative_config = {**spec, "ppow": {**(spec.get("ppow") or {}), **changes}}
            for flag in _FLAGS:
                setattr(self, flag, None)
            return _proved(original(self, *args, **kwargs), target, options.hot_swap)

        target = self.model
        config = _proved(original(self, *args, **kwargs), target, options.hot_swap)
        config = engine_choice.settle(config, options.window, build)
        window.attach(config)
        return config

    return create_engine_config


def _built_again(config: Any, build: Callable[[], Any]) -> Any:
    """A second config of the same arguments, on a model runner that leaves the output alone."""
    from vllm_ppow.compat import engine_choice

    return engine_choice.on_safe_runner(config, build) if serves_ppow(config.speculative_config) else config


def _proved(config: Any, target: str, hot_swaps: bool) -> Any:
    """A finished config, if it serves method ppow.

    Raises:
        PPOWServingError: naming what to change.
    """
    if hot_swaps:
        hot_swap.check_engine(config)
    if not serves_ppow(config.speculative_config):
        raise PPOWServingError(
            f"vLLM dropped method ppow from the speculative config, because {target} is a drafter itself: give the "
            'target as the model to serve, and the adapter under "model" of the speculative config.'
        )
    _check_stages(config)
    return config


def _check_stages(config: Any) -> None:
    """Refuse pipeline stages where vLLM looks for the drafter in each of them (0.32: as if it were there).

    Raises:
        PPOWServingError: naming what to change.
    """
    stages = config.parallel_config.pipeline_parallel_size
    if stages > 1 and serves_ppow(config.speculative_config) and not config.use_v2_model_runner:
        raise PPOWServingError(
            f"vLLM's V1 model runner, which this engine runs on, cannot draft in {stages} pipeline stages: give "
            "--tensor-parallel-size instead of --pipeline-parallel-size."
        )


def _offering_ppow(original: Callable[..., Any]) -> Callable[..., Any]:
    """argparse checks --spec-method against the same Literal: add our name to the action's choices."""

    def add_cli_args(parser: Any, *args: Any, **kwargs: Any) -> Any:
        parser = original(parser, *args, **kwargs)
        action = parser._option_string_actions.get("--spec-method")
        if action is not None and action.choices is not None and METHOD not in action.choices:
            action.choices = [*action.choices, METHOD]
        return parser

    return add_cli_args


def _user_fields(config_class: Any) -> list[str]:
    """Fields of SpeculativeConfig that a user may set; vLLM fills in the target's and the drafter's configs."""
    filled_in = {
        "target_model_config",
        "target_parallel_config",
        "draft_model_config",
        "draft_parallel_config",
    }
    return sorted({field.name for field in dataclasses.fields(config_class)} - filled_in)
