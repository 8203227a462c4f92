"""What can be decided only on vLLM's finished config, and then needs another one: the model runner, and the window.

Two things that a GPU showed (0.26.0, H200; examples/benchmarks/gpu.md):

- The V2 model runner (of 0.26; 0.31's does not) draws the token in place of a rejected one with the noise that drew the
  draft (vllm-project/vllm#54282): sampled drafts change the output's distribution. The V1 runner does not.
- With draft lengths that may change, vLLM's V1 runner gives up full CUDA graphs, which costs more than a window earns.

Left out: how a config is built (engine_args.py), what else forbids an adaptive window (window.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from vllm_ppow.compat import profiling, seams, v2_runner, window
from vllm_ppow.compat.capabilities import V2_RUNNER
from vllm_ppow.config import PPOWServingError

_WHY = (
    "the V2 model runner of this vLLM draws the token in place of a rejected one with the noise that drew the draft "
    "(vllm-project/vllm#54282, mended by 0.31), so that sampled drafts would change the output"
)
# Changes of the options under "ppow" -> vLLM's finished config with them.
Build = Callable[[dict[str, Any]], Any]


# Whether V2_RUNNER is set because of us.
_chosen_here = False


def forget() -> None:
    """Undo what an engine before needed of the environment: the next one may be of another kind."""
    global _chosen_here
    if _chosen_here:
        os.environ.pop(V2_RUNNER, None)
        _chosen_here = False


def settle(config: Any, window_option: str, build: Build) -> Any:
    """The config to serve with.

    Args:
        config: vLLM's finished VllmConfig for method ppow.
        window_option: what the user said of the window, as in `PPOWOptions.window`.

    Raises:
        PPOWServingError: the user chose a runner on which sampled drafts change the output.
    """
    if _changes_output(config):
        return _settle_on_v1(window_option, build)
    if window_option == "auto" and _may_have_cost_graphs(config):
        return _adaptive_unless_it_costs(build)
    return config


def on_safe_runner(config: Any, build: Callable[[], Any]) -> Any:
    """A finished config, built again on the V1 runner if it would change the output; what it says of the window stays.

    Raises:
        PPOWServingError: as `settle`.
    """
    return _on_v1(build) if _changes_output(config) else config


def _settle_on_v1(window_option: str, build: Build) -> Any:
    return _on_v1(lambda: _adaptive_unless_it_costs(build) if window_option == "auto" else build({}))


def _on_v1(build: Callable[[], Any]) -> Any:
    _choose_v1()
    try:
        config = build()
    except Exception:
        forget()
        raise
    if _changes_output(config):  # vLLM keeps what it read of the environment once an engine has started
        forget()
        raise _refusal(f"vLLM, which read {V2_RUNNER} before,")
    return config


def _adaptive_unless_it_costs(build: Build) -> Any:
    """On the V1 runner: a fixed window where it has full CUDA graphs, an adaptive one where there are none to lose."""
    fixed = build({"window": "fixed"})
    if not fixed.compilation_config.cudagraph_mode.has_full_cudagraphs():
        return build({})
    seams.logger.warning(
        "The draft window stays fixed at its maximum: for lengths that change the V1 model runner would give up full "
        "CUDA graphs (it does not now, whatever vLLM said above). vLLM 0.32's V2 model runner keeps them; "
        '"ppow": {"window": "adaptive"} gives them up.'
    )
    return fixed


def _changes_output(config: Any) -> bool:
    """Whether sampled output would not have the target's distribution."""
    return (
        bool(config.use_v2_model_runner)
        and config.speculative_config.draft_sample_method == "probabilistic"
        and not v2_runner.draws_independently()
    )


def _choose_v1() -> None:
    """Have this process, and those that it starts, run the V1 model runner.

    Raises:
        PPOWServingError: the user chose the other.
    """
    global _chosen_here
    if V2_RUNNER in os.environ:
        raise _refusal(f"{V2_RUNNER}={os.environ[V2_RUNNER]}")
    seams.logger.warning(
        'The V1 model runner is used (%s=0): %s. With "draft_sample_method": "greedy" V2 is.', V2_RUNNER, _WHY
    )
    os.environ[V2_RUNNER] = "0"
    _chosen_here = True


def _refusal(what: str) -> PPOWServingError:
    return PPOWServingError(
        f"{what} cannot serve sampled drafts: {_WHY}. Start with {V2_RUNNER}=0 or without it, or give "
        '"draft_sample_method": "greedy".'
    )


def _may_have_cost_graphs(config: Any) -> bool:
    """Whether an adaptive window is on where vLLM cannot have it and full graphs."""
    return window.options_of(config.speculative_config) is not None and profiling.lacks_full_graphs(config)
