"""What the steps of an engine cost, and what its drafter gets accepted: an `LLM` in, a CostProfile out.

Every point of the grid is measured several times, points and draft lengths taking turns, so that what else the machine
does falls on all of them; what counts are medians of steps in which every request decodes, at one pace of the machine
(turns.py), with noise taken out as far as it can be told (straight.py). Left out: how passes are timed and draft
lengths set (vllm_ppow/compat/profiling.py), starting the engine (profile_engine.py).
"""

from __future__ import annotations

import dataclasses
import itertools
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ppow_train import straight
from ppow_train.errors import UserError
from ppow_train.turns import Samples, Turn, at_one_pace, logs_at_one_pace
from vllm_ppow.cost_profile import CostProfile
from vllm_ppow.metrics import SpecDecodeCounts

if TYPE_CHECKING:
    from vllm_ppow.artifact import Adapter
    from vllm_ppow.compat.profiling import PassTime, StepProfiler

_PROMPT_TOKENS_PER_STEP = 512  # fewer than vLLM takes by default, what it keeps free for drafts subtracted
# Steps after a change of draft length: the first verifies drafts of the old one, with async scheduling the second too.
_WARM_UP = 3
# In a round a point has as many turns over all draft lengths as fit into so many seconds, one at least and so many at
# most: where steps are short, a second of other work would fall on several draft lengths, and turns are cheap.
_ROUND_SECONDS, _MOST_TURNS = 6.0, 4


@dataclasses.dataclass(frozen=True)
class ProfileOptions:
    """What is measured.

    Attributes:
        batch_sizes, context_lengths, draft_lengths: the grid, as in `CostProfile`.
        steps: steps measured in a row.
        rounds: passes over the grid, so that every point is measured rounds · steps times at least.
        max_tokens: of each continuation that acceptance is counted on.
        temperature: of these continuations; steps are measured at 0.
    """

    batch_sizes: tuple[int, ...]
    context_lengths: tuple[int, ...]
    draft_lengths: tuple[int, ...]
    steps: int = 5
    rounds: int = 3
    max_tokens: int = 64
    temperature: float = 0.0

    @property
    def max_new_tokens(self) -> int:
        """Tokens that one request can grow by at one point, if every drafted token is accepted."""
        decoding = sum(length + 1 for length in self.draft_lengths) * (self.steps + _WARM_UP)
        return decoding + start_steps(self.batch_sizes[-1], self.context_lengths[-1])

    @property
    def max_model_len(self) -> int:
        """Tokens that the engine must hold per request."""
        return self.context_lengths[-1] + self.max_new_tokens + self.room

    @property
    def room(self) -> int:
        """Tokens to leave free at the end, short of which vLLM's drafter is passed over."""
        return 4 * (self.draft_lengths[-1] + 1)


def draft_lengths(num_speculative_tokens: int) -> tuple[int, ...]:
    """Which lengths up to K are measured: 0, powers of two, K."""
    powers = (2**power for power in range(num_speculative_tokens.bit_length()))
    return tuple(sorted({0, *powers, num_speculative_tokens}))


def start_steps(batch: int, context: int) -> int:
    """Steps in which that many requests have surely read their prompts, if the KV cache holds them."""
    return 10 + batch + 2 * batch * context // _PROMPT_TOKENS_PER_STEP


Point = tuple[int, int, int]  # context length, batch size, draft length


@dataclasses.dataclass(frozen=True)
class Timed:
    """What steps took.

    Attributes:
        samples: of every point of the grid.
        moved: by how much of itself a point was moved at most to take noise out of it (straight.py).
    """

    samples: dict[Point, Samples]
    moved: float


def measure_steps(
    llm: Any,
    profiler: StepProfiler,
    options: ProfileOptions,
    prompts: Sequence[Sequence[int]],
    say: Callable[[str], None] = lambda text: None,
) -> Timed:
    """Time steps at every point of the grid.

    Args:
        llm: with room for the longest context and `max(batch_sizes)` requests, without prefix caching.
        profiler: open on it.
        prompts: token ids; contexts are cut from them.
        say: told what is happening.

    Raises:
        UserError: a batch never decoded as a whole, because the KV cache holds too few tokens.
    """
    turns: dict[tuple[int, int], list[Turn]] = defaultdict(list)
    for number in range(-1, options.rounds):  # the first is not counted: caches and kernels get ready
        contexts = options.context_lengths[:1] if number < 0 else options.context_lengths
        for context, batch in itertools.product(contexts, options.batch_sizes):
            name = "warm-up" if number < 0 else f"round {number + 1} of {options.rounds}"
            say(f"{name}: {batch} requests, {context} tokens of context")
            began = time.perf_counter()
            for _ in range(1 if number < 0 else _MOST_TURNS):
                turn = _turn(llm, profiler, context, batch, options, prompts, len(turns[context, batch]))
                if number >= 0:
                    turns[context, batch].append(turn)
                if time.perf_counter() - began >= _ROUND_SECONDS:
                    break
    return _pooled(turns, options)


def _pooled(turns: Mapping[tuple[int, int], Sequence[Turn]], options: ProfileOptions) -> Timed:
    """The turns of every (context, batch size) at one pace, and straightened as far as they are noise."""
    pooled = {place: at_one_pace(taken) for place, taken in turns.items()}
    for (context, batch), by_length in pooled.items():
        if len(by_length) < len(options.draft_lengths):
            raise _too_small(batch, context)
    sd = straight.noise([one for taken in turns.values() for one in logs_at_one_pace(taken)])
    factors = straight.corrections(
        {place: {n: sum(s.medians) for n, s in found.items()} for place, found in pooled.items()},
        {place: straight.median_variance(sd, len(taken)) for place, taken in turns.items()},
    )
    samples = {
        (*place, length): found.times(factors[place][length])
        for place, by_length in pooled.items()
        for length, found in by_length.items()
    }
    return Timed(samples, max(abs(one - 1.0) for by_length in factors.values() for one in by_length.values()))


def _turn(
    llm: Any,
    profiler: StepProfiler,
    context: int,
    batch: int,
    options: ProfileOptions,
    prompts: Sequence[Sequence[int]],
    number: int,
) -> Turn:
    """Start requests and time a burst of every draft length, of those that stayed steady."""
    requests = _start(llm, profiler, context, batch, options, prompts)
    bursts = {
        length: Samples.of(*_burst(llm, profiler, batch, length, options.steps))
        for length in _turned(options.draft_lengths, number)
    }
    llm.llm_engine.abort_request(requests)
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
    return {length: samples for length, samples in bursts.items() if samples.target}


def _turned(values: Sequence[int], by: int) -> list[int]:
    """Upwards and downwards in turn: the context grows on the way, and must not favour one end."""
    return list(values if by % 2 == 0 else reversed(values))


def _start(
    llm: Any,
    profiler: StepProfiler,
    context: int,
    batch: int,
    options: ProfileOptions,
    prompts: Sequence[Sequence[int]],
) -> list[str]:
    """Add requests, and step until all of them decode; their ids."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0.0, ignore_eos=True, max_tokens=options.max_new_tokens, detokenize=False
    )
    texts = itertools.cycle(itertools.chain.from_iterable(prompts))
    names = [f"profile-{uuid.uuid4().hex}" for _ in range(batch)]
    profiler.draft_length = 0
    profiler.take()
    for name in names:
        prompt = {"prompt_token_ids": list(itertools.islice(texts, context))}
        llm.llm_engine.add_request(name, prompt, sampling)
    for _ in range(start_steps(batch, context)):
        llm.llm_engine.step()
        passes, _ = profiler.take()
        if any(one.batch == batch and one.draft_length is not None for one in passes):
            return names
    raise _too_small(batch, context)


def _burst(
    llm: Any, profiler: StepProfiler, batch: int, length: int, steps: int
) -> tuple[list[PassTime], list[float]]:
    """Some steps at one draft length; of them, those in which all requests verified and drafted that many tokens."""
    profiler.draft_length = length
    for _ in range(_WARM_UP):
        llm.llm_engine.step()
    profiler.take()
    for _ in range(steps):
        llm.llm_engine.step()
    passes, seconds = profiler.take()
    wanted = (batch, length, length)
    steady = [one for one in passes if (one.batch, one.draft_length, one.next_draft_length) == wanted]
    return (steady, seconds) if len(steady) == len(passes) else ([], [])


def _too_small(batch: int, context: int) -> UserError:
    return UserError(
        f"{batch} requests with {context} tokens of context never decoded together, since the KV cache holds too few "
        "tokens: give smaller --batch-sizes or --context-lengths, or a larger cache (on a CPU: VLLM_CPU_KVCACHE_SPACE)."
    )


def measure_acceptance(
    llm: Any, profiler: StepProfiler, options: ProfileOptions, prompts: Sequence[Sequence[int]]
) -> SpecDecodeCounts:
    """vLLM's counters over one continuation of every prompt, with the longest drafts."""
    from vllm import SamplingParams

    profiler.draft_length = options.draft_lengths[-1]
    sampling = SamplingParams(
        temperature=options.temperature, max_tokens=options.max_tokens, seed=0, detokenize=False
    )
    before = SpecDecodeCounts.from_metrics(llm.get_metrics())
    llm.generate([{"prompt_token_ids": list(ids)} for ids in prompts], sampling, use_tqdm=False)
    return SpecDecodeCounts.from_metrics(llm.get_metrics()) - before


def make_profile(
    samples: dict[Point, Samples],
    counts: SpecDecodeCounts,
    options: ProfileOptions,
    adapter: Adapter,
    **machine: Any,
) -> CostProfile:
    """The profile that these measurements make; `machine` are its fields that say where they were made."""
    target, draft, overhead = (
        tuple(
            tuple(
                tuple(samples[context, batch, length].medians[part] for length in options.draft_lengths)
                for batch in options.batch_sizes
            )
            for context in options.context_lengths
        )
        for part in range(3)
    )
    return CostProfile(
        target_fingerprint=adapter.config.target.fingerprint,
        adapter_fingerprint=adapter.config.adapter_fingerprint,
        num_speculative_tokens=options.draft_lengths[-1],
        context_lengths=options.context_lengths,
        batch_sizes=options.batch_sizes,
        draft_lengths=options.draft_lengths,
        target_step_seconds=target,
        draft_seconds=draft,
        overhead_seconds=overhead,
        acceptance_per_position=counts.acceptance_per_position if counts.num_drafts else (),
        num_drafts=counts.num_drafts,
        **machine,
    )
