"""What a drafter earns in real vLLM: engines side by side, the same prompts, vLLM's own counters.

Each arm (no speculation, base drafter, adapter) is an engine in a process of its own that stays up, so that runs can
take turns and timings are ratios of neighbours in time. Run as a module it IS such a process: JSON lines in and out.
Left out: tables and plots (report.py).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self, TextIO

from ppow_train.engine_log import reason
from ppow_train.errors import UserError
from ppow_train.identity import choices
from ppow_train.step_times import allocation_retries, timed_steps
from vllm_ppow.artifact import NATIVE_METHOD, Adapter
from vllm_ppow.compat.capabilities import V2_RUNNER, sampled_drafts_need_v1
from vllm_ppow.metrics import SpecDecodeCounts

NONE, BASE, ADAPTER, ADAPTIVE = "no speculation", "base drafter", "adapter", "adapter, adaptive"
_MOST_OF_A_GPU = 0.9  # what engines claim together at most
_OF_WHAT_IS_FREE = 0.95  # the rest: contexts that CUDA makes before vLLM looks


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """How every arm's engine is started.

    Attributes:
        target: directory or Hub repo id.
        max_model_len: tokens of prompt and continuation at most.
        max_num_seqs: requests that run at the same time.
        enforce_eager: skip compilation and CUDA graphs (fast start; slower steps).
        dtype: as in vLLM.
        seed: of the engine; the same calls in the same order sample the same tokens.
        tensor_parallel_size: of the target.
        neighbours: other engines that are up at the same time on the same GPUs.
        sampled_drafts: an arm among those that are compared samples its drafts: all run where that is right.
        more: other arguments of vLLM's engine, by name.
    """

    target: str
    max_model_len: int = 512
    max_num_seqs: int = 8
    enforce_eager: bool = True
    dtype: str = "auto"
    seed: int = 0
    tensor_parallel_size: int = 1
    neighbours: int = 0
    sampled_drafts: bool = False
    more: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Run:
    """One pass over the prompts.

    Attributes:
        tokens: continuation ids, one list per prompt.
        seconds: wall time of the pass.
        counts: what vLLM counted in it; None without speculation.
        gaps: per prompt and token, log probability of the best token minus that of the second; None if not asked for.
        ties_up_to: with the gaps, up to which gap the choice is a tie in the engine's dtype (identity.py).
        cpu_seconds: CPU time of the engine's own process in the pass, all threads; nan where it was not taken.
        step_seconds: wall time of every engine step in the pass, in order; empty where it was not taken.
        allocation_retries: times in the pass that the GPU's memory was full and PyTorch gave back what it kept of it;
            steps then wait for the device. 0 without a GPU.
    """

    tokens: list[list[int]]
    seconds: float
    counts: SpecDecodeCounts | None
    gaps: list[list[float]] | None = None
    ties_up_to: list[list[float]] | None = None
    cpu_seconds: float = math.nan
    step_seconds: list[float] = dataclasses.field(default_factory=list)
    allocation_retries: int = 0

    @property
    def num_tokens(self) -> int:
        """Output tokens."""
        return sum(map(len, self.tokens))

    @property
    def tokens_per_second(self) -> float:
        """Output tokens per second of wall time; meaningful only as a ratio to a neighbouring run."""
        return self.num_tokens / self.seconds


def native_spec(adapter: Adapter, base_drafter: Path, num_speculative_tokens: int) -> dict[str, Any]:
    """vLLM's own speculative config for the bare drafter of an adapter, drafting as the adapter's arm does."""
    return {
        "method": NATIVE_METHOD[adapter.config.drafter_type],
        "model": str(base_drafter),
        "num_speculative_tokens": num_speculative_tokens,
        "draft_sample_method": adapter.config.draft_sample_method,
    }


def ppow_spec(
    adapter: Adapter,
    base_drafter: Path,
    num_speculative_tokens: int,
    window: str = "fixed",
    *,
    allow_target_mismatch: bool = False,
) -> dict[str, Any]:
    """The speculative config that serves an adapter; a fixed window drafts as much as the bare drafter's arm."""
    allowed = {"allow_target_mismatch": True} if allow_target_mismatch else {}
    return {
        "method": "ppow",
        "model": str(adapter.directory),
        "num_speculative_tokens": num_speculative_tokens,
        "ppow": {"base_drafter": str(base_drafter), "window": window, **allowed},
    }


def model_length(
    prompts: Sequence[Sequence[int]], max_tokens: int, num_speculative_tokens: int, config: Any
) -> int:
    """max_model_len for prompts and their continuations, in tokens, no more than a model of this config takes.

    Room to spare: with less than two drafts of it before max_model_len, vLLM's acceptance was seen to fall.
    """
    wanted = max(map(len, prompts)) + max_tokens + 4 * (num_speculative_tokens + 1)
    return min(wanted, getattr(config.get_text_config(), "max_position_embeddings", None) or wanted)


class Engine:
    """A vLLM engine in a process of its own. Use as a context manager.

    Args:
        name: for messages.
        options: how it is started.
        speculative_config: as in vLLM, or None.

    Raises:
        UserError: the engine did not start; the last lines of its log are in the message.
    """

    module = "ppow_train.serving_eval"  # that is run as the process

    def __init__(self, name: str, options: EngineOptions, speculative_config: dict[str, Any] | None) -> None:
        self.name = name
        self._log = tempfile.NamedTemporaryFile("w+", prefix="ppow-engine-", suffix=".log")  # noqa: SIM115
        environment = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",  # nobody asked for them
            **os.environ,
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", self.module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )
        self._send({"options": dataclasses.asdict(options), "speculative_config": speculative_config})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def wait_until_ready(self) -> None:
        """Block until the engine has started (engines start side by side)."""
        self._receive()

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        temperature: float,
        seeds: Sequence[int] | None = None,
        stop_token_ids: Sequence[int] = (),
        ignore_eos: bool = False,
        with_gaps: bool = False,
    ) -> Run:
        """Continue prompts (token ids) and count.

        Args:
            seeds: one per prompt; without them the engine's own generator goes on.
            stop_token_ids: that end a continuation besides the target's own.
            ignore_eos: the target's own end no continuation.
            with_gaps: tell how clear every choice was; takes longer, so do not time it. Only without speculation.
        """
        self._send(
            {
                "prompts": [list(p) for p in prompts],
                "max_tokens": max_tokens,
                "temperature": temperature,
                "seeds": None if seeds is None else list(seeds),
                "stop_token_ids": list(stop_token_ids),
                "ignore_eos": ignore_eos,
                "with_gaps": with_gaps,
            }
        )
        answer = self._receive()
        counts = answer["counts"]
        if counts is not None:
            counts["num_accepted_tokens_per_pos"] = tuple(counts["num_accepted_tokens_per_pos"])
        return Run(
            answer["tokens"],
            answer["seconds"],
            None if counts is None else SpecDecodeCounts(**counts),
            answer["gaps"],
            answer["ties_up_to"],
            answer["cpu_seconds"],
            answer["step_seconds"],
            answer["allocation_retries"],
        )

    def close(self) -> None:
        """Stop the process."""
        if self._process.stdin:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure() from None

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._failure()
        return json.loads(line)

    def _failure(self) -> UserError:
        self._process.wait()
        self._log.seek(0)
        return UserError(f"The engine of arm {self.name!r} stopped: {reason(self._log.read())}")


# ---------------------------------------------------------------- the process


def _serve(requests: TextIO, answers: TextIO) -> None:
    start = json.loads(requests.readline())
    llm = start_engine(start["options"], start["speculative_config"])
    answer(answers, {"ready": True})
    for line in requests:
        request = json.loads(line)
        answer(answers, _run_once(llm, request, speculating=start["speculative_config"] is not None))


def answer(answers: TextIO, message: dict[str, Any]) -> None:
    """Write one message to the process that started this one."""
    answers.write(json.dumps(message) + "\n")
    answers.flush()


def start_engine(options: dict[str, Any], speculative_config: dict[str, Any] | None) -> Any:
    """The `LLM` of this process; `options` are those of EngineOptions."""
    from vllm import LLM

    options = dict(options)
    if options.pop("sampled_drafts") and sampled_drafts_need_v1():
        os.environ.setdefault(V2_RUNNER, "0")
    share = gpu_share(options["tensor_parallel_size"], options.pop("neighbours"))
    more = options.pop("more")
    if share is not None:
        more = {"gpu_memory_utilization": share, **more}
    return LLM(
        options.pop("target"),
        speculative_config=speculative_config,
        disable_log_stats=False,
        enable_prefix_caching=False,  # the same prompts come again and again; each run must do the same work
        # What a tie is depends on the logits' magnitude (identity.py), which log probabilities do not tell.
        **({"logprobs_mode": "raw_logits"} if speculative_config is None else {}),
        **more,
        **options,
    )


def gpu_share(num_gpus: int, neighbours: int) -> float | None:
    """The share of every GPU that this engine may claim: vLLM refuses to start where less is free than it claims.

    The models of a training run, or an engine of another arm, may be on the same GPU.

    Args:
        num_gpus: GPUs that the engine runs on, the first ones that this process sees.
        neighbours: other engines that are, or will be, up at the same time.

    Returns:
        In (0, 1]; None without a GPU: vLLM's own default.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = zip(*(torch.cuda.mem_get_info(gpu) for gpu in range(num_gpus)), strict=True)
    smallest = min(f / t for f, t in zip(free, total, strict=True))
    return min(_MOST_OF_A_GPU / (1 + neighbours), _OF_WHAT_IS_FREE * smallest)


def _run_once(llm: Any, request: dict[str, Any], speculating: bool) -> dict[str, Any]:
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    sampling = [
        SamplingParams(
            max_tokens=request["max_tokens"],
            temperature=request["temperature"],
            seed=seed,
            stop_token_ids=request["stop_token_ids"],
            ignore_eos=request["ignore_eos"],
            detokenize=False,
            logprobs=2 if request["with_gaps"] else None,
        )
        for seed in request["seeds"] or [None] * len(prompts)
    ]
    before = SpecDecodeCounts.from_metrics(llm.get_metrics()) if speculating else None
    retries = allocation_retries()
    started, started_cpu = time.perf_counter(), time.process_time()
    with timed_steps(llm.llm_engine) as step_seconds:
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - started_cpu
    counts = None
    if before is not None:
        counts = dataclasses.asdict(SpecDecodeCounts.from_metrics(llm.get_metrics()) - before)
    done = [output.outputs[0] for output in outputs]
    gaps, ties_up_to = (
        clearness(llm, [one.logprobs for one in done]) if request["with_gaps"] else (None, None)
    )
    return {
        "tokens": [list(one.token_ids) for one in done],
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "step_seconds": step_seconds,
        "allocation_retries": allocation_retries() - retries,
        "counts": counts,
        "gaps": gaps,
        "ties_up_to": ties_up_to,
    }


def clearness(
    llm: Any, entries: Sequence[Sequence[dict[int, Any]]]
) -> tuple[list[list[float]], list[list[float]]]:
    """How clear an engine's choices were, and up to which gap each is a tie (identity.py), in nats.

    Args:
        llm: started with `logprobs_mode="raw_logits"`; the dtype is the one that it runs in, which "auto" is not.
        entries: vLLM's `logprobs` of each prompt's output, of two tokens at least.
    """
    dtype = str(llm.llm_engine.vllm_config.model_config.dtype).removeprefix("torch.")
    texts = [choices([[token.logprob for token in e.values()] for e in text], dtype) for text in entries]
    return [gaps for gaps, _ in texts], [ties for _, ties in texts]


def run_process(serve: Callable[[TextIO, TextIO], None]) -> None:
    """Be an engine's process: `serve` reads requests and writes answers, JSON lines both."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints goes to the log, not among the answers
    serve(sys.stdin, replies)


if __name__ == "__main__":
    run_process(_serve)
