"""The steps of the GPU benchmark: each a function that takes the plan and returns what its JSON file holds.

    python examples/benchmarks/gpu/steps.py list --output DIRECTORY [--backend cpu] [--tiny]
    python examples/benchmarks/gpu/steps.py STEP --output DIRECTORY …

A step whose file exists is not run again. Left out: time limits (gpu.sh), the table (summary.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engines
import random_models
import random_pair
import serving_tests
import within
from arms import NONE, Arm, Load, groups, measure

from ppow_train.identity import compare
from ppow_train.serving_eval import EngineOptions
from vllm_ppow.compat.capabilities import V2_RUNNER

ROOT = Path(__file__).parents[3]
TINY_PAIR = ROOT / "examples" / "tiny"
# Of an engine of the Qwen3-8B-shaped pair: 16 of weights, 2 of graphs, the rest for CUDA, activations and logits.
GIB_BESIDE_CACHE = 22
CACHE_GIB = 4  # of its KV cache, where several are up


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        output: directory of results.
        backend: "cuda", or "cpu" to try the steps without a GPU.
        tiny: a small random pair, short drafts and batches: says nothing about speed.
        draft_lengths, batches: of the steps that measure speed.
        rounds: of the steps `arms-N` at most; as many as `minutes` hold.
        arms: names of the arms to measure; empty: all.
        kv_cache_gib: of every engine's KV cache; None lets vLLM take what is free, or share it among engines.
    """

    output: Path
    backend: str
    tiny: bool
    draft_lengths: tuple[int, ...]
    batches: tuple[int, ...]
    rounds: int = 5
    minutes: float = 4.0
    arms: tuple[str, ...] = ()
    kv_cache_gib: float | None = None

    @property
    def shape(self) -> random_pair.Shape:
        return random_pair.TINY if self.tiny else random_pair.QWEN3_8B

    @property
    def max_tokens(self) -> int:
        return 16 if self.tiny else 128

    @property
    def engine_options(self) -> dict[str, Any]:
        """Of every engine of the random pair."""
        return {
            "max_model_len": 256 if self.tiny else 2048,
            "max_num_seqs": self.batches[-1],
            "max_num_batched_tokens": 256
            if self.tiny
            else 2048,  # what vLLM keeps room for, by each of many engines
            "enforce_eager": self.backend == "cpu",
        } | self.memory

    @property
    def memory(self) -> dict[str, Any]:
        """A KV cache of a given size: vLLM then does not measure what is free, which other processes change."""
        if self.kv_cache_gib is None:
            return {}
        return {"kv_cache_memory_bytes": int(self.kv_cache_gib * 2**30), "gpu_memory_utilization": 0.02}

    def file(self, step: str) -> Path:
        return self.output / f"{step}.json"


def steps(plan: Plan) -> dict[str, Callable[[Plan], dict[str, Any]]]:
    """Name -> step, in order."""
    runners = ("v1",) if plan.backend == "cpu" else ("v1", "v2")
    modes = ("eager",) if plan.backend == "cpu" else ("eager", "graphs")
    found: dict[str, Callable[[Plan], dict[str, Any]]] = {"loop": loop}
    for drafter in ("eagle3", "causal_lm"):
        found[f"train-{drafter}"] = lambda plan, d=drafter: train(plan, d)
    for runner in runners:
        for mode in modes:
            found[f"identity-{runner}-{mode}"] = lambda plan, r=runner, m=mode: identity(plan, r, m)
    for group in serving_tests.GROUPS if plan.backend == "cuda" else ():  # on a CPU `make test` has them
        found[group] = lambda plan, g=group: serving_tests.run(g, plan.output) | engines.environment()
    found["packed-speed"] = packed_speed
    found["profile"] = profile
    found["within"] = within_one_engine
    for number, group in enumerate(groups(chosen_arms(plan), _at_once(plan)), 1):
        found[f"arms-{number}"] = lambda plan, g=group, n=number: arms(plan, g, n)
    return found


# ---------------------------------------------------------------- the whole loop, and greedy identity


def loop(plan: Plan) -> dict[str, Any]:
    """`ppow demo`: trains an adapter for the tiny pair, serves it, compares."""
    command = [sys.executable, "-m", "ppow_train.cli", "demo", "--tiny", str(TINY_PAIR), "--json"]
    command += ["--output", str(plan.output / "demo")]
    command += ["--steps", "2", "--prompts", "4"] if plan.tiny else []
    for name, value in plan.memory.items():
        command += ["--engine-arg", f"{name}={value}"]
    return {"demo": _json_of(command, plan), **engines.environment()}


def train(plan: Plan, drafter: str) -> dict[str, Any]:
    """`ppow train` on the GPU, up to its parity gate: training's own acceptance against what vLLM counts."""
    output = plan.output / f"trained-{drafter}"
    prompts = TINY_PAIR / "prompts"
    command = [sys.executable, "-m", "ppow_train.cli", "train", "--json", "--overwrite"]
    for name, value in {
        "target": TINY_PAIR / "target",
        "drafter": TINY_PAIR / drafter,
        "prompts": prompts / "tests_train.jsonl",
        "held-out": prompts / "tests_held_out.jsonl",
        "output": output,
        "cache": plan.output / f"trajectories-{drafter}",
        "device": plan.backend,
        "max-steps": 2 if plan.tiny else 100,
    }.items():
        command += [f"--{name}", str(value)]
    return {"training": _json_of(command, plan), **engines.environment()}


def packed_speed(plan: Plan) -> dict[str, Any]:
    """packed_speed.py with drafters of real size, random weights: packed windows against one row per window."""
    made = random_models.build(
        plan.output / "models", *(random_models.TINY if plan.tiny else random_models.REAL)
    )
    command = [sys.executable, str(ROOT / "examples" / "benchmarks" / "packed_speed.py")]
    for name, value in {
        "target": made.target,
        "device": plan.backend,
        "cache": plan.output / "trajectories-packed",
        "rounds": 1 if plan.tiny else 3,
        "max-new-tokens": 24 if plan.tiny else 256,
        "trajectories-per-step": 2 if plan.tiny else 8,
        "windows-per-step": 4 if plan.tiny else 64,
        "num-generations": 2 if plan.tiny else 8,
    }.items():
        command += [f"--{name}", str(value)]
    found = {}
    for drafter in (made.head, made.causal_lm):
        file = plan.output / f"packed-{drafter.name}.json"
        done = subprocess.run([*command, "--drafter", str(drafter), "--output", str(file)], check=False)
        if done.returncode:
            raise SystemExit(f"packed_speed.py failed with {drafter.name}: see its message above.")
        found[drafter.name] = json.loads(file.read_text("utf-8"))
    return {"packed_speed": found, **engines.environment()}


def _json_of(command: list[str], plan: Plan) -> Any:
    """The last line that a command of ours prints.

    Raises:
        SystemExit: it failed; its own message is on stderr.
    """
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, cwd=plan.output)
    if done.returncode:
        raise SystemExit(f"ppow {command[3]} failed with exit code {done.returncode}: see its message above.")
    return json.loads(done.stdout.splitlines()[-1])


def identity(plan: Plan, runner: str, mode: str) -> dict[str, Any]:
    """Greedy tokens of the tiny target: without speculation, with the bare head, with an adapter of this output."""
    os.environ[V2_RUNNER] = {"v1": "0", "v2": "1"}[runner]
    number, length, tokens = (4, 3, 24) if plan.tiny else (32, 5, 128)
    head = str(TINY_PAIR / "eagle3")
    ours = {
        **{"method": "ppow", "model": str(_adapter(plan)), "num_speculative_tokens": length},
        "draft_sample_method": "greedy",
    }
    specs: dict[str, dict[str, Any] | None] = {
        "no speculation": None,
        "bare head": {"method": "eagle3", "model": head, "num_speculative_tokens": length},
        "fixed": {**ours, "ppow": {"base_drafter": head, "window": "fixed"}},
        "adaptive": {**ours, "ppow": {"base_drafter": head, "window": "adaptive", "min_tokens": 1}},
    }
    options = {"max_model_len": 512, "max_num_seqs": number, "enforce_eager": mode == "eager"} | plan.memory
    ids = engines.prompts(number, 2048)
    outputs, drafted = {}, {}
    for name, spec in specs.items():
        with engines.engine(TINY_PAIR / "target", spec, **options) as llm:
            outputs[name] = engines.greedy(llm, ids, tokens)
            counts = engines.counts(llm)
            drafted[name] = None if counts is None else dataclasses.asdict(counts)
    compared = {}
    for ours_, other, shown in (
        ("fixed", "no speculation", "adapter against no speculation"),
        ("fixed", "bare head", "adapter against bare head, equal batch shapes"),
        ("adaptive", "no speculation", "adapter, adaptive window, against no speculation"),
    ):
        tokens_of, gaps, ties_up_to = outputs[other]
        compared[shown] = compare(tokens_of, gaps, outputs[ours_][0], ties_up_to)
    results = {name: {**dataclasses.asdict(one), "holds": one.holds} for name, one in compared.items()}
    return {
        "runner": runner,
        "mode": mode,
        "compared": results,
        "counts": drafted,
        **engines.environment(),
    }


def _adapter(plan: Plan) -> Path:
    """The adapter of the tiny EAGLE-3 head that `loop` or `train-eagle3` made."""
    for folder in (plan.output / "demo", plan.output / "trained-eagle3"):
        for found in sorted(folder.rglob("ppow_config.json")):
            return found.parent
    raise SystemExit("No adapter of the tiny pair: run the step loop or train-eagle3 first.")


# ---------------------------------------------------------------- cost and speed of a pair of real size


def profile(plan: Plan) -> dict[str, Any]:
    """The cost profile of the random pair, stored beside its adapter for the adaptive arm."""
    from ppow_train.profiling import ProfileOptions, make_profile, measure_steps
    from vllm_ppow.artifact import read_adapter
    from vllm_ppow.compat.profiling import StepProfiler, draft_length_ladder, machine
    from vllm_ppow.cost_profile import COST_PROFILE_FILE, write_profile_file
    from vllm_ppow.metrics import SpecDecodeCounts

    _choose_runner(_steerable_runner())
    pair = random_pair.build(plan.output / "pair", plan.shape, plan.draft_lengths[-1])
    options = ProfileOptions(
        batch_sizes=plan.batches,
        context_lengths=(32,) if plan.tiny else (128, 1024),
        draft_lengths=(0, *plan.draft_lengths),
        steps=2 if plan.tiny else 5,
        rounds=1 if plan.tiny else 3,
    )
    spec = fixed(plan, plan.draft_lengths[-1]) | {
        "num_speculative_tokens_per_batch_size": draft_length_ladder(options.draft_lengths)
    }
    engine_options = plan.engine_options | {"max_model_len": options.max_model_len}
    engine_options["max_num_seqs"] = max(plan.batches[-1], len(options.draft_lengths))
    with engines.engine(pair.target, spec, load_format="dummy", **engine_options) as llm:
        with StepProfiler(llm, options.draft_lengths[-1]) as profiler:
            prompts = engines.prompts(64, plan.shape.vocab_size)
            samples = measure_steps(llm, profiler, options, prompts, _say).samples
        where = machine(llm.llm_engine.vllm_config)
    # No acceptance: it is synthetic here, and the server learns it.
    none = SpecDecodeCounts(0, 0, 0, ())
    found = make_profile(samples, none, options, read_adapter(pair.adapter), **where)
    write_profile_file(pair.adapter / COST_PROFILE_FILE, found)
    spreads = {" × ".join(map(str, point)): one.spread for point, one in samples.items()}
    return {"profile": dataclasses.asdict(found), "spreads": spreads, **engines.environment()}


def within_one_engine(plan: Plan) -> dict[str, Any]:
    """The adaptive window against every draft length and none in the turns of one engine."""
    _choose_runner(_steerable_runner())
    pair = random_pair.build(plan.output / "pair", plan.shape, plan.draft_lengths[-1])
    options, file = plan.engine_options, plan.output / "within-turns.jsonl"
    longest = options["max_model_len"] - 2 * engines.PROMPT_TOKENS
    rotations = within.LEAST_ROTATIONS * (1 if plan.tiny else 2)
    load = Load(plan.batches, longest, rotations, 60 * plan.minutes, plan.shape.vocab_size)
    with (
        within.turns_in(file, plan.draft_lengths, 0.01 if plan.tiny else within.TURN_SECONDS) as names,
        engines.engine(pair.target, adaptive(plan), load_format="dummy", **options) as llm,
    ):
        levels = within.measure(llm, file, names, load, _say)
    return {"within": levels, **engines.environment()}


def chosen_arms(plan: Plan) -> list[Arm]:
    """The arms that the plan names, or all.

    Raises:
        SystemExit: it names one that there is not.
    """
    known = {arm.name: arm for arm in all_arms(plan)}
    if unknown := set(plan.arms) - set(known):
        raise SystemExit(f"No arms {', '.join(sorted(unknown))}: choose from {', '.join(known)}.")
    return [arm for name, arm in known.items() if not plan.arms or name in plan.arms]


def arms(plan: Plan, group: list[Arm], number: int) -> dict[str, Any]:
    """Output tokens per second of a group of arms at every batch size, in turns; arms-N.jsonl has them as they come."""
    pair = random_pair.build(plan.output / "pair", plan.shape, plan.draft_lengths[-1])
    if plan.backend == "cuda" and len(group) > 1 and plan.kv_cache_gib is None:
        # They start together: none may measure what is free.
        plan = dataclasses.replace(plan, kv_cache_gib=CACHE_GIB)
    more = {"load_format": "dummy", "skip_tokenizer_init": True} | plan.engine_options
    options = EngineOptions(
        str(pair.target),
        dtype="bfloat16",
        **{name: more.pop(name) for name in ("max_model_len", "max_num_seqs", "enforce_eager")},
        more=more,
    )
    load = Load(plan.batches, plan.max_tokens, plan.rounds, 60 * plan.minutes, plan.shape.vocab_size)
    figures = plan.output / f"arms-{number}.jsonl"
    figures.unlink(missing_ok=True)  # of an attempt that did not end
    if failures := measure(group, options, load, figures, _say):
        raise SystemExit("\n".join([f"Not all arms started; {figures.name} has the others.", *failures]))
    return {"arms": [dataclasses.asdict(arm) for arm in group], **engines.environment()}


def _at_once(plan: Plan) -> int:
    """Engines that the GPU's memory holds, whatever is free now: a later run must find the same groups; 2 without."""
    import torch

    if plan.backend == "cpu" or not torch.cuda.is_available():
        return 2
    total = torch.cuda.get_device_properties(0).total_memory
    each = (2 if plan.tiny else GIB_BESIDE_CACHE) + (plan.kv_cache_gib or CACHE_GIB)
    return max(1, int(total / 2**30 / each))


def all_arms(plan: Plan) -> list[Arm]:
    """No speculation, every fixed draft length, the adaptive window; where that needs the V1 runner, V2's as well."""
    runner = _steerable_runner()
    found = [Arm(NONE, None, runner)]
    found += [Arm(f"fixed-{k:02d}", fixed(plan, k), runner) for k in plan.draft_lengths]
    found.append(Arm("adaptive", adaptive(plan), runner))
    if runner == "0" and plan.backend == "cuda":
        found.append(Arm(f"v2-{NONE}", None, "1"))
        found += [Arm(f"v2-fixed-{k:02d}", fixed(plan, k), "1") for k in plan.draft_lengths]
    return found


def _steerable_runner() -> str | None:
    """Value of VLLM_USE_V2_MODEL_RUNNER for the runner that heeds draft lengths; None: vLLM's own choice does."""
    from vllm_ppow.compat import v2_runner

    return None if v2_runner.drafts_as_scheduled() else "0"


def _choose_runner(value: str | None) -> None:
    if value is not None:
        os.environ[V2_RUNNER] = value


def fixed(plan: Plan, length: int) -> dict[str, Any]:
    """The adapter at a fixed draft length, accepting as `acceptance` says; on a CPU, which cannot, as it happens."""
    synthetic = {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": acceptance(length)}
    return {
        "method": "ppow",
        "model": str(random_pair.pair_in(plan.output / "pair").adapter),
        "num_speculative_tokens": length,
        "ppow": {"window": "fixed"},
        **(synthetic if plan.backend == "cuda" else {}),
    }


def adaptive(plan: Plan) -> dict[str, Any]:
    """The adapter with the adaptive window, accepting as the fixed arms do."""
    return fixed(plan, plan.draft_lengths[-1]) | {"ppow": {"window": "adaptive"}}


def acceptance(length: int) -> list[float]:
    """Share of drafts whose token is accepted by position, unconditional: 0.75 at first, 0.8 of that at each next."""
    return [round(0.75 * 0.8**i, 6) for i in range(length)]


def _say(text: str) -> None:
    print(f"  {text}", flush=True)


# ---------------------------------------------------------------- the command


def main(argv: list[str]) -> int:
    """Run one step, or list all; exit code 2 for an unknown one."""
    parser = argparse.ArgumentParser(prog="steps.py", description=__doc__)
    parser.add_argument("step")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--backend", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models: a trial of the steps")
    parser.add_argument(
        "--draft-lengths", type=_ascending, help="K of the speed steps, such as 1,3,5 (default: 1 to 10)"
    )
    parser.add_argument("--batches", type=_ascending, help="requests at a time (default: 1,2,4,8,16,32,64)")
    parser.add_argument("--rounds", type=int, default=5, help="of the steps arms-N at most (default: 5)")
    parser.add_argument(
        "--minutes", type=float, default=4.0, help="in which arms-N begins rounds, and within (default: 4)"
    )
    parser.add_argument("--arms", default="", help="such as none,fixed-03,adaptive (default: all)")
    parser.add_argument(
        "--kv-cache-gib", type=float, help="KV cache of every engine (default: what vLLM finds free)"
    )
    options = parser.parse_args(argv)
    plan = Plan(
        output=options.output.resolve(),
        backend=options.backend,
        tiny=options.tiny,
        draft_lengths=options.draft_lengths or ((1, 2) if options.tiny else tuple(range(1, 11))),
        batches=options.batches or ((1, 2) if options.tiny else (1, 2, 4, 8, 16, 32, 64)),
        rounds=options.rounds,
        minutes=options.minutes,
        arms=tuple(filter(None, options.arms.split(","))),
        kv_cache_gib=options.kv_cache_gib,
    )
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


def _ascending(text: str) -> tuple[int, ...]:
    """Positive whole numbers between commas, each larger than the one before."""
    values = tuple(int(one) for one in text.split(","))
    if values[0] < 1 or any(a >= b for a, b in itertools.pairwise(values)):
        raise argparse.ArgumentTypeError(f"{text} must be positive and ascend, such as 1,2,4.")
    return values


def write(path: Path, result: dict[str, Any]) -> None:
    """Write a result through a temporary name: what exists is complete."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
