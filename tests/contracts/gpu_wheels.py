"""What a server on a GPU would be told, by the real config code of a wheel for GPUs, on a machine without one.

    pip download --no-deps --only-binary :all: --platform manylinux_2_28_x86_64 --dest wheels vllm==0.26.0
    python tests/contracts/gpu_wheels.py wheels/vllm-0.26.0-*.whl

vLLM's EngineArgs build their config as they do on a GPU: the platform is vLLM's own class for CUDA with made-up answers
of the driver, and compiled extensions are stand-ins, since none of their functions is called. For each case in CASES it
prints what came out and exits with 1 if that is not what method ppow promises. Left out: anything that runs a model.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import subprocess
import sys
import tempfile
import types
import zipfile
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

from vllm_ppow.compat.capabilities import V2_RUNNER

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "tiny"
# Case -> (the speculative config's own keys, options under "ppow", VLLM_USE_V2_MODEL_RUNNER, arguments of the engine)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str | None, dict[str, Any]]] = {
    "sampled drafts": ({}, {}, None, {}),
    "greedy drafts": ({"draft_sample_method": "greedy"}, {}, None, {}),
    "sampled drafts, V2": ({}, {}, "1", {}),
    "greedy drafts, V1": ({"draft_sample_method": "greedy"}, {}, "0", {}),
    "V1, adaptive": ({}, {"window": "adaptive"}, "0", {}),
    "fixed": ({"draft_sample_method": "greedy"}, {"window": "fixed"}, None, {}),
    "eager": ({"draft_sample_method": "greedy"}, {}, "0", {"enforce_eager": True}),
}
REFUSED = "refused"
ANSWER = "answer: "


def expected(independent: bool, heeds: bool) -> dict[str, str]:
    """Case -> what must come out: runner, CUDA graphs, window.

    Args:
        independent, heeds: what `v2_runner` finds in that vLLM.
    """
    v2 = f"V2, full graphs, {'adaptive' if heeds else 'fixed'}"
    v1 = "V1, full graphs, fixed"  # an adaptive one would cost full graphs
    return {
        "sampled drafts": v2 if independent else v1,
        "greedy drafts": v2,
        "sampled drafts, V2": v2 if independent else REFUSED,
        "greedy drafts, V1": v1,
        "V1, adaptive": "V1, other graphs, adaptive",
        "fixed": "V2, full graphs, fixed",
        "eager": "V1, no graphs, adaptive",
    }


def main(wheels: list[str]) -> int:
    """Ask each wheel in a process of its own; exit code 2 without any, 1 for an answer that is not as promised."""
    if not wheels:
        print("Name one wheel of vLLM for GPUs or more: gpu_wheels.py WHEEL…", file=sys.stderr)
        return 2
    sys.path.insert(0, str(ROOT / "tests"))
    from feature_engines import tiny_adapter

    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        adapter = tiny_adapter(Path(scratch), "eagle3", "probabilistic")
        for number, wheel in enumerate(wheels):
            site = Path(scratch) / str(number)
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site, [name for name in archive.namelist() if not name.endswith(".so")])
            path = os.pathsep.join([str(site), str(ROOT / "train"), str(ROOT)])
            done = subprocess.run(
                [sys.executable, __file__, "--ask", str(adapter)],
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                check=False,
            )
            lines = [line for line in done.stdout.splitlines() if line.startswith(ANSWER)]
            if not lines:
                print(f"{wheel} could not be asked:\n{done.stderr[-2000:]}", file=sys.stderr)
                return 1
            wrong += _tell(json.loads(lines[-1].removeprefix(ANSWER)))
    return 1 if wrong else 0


def _tell(answer: dict[str, Any]) -> int:
    """Print a wheel's answers; the number of those that are not as promised."""
    wanted = expected(answer["independent"], answer["heeds"])
    print(
        f"vLLM {answer['version']}: V2 draws independently: {answer['independent']}, heeds lengths: {answer['heeds']}"
    )
    for case, found in answer["cases"].items():
        verdict = "" if found == wanted[case] else f"   WRONG, should be: {wanted[case]}"
        print(f"  {case:20} {found}{verdict}")
    return sum(found != wanted[case] for case, found in answer["cases"].items())


# ---------------------------------------------------------------- the process in which a wheel is imported


def ask(adapter: str) -> None:
    """Print the answers of the vLLM on the path."""
    stand_in()
    import vllm

    from vllm_ppow import plugin
    from vllm_ppow.compat import v2_runner

    logging.disable(logging.CRITICAL)
    plugin.register()
    cases = {case: outcome(adapter, *details) for case, details in CASES.items()}
    facts = {"independent": v2_runner.draws_independently(), "heeds": v2_runner.drafts_as_scheduled()}
    print(ANSWER + json.dumps({"version": vllm.__version__, **facts, "cases": cases}))


def outcome(
    adapter: str, spec: dict[str, Any], ppow: dict[str, Any], runner: str | None, options: dict[str, Any]
) -> str:
    """What one case comes to."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_ppow.compat import window
    from vllm_ppow.config import PPOWServingError

    os.environ.pop(V2_RUNNER, None)
    if runner is not None:
        os.environ[V2_RUNNER] = runner
    asked = {
        "method": "ppow",
        "model": adapter,
        **spec,
        "ppow": {"base_drafter": str(TINY / "eagle3"), **ppow},
    }
    args = EngineArgs(
        str(TINY / "target"), max_model_len=256, max_num_seqs=8, speculative_config=asked, **options
    )
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            config = args.create_engine_config()
    except PPOWServingError:
        return REFUSED
    mode = config.compilation_config.cudagraph_mode
    graphs = "full" if mode.has_full_cudagraphs() else "other" if mode else "no"
    adapts = window.options_of(config.speculative_config) is not None
    return f"{'V2' if config.use_v2_model_runner else 'V1'}, {graphs} graphs, {'adaptive' if adapts else 'fixed'}"


class _Module(types.ModuleType):
    """A compiled module, or one that needs such: any name is there, and does nothing."""

    __path__: list[str] = []  # noqa: RUF012 (as a package has it)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()


def stand_in() -> None:
    """Make this process look to vLLM like one with a GPU, as far as configs go."""
    os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    for name in (
        *("vllm._C", "vllm._C_stable_libtorch", "vllm._moe_C", "vllm._moe_C_stable_libtorch"),
        *("vllm.cumem_allocator", "vllm.vllm_flash_attn", "vllm.vllm_flash_attn.flash_attn_interface"),
        "vllm.model_executor.layers.mamba.ops.ssd_chunk_scan",  # tunes Triton kernels while it is imported
    ):
        sys.modules[name] = _Module(name)
    _stand_in_for_operators()
    import vllm.platforms
    from vllm.platforms import cuda
    from vllm.platforms.interface import DeviceCapability

    answers = {
        "get_device_capability": DeviceCapability(9, 0),
        "get_device_name": "a GPU",
        "get_device_total_memory": 80 * 2**30,
        "get_device_uuid": "0",
        "device_count": 1,
        "is_fully_connected": True,
        "log_warnings": None,
    }
    methods = {name: classmethod(lambda cls, *_, found=found, **__: found) for name, found in answers.items()}
    vllm.platforms._current_platform = type("GPU", (cuda.NonNvmlCudaPlatform,), methods)()

    import vllm.config.vllm
    import vllm.model_executor.models.registry as registry

    vllm.config.vllm.HAS_TRITON = True  # type: ignore[attr-defined]
    registry._run_in_subprocess = lambda inspect: inspect()  # type: ignore[assignment]  # stand-ins are here only


def _stand_in_for_operators() -> None:
    """Compiled operators are asked for while modules are imported: each is there, and says no."""
    import torch
    from torch import library

    own = torch._ops._OpNamespace.__getattr__

    def found(self: Any, name: str) -> Any:
        try:
            return own(self, name)
        except AttributeError:
            if name.startswith("__") or not self.name.startswith(("_C", "_moe_C", "_rocm_C")):
                raise
            return MagicMock(return_value=False)

    torch._ops._OpNamespace.__getattr__ = found  # type: ignore[method-assign]
    library.register_fake = lambda *_, **__: lambda function: function  # type: ignore[assignment]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--ask"]:
        ask(sys.argv[2])
        sys.exit(0)
    sys.exit(main(sys.argv[1:]))
