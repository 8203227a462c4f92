"""The steps of the GPU benchmark: each a function that takes the plan and returns what its JSON file holds.

    python examples/benchmarks/gpu/steps.py list --output DIRECTORY [--backend cpu] [--tiny]
    python examples/benchmarks/gpu/steps.py STEP --output DIRECTORY …

A step whose file exists is not run again. Left out: time limits (gpu.sh), the table (summary.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engines
import random_pair

from ppow_train.identity import compare

ROOT = Path(__file__).parents[3]
TINY_PAIR = ROOT / "examples" / "tiny"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        output: directory of results.
        backend: "cuda", or "cpu" to try the steps without a GPU.
        tiny: a small random pair, short drafts and batches: says nothing about speed.
    """

    output: Path
    backend: str
    tiny: bool

    @property
    def shape(self) -> random_pair.Shape:
        return random_pair.TINY if self.tiny else random_pair.QWEN3_8B

    @property
    def draft_lengths(self) -> tuple[int, ...]:
        return (1, 2) if self.tiny else tuple(range(1, 11))

    @property
    def batches(self) -> tuple[int, ...]:
        return (1, 2) if self.tiny else (1, 2, 4, 8, 16, 32, 64)

    @property
    def max_tokens(self) -> int:
        return 16 if self.tiny else 256

    @property
    def engine_options(self) -> dict[str, Any]:
        return {
            "max_model_len": 256 if self.tiny else 2048,
            "max_num_seqs": self.batches[-1],
            "load_format": "dummy",
            "enforce_eager": self.backend == "cpu",
        }

    def file(self, step: str) -> Path:
        return self.output / f"{step}.json"


def steps(plan: Plan) -> dict[str, Callable[[Plan], dict[str, Any]]]:
    """Name -> step, in order."""
    runners = ("v1",) if plan.backend == "cpu" else ("v1", "v2")
    modes = ("eager",) if plan.backend == "cpu" else ("eager", "graphs")
    found: dict[str, Callable[[Plan], dict[str, Any]]] = {"loop": loop}
    for runner in runners:
        for mode in modes:
            found[f"identity-{runner}-{mode}"] = lambda plan, r=runner, m=mode: identity(plan, r, m)
    found["profile"] = profile
    found["arm-none"] = lambda plan: arm(plan, None)
    for length in plan.draft_lengths:
        found[f"arm-fixed-{length:02d}"] = lambda plan, k=length: arm(plan, fixed(plan, k))
    found["arm-adaptive"] = lambda plan: arm(plan, adaptive(plan))
    return found


# ---------------------------------------------------------------- the whole loop, and greedy identity


def loop(plan: Plan) -> dict[str, Any]:
    """`ppow demo`: trains an adapter for the tiny pair, serves it, compares."""
    command = [sys.executable, "-m", "ppow_train.cli", "demo", "--tiny", str(TINY_PAIR), "--json"]
    command += [
        "--output",
        str(plan.output / "demo"),
        *(["--steps", "2", "--prompts", "4"] if plan.tiny else []),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, cwd=plan.output)
    if done.returncode:
        raise SystemExit(f"ppow demo failed with exit code {done.returncode}: see its message above.")
    return {"demo": json.loads(done.stdout.splitlines()[-1]), **engines.environment()}


def identity(plan: Plan, runner: str, mode: str) -> dict[str, Any]:
    """Greedy tokens of the tiny target: without speculation, with the bare head, with the adapter of `loop`."""
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = {"v1": "0", "v2": "1"}[runner]
    number, length, tokens = (4, 3, 24) if plan.tiny else (32, 5, 128)
    adapter = _demo_adapter(plan)
    specs: dict[str, dict[str, Any] | None] = {
        "no speculation": None,
        "bare head": {
            "method": "eagle3",
            "model": str(TINY_PAIR / "eagle3"),
            "num_speculative_tokens": length,
        },
        "adapter": {
            **{"method": "ppow", "model": str(adapter), "num_speculative_tokens": length},
            "ppow": {"base_drafter": str(TINY_PAIR / "eagle3")},
            "draft_sample_method": "greedy",
        },
    }
    options = {"max_model_len": 512, "max_num_seqs": number, "enforce_eager": mode == "eager"}
    ids = engines.prompts(number, 2048)
    outputs = {}
    for name, spec in specs.items():
        with engines.engine(TINY_PAIR / "target", spec, **options) as llm:
            outputs[name] = engines.greedy(llm, ids, tokens)
    found = outputs["adapter"][0]
    references = {"no speculation": "no speculation", "bare head, equal batch shapes": "bare head"}
    compared = {}
    for shown, name in references.items():
        tokens_of, gaps, ties_up_to = outputs[name]
        compared[f"adapter against {shown}"] = compare(tokens_of, gaps, found, ties_up_to)
    results = {name: {**dataclasses.asdict(one), "holds": one.holds} for name, one in compared.items()}
    return {"runner": runner, "mode": mode, "compared": results, **engines.environment()}


def _demo_adapter(plan: Plan) -> Path:
    found = sorted((plan.output / "demo").rglob("ppow_config.json"))
    if not found:
        raise SystemExit("No adapter of the tiny pair: run the step loop first.")
    return found[0].parent


# ---------------------------------------------------------------- cost and speed of a pair of real size


def profile(plan: Plan) -> dict[str, Any]:
    """The cost profile of the random pair, stored beside its adapter for `arm-adaptive`."""
    from ppow_train.profiling import ProfileOptions, make_profile, measure_steps
    from vllm_ppow.artifact import read_adapter
    from vllm_ppow.compat.profiling import StepProfiler, draft_length_ladder, machine
    from vllm_ppow.cost_profile import COST_PROFILE_FILE, write_profile_file
    from vllm_ppow.metrics import SpecDecodeCounts

    pair = random_pair.build(plan.output / "pair", plan.shape, plan.draft_lengths[-1])
    options = ProfileOptions(
        batch_sizes=plan.batches,
        context_lengths=(32,) if plan.tiny else (128, 1024),
        draft_lengths=(0, *plan.draft_lengths),
        steps=2 if plan.tiny else 5,
        rounds=1 if plan.tiny else 3,
    )
    spec = adaptive(plan) | {
        "num_speculative_tokens_per_batch_size": draft_length_ladder(options.draft_lengths)
    }
    spec["ppow"] = {"window": "fixed"} if _has_window() else {}
    engine_options = plan.engine_options | {"max_model_len": options.max_model_len}
    engine_options["max_num_seqs"] = max(plan.batches[-1], len(options.draft_lengths))
    with engines.engine(pair.target, spec, **engine_options) as llm:
        with StepProfiler(llm, options.draft_lengths[-1]) as profiler:
            samples = measure_steps(llm, profiler, options, engines.prompts(64, plan.shape.vocab_size), _say)
        where = machine(llm.llm_engine.vllm_config)
    # No acceptance: it is synthetic here, and the server learns it.
    none = SpecDecodeCounts(0, 0, 0, ())
    found = make_profile(samples, none, options, read_adapter(pair.adapter), **where)
    write_profile_file(pair.adapter / COST_PROFILE_FILE, found)
    return {"profile": dataclasses.asdict(found), **engines.environment()}


def arm(plan: Plan, spec: dict[str, Any] | None) -> dict[str, Any]:
    """Output tokens per second at every batch size under one speculative config."""
    pair = random_pair.build(plan.output / "pair", plan.shape, plan.draft_lengths[-1])
    with engines.engine(pair.target, spec, **plan.engine_options) as llm:
        measured = [
            engines.throughput(llm, batch, plan.shape.vocab_size, plan.max_tokens, 1 if plan.tiny else 3)
            for batch in plan.batches
        ]
    return {"spec": spec, "measured": measured, **engines.environment()}


def fixed(plan: Plan, length: int) -> dict[str, Any]:
    """The adapter at a fixed draft length, accepting as `acceptance` says; on a CPU, which cannot, as it happens."""
    synthetic = {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": acceptance(length)}
    return {
        "method": "ppow",
        "model": str(random_pair.pair_in(plan.output / "pair").adapter),
        "num_speculative_tokens": length,
        "ppow": {"window": "fixed"} if _has_window() else {},
        **(synthetic if plan.backend == "cuda" else {}),
    }


def adaptive(plan: Plan) -> dict[str, Any]:
    """The adapter with the adaptive window, accepting as the fixed arms do."""
    return fixed(plan, plan.draft_lengths[-1]) | {"ppow": {"window": "adaptive"} if _has_window() else {}}


def acceptance(length: int) -> list[float]:
    """Share of drafts whose token is accepted by position, unconditional: 0.75 at first, 0.8 of that at each next."""
    return [round(0.75 * 0.8**i, 6) for i in range(length)]


def _has_window() -> bool:
    from vllm_ppow.config import PPOWOptions

    return "window" in {field.name for field in dataclasses.fields(PPOWOptions)}


def _say(text: str) -> None:
    print(f"  {text}", flush=True)


# ---------------------------------------------------------------- the command


def main(argv: list[str]) -> int:
    """Run one step, or list all; exit code 2 for an unknown one."""
    parser = argparse.ArgumentParser(prog="steps.py", description=__doc__)
    parser.add_argument("step")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--backend", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args(argv)
    plan = Plan(options.output.resolve(), options.backend, options.tiny)
    known = steps(plan)
    if options.step == "list":
        print("\n".join(known))
        return 0
    if options.step not in known:
        parser.error(f"{options.step} is not a step: choose from {', '.join(known)}.")
    if plan.file(options.step).exists():
        print(f"{options.step}: done before, {plan.file(options.step)}")
        return 0
    # Profiling steers the scheduler in this process.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    plan.output.mkdir(parents=True, exist_ok=True)
    write(plan.file(options.step), known[options.step](plan) | {"tiny": plan.tiny, "backend": plan.backend})
    print(f"{options.step}: written {plan.file(options.step)}")
    return 0


def write(path: Path, result: dict[str, Any]) -> None:
    """Write a result through a temporary name: what exists is complete."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
