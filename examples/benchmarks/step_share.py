"""What the plugin's own code takes of an engine's steps, by samples taken inside the engine.

Two engines differ by several percent though they do the same work, so that comparing them (overhead.py) does not
resolve a percent. Here one engine at a time serves the tiny pair in this process, and every few milliseconds of its
processor time it is looked at what is running: this package's code, or what it called that is neither vLLM's nor a
model's (tensor operations among them); a method of vLLM that it wraps is vLLM's. That slows nothing down, as a profiler
would. What a plugin does to a step without being called in it (other shapes, other kernels) it cannot tell; that both
arms do the same work overhead.py checks. Left out: start-up (overhead.py).

    OMP_NUM_THREADS=1 python examples/benchmarks/step_share.py --output step-share.json
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import click
from bench_adapters import TINY, make_adapter, prompt_ids
from serve_sweep import machine_facts

from ppow_train.report import write_json
from ppow_train.serving_eval import EngineOptions, start_engine


def _directory(package: str) -> Path:
    """Where a package lies; it is not imported."""
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"{package} is not installed"
    assert spec.origin is not None, f"{package} is no package with files"
    return Path(spec.origin).parent


OURS = f"{_directory('vllm_ppow')}{os.sep}"
# Code that answers for itself, whoever called it: vLLM's, and the models'.
THEIRS = (f"{_directory('vllm')}{os.sep}", f"{_directory('torch') / 'nn'}{os.sep}")
WINDOWS: dict[str, dict[str, Any]] = {
    "fixed": {"window": "fixed"},
    "adaptive": {"window": "adaptive", "per_request": False},
    "adaptive, by request": {"window": "adaptive", "per_request": True},
}
MOST = 0.01  # of a step, with a fixed window: the aim
SAID = "{ours_ms:.2f} ms of {step_ms:.1f} ms, {share:.2%} ± {share_error:.2%} ({samples} samples)"
EVERY_S = 0.001  # of processor time; the kernel's clock may make it 4 ms


def is_ours(frame: FrameType | None) -> bool:
    """Whether this package's code is running, or something that only it answers for."""
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(OURS):
            return True
        if file.startswith(THEIRS):
            return False
        frame = frame.f_back
    return False


@dataclasses.dataclass
class Samples:
    """How often it was looked, and how often this package's code was running."""

    all: int = 0
    ours: int = 0

    def take(self, number: int, frame: FrameType | None) -> None:
        """Handler of the timer's signal."""
        self.all += 1
        self.ours += is_ours(frame)

    @property
    def share(self) -> float:
        return self.ours / self.all

    @property
    def error(self) -> float:
        """One standard error of the share: binomial, as if no sample depended on another."""
        return math.sqrt(self.share * (1.0 - self.share) / self.all)


@contextlib.contextmanager
def sampled() -> Iterator[Samples]:
    """Look what this process's main thread does, every `EVERY_S` seconds that the process computes."""
    samples = Samples()
    before = signal.signal(signal.SIGPROF, samples.take)
    signal.setitimer(signal.ITIMER_PROF, EVERY_S, EVERY_S)
    try:
        yield samples
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, before)


def measure(llm: Any, prompts: list[list[int]], max_tokens: int, rounds: int) -> dict[str, float]:
    """Serve the prompts so many times, after twice without being looked at; milliseconds of processor time."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    wanted = [{"prompt_token_ids": ids} for ids in prompts]
    for _ in range(2):  # shapes are new at first, and costs are being learned
        llm.generate(wanted, sampling, use_tqdm=False)
    steps = 0
    step = llm.llm_engine.step

    def counted() -> Any:
        nonlocal steps
        steps += 1
        return step()

    llm.llm_engine.step = counted
    began = time.process_time()
    try:
        with sampled() as samples:
            for _ in range(rounds):
                llm.generate(wanted, sampling, use_tqdm=False)
    finally:
        del llm.llm_engine.step
    step_ms = 1e3 * (time.process_time() - began) / steps
    return {
        "steps": steps,
        "step_ms": step_ms,
        "samples": samples.all,
        "share": samples.share,
        "share_error": samples.error,
        "ours_ms": step_ms * samples.share,
    }


@click.command()
@click.option("--output", required=True, type=click.Path(path_type=Path), help="JSON of the figures")
@click.option("--rounds", default=8, show_default=True, help="passes over the prompts that are sampled")
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
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # where the samples are taken
    prompts = prompt_ids("tests_held_out", num_prompts)
    options = EngineOptions(str(TINY / "target"), max_num_seqs=concurrency, dtype=dtype)
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        adapter = make_adapter(Path(scratch) / "zero", 0.0, draft_sample_method="probabilistic")
        spec = {
            "method": "ppow",
            "model": str(adapter.directory),
            "num_speculative_tokens": num_speculative_tokens,
        }
        for name, window in WINDOWS.items():
            llm = start_engine(dataclasses.asdict(options), {**spec, "ppow": window})
            figures[name] = measure(llm, prompts, max_tokens, rounds)
            click.echo(f"{name}: {SAID.format(**figures[name])}")
            del llm
    settings = {"concurrency": concurrency, "num_speculative_tokens": num_speculative_tokens, "dtype": dtype}
    write_json(output, {"windows": figures, **settings, **machine_facts()})
    if check and figures["fixed"]["share"] > MOST:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
