"""The engine that `ppow profile` measures, in a process of its own. Run as a module it IS that process.

Left out: what is measured (profiling.py), how it is shown (profile_table.py).
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from ppow_train.errors import UserError
from ppow_train.profiling import ProfileOptions, make_profile, measure_acceptance, measure_steps
from ppow_train.serving_eval import Engine, answer, ppow_spec, run_process, start_engine
from vllm_ppow.artifact import Adapter, ArtifactError, read_adapter
from vllm_ppow.cost_profile import CostProfile, parse_profile


@dataclasses.dataclass(frozen=True)
class Measured:
    """A profile, and how far its figures can be trusted.

    Attributes:
        profile: the medians.
        spread: half the range between the quartiles of a step, over its median; the median over the grid.
        worst_spread: the largest of them.
        moved: by how much of itself a figure was moved at most to take noise out of it (straight.py).
    """

    profile: CostProfile
    spread: float
    worst_spread: float
    moved: float


class ProfileEngine(Engine):
    """An engine that serves an adapter and can be profiled. Use as a context manager."""

    module = "ppow_train.profile_engine"

    def profile(
        self,
        adapter: Adapter,
        options: ProfileOptions,
        prompts: Sequence[Sequence[int]],
        say: Callable[[str], None] = lambda text: None,
    ) -> Measured:
        """Measure (see profiling.py).

        Args:
            prompts: token ids.
            say: told what is happening.

        Raises:
            UserError: the KV cache cannot hold a point of the grid, or this vLLM cannot be measured.
        """
        self._send(
            {
                "adapter": str(adapter.directory),
                "options": dataclasses.asdict(options),
                "prompts": [list(ids) for ids in prompts],
            }
        )
        while "said" in (message := self._receive()):
            say(message["said"])
        if "refused" in message:
            raise UserError(message["refused"])
        profile = parse_profile(message.pop("profile"), "what was measured")
        return Measured(profile, **message)


def measured_spec(
    adapter: Adapter, base_drafter: Path, options: ProfileOptions, *, allow_target_mismatch: bool = False
) -> dict[str, Any]:
    """The speculative config of the engine to measure; its graphs are captured for every draft length."""
    from vllm_ppow.compat.profiling import draft_length_ladder

    spec = ppow_spec(  # a fixed window: nothing else may steer
        adapter,
        base_drafter,
        options.draft_lengths[-1],
        allow_target_mismatch=allow_target_mismatch,
    )
    ladder = draft_length_ladder(options.draft_lengths)
    return spec | {"num_speculative_tokens_per_batch_size": ladder}


# ---------------------------------------------------------------- the process


def _serve(requests: TextIO, answers: TextIO) -> None:
    start = json.loads(requests.readline())
    llm = start_engine(start["options"], start["speculative_config"])
    answer(answers, {"ready": True})
    request = json.loads(requests.readline())
    given: dict[str, Any] = request["options"]
    axes = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    options = ProfileOptions(**given | axes)
    adapter = read_adapter(request["adapter"])
    try:
        message = run(llm, adapter, options, request["prompts"], lambda text: answer(answers, {"said": text}))
    except (UserError, ArtifactError) as error:
        answer(answers, {"refused": str(error)})
    else:
        answer(answers, dataclasses.asdict(message))


def run(
    llm: Any,
    adapter: Adapter,
    options: ProfileOptions,
    prompts: Sequence[Sequence[int]],
    say: Callable[[str], None] = lambda text: None,
) -> Measured:
    """Measure an `LLM` of this process that serves `adapter`."""
    from vllm_ppow.compat.profiling import StepProfiler, lacks_full_graphs, machine

    if lacks_full_graphs(llm.llm_engine.vllm_config):
        say(
            "without full CUDA graphs, which vLLM's V1 model runner gives up for draft lengths that change: a server "
            "with a fixed window is faster than what is measured"
        )
    with StepProfiler(llm, options.draft_lengths[-1]) as profiler:
        timed = measure_steps(llm, profiler, options, prompts, say)
        say(f"acceptance: {len(prompts)} prompts")
        counts = measure_acceptance(llm, profiler, options, prompts)
    profile = make_profile(timed.samples, counts, options, adapter, **machine(llm.llm_engine.vllm_config))
    spreads = [found.spread for found in timed.samples.values()]
    return Measured(profile, statistics.median(spreads), max(spreads), timed.moved)


if __name__ == "__main__":
    run_process(_serve)
