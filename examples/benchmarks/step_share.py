"""What the plugin's own code takes of an engine's steps, by a profiler inside the engine.

Two engines differ by several percent though they do the same work, so that comparing them (overhead.py) does not
resolve a percent. Here one engine at a time serves the tiny pair in this process under Python's profiler, and what is
summed is the time spent in this package's functions, and in the built-in functions (tensor operations among them) that
they call themselves. Other Python code that they call, such as the method of vLLM that they wrap, is vLLM's. The
profiler slows Python code down and leaves compiled code alone: what it tells is too much rather than too little. What a
plugin does to a step without being called in it (other shapes, other kernels) it cannot tell; overhead.py's check that
both arms do the same work can. Left out: start-up (overhead.py).

    OMP_NUM_THREADS=1 python examples/benchmarks/step_share.py --output step-share.json
"""

from __future__ import annotations

import cProfile
import dataclasses
import os
import pstats
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from bench_adapters import TINY, make_adapter, prompt_ids
from serve_sweep import machine_facts

import vllm_ppow
from ppow_train.report import write_json
from ppow_train.serving_eval import EngineOptions, start_engine

OURS = str(Path(vllm_ppow.__file__).parent)
WINDOWS: dict[str, dict[str, Any]] = {
    "fixed": {"window": "fixed"},
    "adaptive": {"window": "adaptive"},
    "adaptive, by request": {"window": "adaptive", "per_request": True},
}
MOST = 0.01  # of a step, with a fixed window: the aim

# (file, line, name) -> (calls, calls that do not recur, seconds in it alone, with all below it, the same by caller)
Stats = dict[tuple[str, int, str], tuple[int, int, float, float, dict[Any, tuple[int, int, float, float]]]]


def is_ours(function: tuple[str, int, str]) -> bool:
    """Whether a function that was profiled is this package's."""
    return function[0].startswith(OURS)


def seconds_of_ours(stats: Stats) -> float:
    """Time spent in this package's functions and in the built-in ones that they call themselves."""
    own = sum(alone for function, (_, _, alone, _, _) in stats.items() if is_ours(function))
    built_in = sum(
        alone
        for function, (*_, callers) in stats.items()
        if function[0] == "~"  # as the profiler names what has no file
        for caller, (_, _, alone, _) in callers.items()
        if is_ours(caller)
    )
    return own + built_in


def measure(llm: Any, prompts: list[list[int]], max_tokens: int, rounds: int) -> list[dict[str, float]]:
    """Serve the prompts under the profiler so many times, after once without it."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    wanted = [{"prompt_token_ids": ids} for ids in prompts]
    llm.generate(wanted, sampling, use_tqdm=False)
    return [_profiled(llm, wanted, sampling) for _ in range(rounds)]


def _profiled(llm: Any, wanted: list[dict[str, list[int]]], sampling: Any) -> dict[str, float]:
    steps = 0
    step = llm.llm_engine.step

    def counted() -> Any:
        nonlocal steps
        steps += 1
        return step()

    llm.llm_engine.step = counted
    profiler, began = cProfile.Profile(), time.perf_counter()
    try:
        profiler.runcall(llm.generate, wanted, sampling, use_tqdm=False)
    finally:
        del llm.llm_engine.step
    seconds = time.perf_counter() - began
    ours = seconds_of_ours(pstats.Stats(profiler).stats)  # type: ignore[attr-defined]
    return {
        "steps": steps,
        "step_ms": 1e3 * seconds / steps,
        "ours_us": 1e6 * ours / steps,
        "share": ours / seconds,
    }


@click.command()
@click.option("--output", required=True, type=click.Path(path_type=Path), help="JSON of the figures")
@click.option("--rounds", default=3, show_default=True, help="passes over the prompts under the profiler")
@click.option("--num-prompts", default=32, show_default=True)
@click.option("--max-tokens", default=64, show_default=True)
@click.option("--concurrency", default=8, show_default=True)
@click.option("--num-speculative-tokens", default=5, show_default=True)
@click.option(
    "--dtype", default="auto", show_default=True, help="float32 where a CPU has no bfloat16 of its own"
)
@click.option(
    "--check", is_flag=True, help="exit with 1 if a fixed window takes more than a hundredth of a step"
)
def main(
    output: Path, rounds: int, num_prompts: int, max_tokens: int, concurrency: int, num_speculative_tokens: int,
    dtype: str, check: bool,
) -> None:  # fmt: skip
    """Measure what of a step is spent in the plugin's code, on the tiny pair."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # where the profiler is
    prompts = prompt_ids("tests_held_out", num_prompts)
    options = EngineOptions(str(TINY / "target"), max_num_seqs=concurrency, dtype=dtype)
    figures: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        adapter = make_adapter(Path(scratch) / "zero", 0.0)
        spec = {
            "method": "ppow",
            "model": str(adapter.directory),
            "num_speculative_tokens": num_speculative_tokens,
        }
        for name, window in WINDOWS.items():
            llm = start_engine(dataclasses.asdict(options), {**spec, "ppow": window})
            figures[name] = measure(llm, prompts, max_tokens, rounds)
            for one in figures[name]:
                click.echo("{}: {ours_us:.0f} µs of {step_ms:.2f} ms, {share:.2%}".format(name, **one))
            del llm
    settings = {"concurrency": concurrency, "num_speculative_tokens": num_speculative_tokens, "dtype": dtype}
    write_json(output, {"windows": figures, **settings, **machine_facts()})
    if check and max(one["share"] for one in figures["fixed"]) > MOST:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
