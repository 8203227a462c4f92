"""The walk of serving along held-out trajectories: draft K, keep what is accepted, add one token, draft again.

Given the output y (a trajectory of the target at the serving temperature), what happened to a draft is known in law
(ours): where y shows y_t, a sampled draft had been accepted with probability r_t = min(1, q/p)(y_t), whatever came
before; a greedy draft exactly if argmax q = y_t. `expected_walk` sums over all walks, `simulate_walk` draws one. At
temperature 0 both are the same. Left out: serving (serving_eval.py), which has the last word.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import torch

from ppow_train.errors import UserError
from ppow_train.packing import window_tokens
from ppow_train.rollout import WindowRunner
from ppow_train.shapes import Shapes, batches, pass_bytes_per_token, tokens_at_once
from ppow_train.types import Encoded, Trajectories
from ppow_train.verification import (
    acceptance_ratio,
    greedy_accepted_length,
    sampled_accepted_length,
    token_logps,
)
from vllm_ppow.metrics import SpecDecodeCounts

_BATCH = 16  # trajectories per forward at most
_WINDOWS = 256  # windows per forward at most, where those of one trajectory are simulated
# Logits of a block, one start at least: on a CPU what its caches like (16 MiB in float32), on a GPU 1 GiB.
_LOGITS_ON_CPU, _LOGITS_ON_GPU = 2**22, 2**28
_BYTES_PER_LOGIT = 14  # of a block: as it comes, at two bytes, in float32, tempered, its softmax


@dataclasses.dataclass(frozen=True)
class ExpectedWalk:
    """What serving is expected to count on each of B prompts.

    Attributes:
        num_drafts: float64 [B], on the CPU.
        num_accepted_tokens_per_pos: float64 [B, K], accepted tokens by position in the draft, bonus excluded.
        covariance: float64 [B, 2, 2], of (drafts, accepted tokens) given the text; only where it was asked for.
    """

    num_drafts: torch.Tensor
    num_accepted_tokens_per_pos: torch.Tensor
    covariance: torch.Tensor | None = None

    @property
    def num_accepted_tokens(self) -> torch.Tensor:
        """Accepted tokens of each prompt, float64 [B]."""
        return self.num_accepted_tokens_per_pos.sum(-1)

    @property
    def mean_accepted(self) -> float:
        """Accepted tokens per draft over all prompts: Σ accepted / Σ drafts, as vLLM counts; nan without drafts."""
        return float(self.num_accepted_tokens.sum() / self.num_drafts.sum())

    @property
    def acceptance_per_position(self) -> tuple[float, ...]:
        """Share of drafts whose token at a position was accepted, [K]; unconditional."""
        return tuple((self.num_accepted_tokens_per_pos.sum(0) / self.num_drafts.sum()).tolist())

    @property
    def standard_error(self) -> float:
        """Of what serving counts as accepted tokens per draft on these very texts, around `mean_accepted`.

        Of a ratio, by the delta method: Var(ΣA / ΣD) ≈ Σ Var(A − R·D) / (ΣD)², prompts being independent.

        Raises:
            ValueError: the walk was taken without its covariance.
        """
        if self.covariance is None:
            raise ValueError("expected_walk was not asked for the covariance")
        weights = torch.tensor([-self.mean_accepted, 1.0], dtype=self.covariance.dtype)
        variance = (weights @ self.covariance @ weights).sum()
        return float(variance.clamp(min=0).sqrt() / self.num_drafts.sum())


@dataclasses.dataclass(frozen=True)
class TargetPath:
    """The target's part of a walk along B of the trajectories: the same for every drafter, so it can be kept.

    Attributes:
        rows: int64 [B], which of the runner's trajectories they are.
        trajectories: these, cut to the longest.
        encoded: hidden states and taps, without keys and values.
        logps: [B, M], log p of each token from the first start on; what lies past a trajectory's end is not read.
    """

    rows: torch.Tensor
    trajectories: Trajectories
    encoded: Encoded
    logps: torch.Tensor


def serving_tokens(trajectories: Trajectories, num_speculative_tokens: int) -> int:
    """Output tokens per prompt that a walk can serve: every draft must fit into the longest trajectory.

    Raises:
        UserError: not even one draft fits.
    """
    outputs = int((trajectories.lengths - trajectories.prompt_lengths).max())
    if outputs < num_speculative_tokens + 2:
        raise UserError(
            f"The held-out continuations have {outputs} tokens at most, a draft and what is before and after it need "
            f"{num_speculative_tokens + 2}: raise --max-new-tokens or drop --held-out."
        )
    return outputs - num_speculative_tokens


def path_rows(runner: WindowRunner) -> list[torch.Tensor]:
    """Rows of the trajectories with room for a draft, int64 [B] each: those of like length are read together."""
    order = runner.trajectories.lengths.argsort(stable=True)
    order = order[runner.trajectories.num_starts(runner.num_speculative_tokens)[order] > 0]
    lengths = runner.trajectories.lengths[order].tolist()
    return [order[part] for part in batches(lengths, tokens_at_once(runner.target), _BATCH)]


def path_bytes(runner: WindowRunner, rows: torch.Tensor) -> int:
    """Size of the `TargetPath` of some rows, in bytes on the target's device (ids and log p at every token)."""
    states = Shapes.of(runner.target.model).states(len(runner.target.tap_layers))
    return len(rows) * int(runner.trajectories.lengths[rows].max()) * (states + 8 + 4)


@torch.no_grad()
def target_path(runner: WindowRunner, rows: torch.Tensor) -> TargetPath:
    """Encode the target along some of the runner's trajectories, int64 [B]; each needs room for a draft."""
    chosen = runner.trajectories.select(rows)
    encoded = runner.target.encode(chosen)
    runner.target.forget()  # its keys and values, which no walk reads
    encoded = dataclasses.replace(encoded, cache=None)
    first, last = chosen.first_starts()[:, None], chosen.lengths[:, None] - 1
    position = torch.minimum(first + torch.arange(int((last - first).max()) + 1, device=rows.device), last)
    part = _starts_at_a_time(rows, runner.target.vocab_size)
    logps = [
        token_logps(
            runner.target.path_logits(encoded, at, 1)[:, :, 0] / runner.temperature,
            chosen.input_ids.gather(1, at),
        )
        for at in position.split(part, dim=1)
    ]
    return TargetPath(rows, chosen, encoded, torch.cat(logps, dim=1))


def target_paths(runner: WindowRunner) -> Iterator[TargetPath]:
    """Encode the target along all trajectories with room for a draft, batch by batch."""
    return (target_path(runner, rows) for rows in path_rows(runner))


@torch.no_grad()
def expected_walk(
    runner: WindowRunner,
    max_tokens: int,
    greedy_drafts: bool,
    paths: Iterable[TargetPath] | None = None,
    *,
    with_covariance: bool = False,
) -> ExpectedWalk:
    """The mean of `simulate_walk` over all its draws, by dynamic programming (ours): no sampling noise is left.

    From every start n, k tokens are accepted with probability Π_{t<=k} r_t · (1 − r_{k+1}); with v(n) the chance that
    a draft begins at n, v(n + k + 1) gains v(n) · P(k | n).

    Args:
        runner, max_tokens, greedy_drafts: as in `simulate_walk`.
        paths: what `target_paths` gave for these trajectories and this temperature; without it, it is computed.
        with_covariance: tell also how far single walks lie from the mean.
    """
    length, count = runner.num_speculative_tokens, len(runner.trajectories)
    num_drafts = torch.zeros(count, dtype=torch.float64)
    accepted = torch.zeros(count, length, dtype=torch.float64)
    covariance = torch.zeros(count, 2, 2, dtype=torch.float64) if with_covariance else None
    if max_tokens <= 1:  # the target's own first token is all
        return ExpectedWalk(num_drafts, accepted, covariance)
    for path in target_paths(runner) if paths is None else paths:
        num_starts = path.trajectories.num_starts(length).clamp(max=max_tokens - 1)
        survival = _acceptance_given_output(runner, path, num_starts, greedy_drafts).cumprod(-1)
        visits = _expected_visits(survival, num_starts)
        rows = path.rows.cpu()
        num_drafts[rows] = visits.sum(-1).cpu()
        accepted[rows] = (visits[..., None] * survival).sum(1).cpu()
        if covariance is not None:
            covariance[rows] = _covariance(survival, num_starts).cpu()
    return ExpectedWalk(num_drafts, accepted, covariance)


def _acceptance_given_output(
    runner: WindowRunner, path: TargetPath, num_starts: torch.Tensor, greedy_drafts: bool
) -> torch.Tensor:
    """r_t of the window at each start, float64 [B, W, K]; starts beyond `num_starts` repeat the last window."""
    drafter, length = runner.drafter, runner.num_speculative_tokens
    chosen = path.trajectories
    offset = torch.arange(int(num_starts.max()), device=num_starts.device)
    offsets = torch.minimum(offset, num_starts[:, None] - 1)
    draft = drafter.encode(chosen, path.encoded)
    ratios = []
    for part in offsets.split(_starts_at_a_time(path.rows, length * _draft_columns(runner)), dim=1):
        starts = chosen.first_starts()[:, None] + part
        columns = drafter.vocabulary.columns(window_tokens(chosen.input_ids, starts, length))
        logits = drafter.vocabulary.with_empty_rest(drafter.path_logits(draft, chosen, starts, length))
        if greedy_drafts:
            ratios.append((logits.argmax(-1) == columns).double())
            continue
        draft_logps = token_logps(logits / runner.temperature, columns)
        token = part[..., None] + torch.arange(length, device=part.device)
        target_logps = path.logps.gather(1, token.flatten(1)).view_as(draft_logps)
        # The other way round than in a rollout: given y, not given the draft.
        ratios.append(acceptance_ratio(draft_logps, target_logps).double())
    return torch.cat(ratios, dim=1)


def _starts_at_a_time(rows: torch.Tensor, logits_per_start: int) -> int:
    logits = _LOGITS_ON_CPU if rows.device.type == "cpu" else _LOGITS_ON_GPU
    return max(1, logits // (len(rows) * logits_per_start))


def walk_bytes(runner: WindowRunner) -> int:
    """What `expected_walk` takes at most on the target's device, beside the paths that are kept."""
    largest, length = 0, runner.num_speculative_tokens
    columns = max(runner.target.vocab_size, length * _draft_columns(runner))
    for rows in path_rows(runner):
        starts = int(runner.trajectories.num_starts(length)[rows].max())
        block = len(rows) * min(starts, _starts_at_a_time(rows, columns)) * columns
        tokens = len(rows) * int(runner.trajectories.lengths[rows].max())
        reading = tokens * pass_bytes_per_token(runner.target)
        largest = max(largest, reading, path_bytes(runner, rows) + _BYTES_PER_LOGIT * block)
    return largest


def _draft_columns(runner: WindowRunner) -> int:
    ids = runner.drafter.vocabulary.target_ids
    return runner.drafter.vocab_size if ids is None else len(ids) + 1


def _chances(survival: torch.Tensor) -> torch.Tensor:
    """P(k | start) for k = 0..K: Π_{t<=k} r_t [B, W, K] -> [B, W, K + 1]."""
    edge = torch.ones_like(survival[..., :1])
    reached = torch.cat([edge, survival, torch.zeros_like(edge)], dim=-1)
    return reached[..., :-1] - reached[..., 1:]


def _covariance(survival: torch.Tensor, num_starts: torch.Tensor) -> torch.Tensor:
    """Of drafts D and accepted tokens A of a walk: Π_{t<=k} r_t [B, W, K], int64 [B] -> [B, 2, 2] (ours).

    Backwards: what is still to come from start n is (1, k) plus what is to come from n + k + 1, so its first and second
    moments are means over k of those there.
    """
    batch, windows, length = survival.shape
    chance = _chances(survival)
    step = torch.ones(length + 1, 2, dtype=survival.dtype, device=survival.device)
    step[:, 1] = torch.arange(length + 1)
    mean = survival.new_zeros(batch, windows + length + 1, 2)
    second = survival.new_zeros(batch, windows + length + 1, 2, 2)
    inside = torch.arange(windows, device=num_starts.device) < num_starts[:, None]
    own = step[:, :, None] * step[:, None, :]
    for start in reversed(range(windows)):
        after = slice(start + 1, start + length + 2)
        weight = chance[:, start] * inside[:, start, None]
        mixed = step[:, :, None] * mean[:, after, None, :]
        mean[:, start] = (weight[..., None] * (step + mean[:, after])).sum(1)
        moments = own + mixed + mixed.mT + second[:, after]
        second[:, start] = (weight[..., None, None] * moments).sum(1)
    return second[:, 0] - mean[:, 0, :, None] * mean[:, 0, None, :]


def _expected_visits(survival: torch.Tensor, num_starts: torch.Tensor) -> torch.Tensor:
    """Chance that a draft begins at each start: Π_{t<=k} r_t [B, W, K], int64 [B] -> [B, W]."""
    batch, windows, length = survival.shape
    chance = _chances(survival)
    visits = survival.new_zeros(batch, windows + length + 1)
    visits[:, 0] = 1.0
    inside = torch.arange(windows, device=num_starts.device) < num_starts[:, None]
    for start in range(windows):
        visits[:, start] *= inside[:, start]
        visits[:, start + 1 : start + length + 2] += visits[:, start, None] * chance[:, start]
    return visits[:, :windows]


@torch.no_grad()
def simulate_walk(
    runner: WindowRunner, max_tokens: int, greedy_drafts: bool, seed: int = 0, chunk: int | None = None
) -> SpecDecodeCounts:
    """Walk each trajectory once, drawing what is accepted.

    Args:
        runner: its trajectories need K tokens past `max_tokens`; where drafts are sampled, its temperature must be the
            serving one.
        max_tokens: output tokens per prompt at which serving stops.
        greedy_drafts: drafts are argmax (temperature 0, or draft_sample_method greedy).
        seed: of the acceptance draws.
        chunk: windows per forward; None for as many as their distributions allow.

    Returns:
        Counts under vLLM's names. A draft that would reach past the end of the text is left out.
    """
    generator = torch.Generator().manual_seed(seed)
    length = runner.num_speculative_tokens
    per_position = [0] * length
    num_drafts = 0
    for row in range(len(runner.trajectories)):
        accepted = accepted_at_every_start(runner, row, greedy_drafts, generator, chunk)
        first = 1  # output tokens before the first draft: the target's own
        while first - 1 < len(accepted) and first < max_tokens:
            kept = accepted[first - 1]
            num_drafts += 1
            for position in range(kept):
                per_position[position] += 1
            first += kept + 1
    return SpecDecodeCounts(num_drafts, num_drafts * length, sum(per_position), tuple(per_position))


def _windows_at_a_time(runner: WindowRunner) -> int:
    """Every forward reads the trajectory again, so they are large on a CPU too; both distributions are looked at."""
    logits = runner.num_speculative_tokens * (runner.target.vocab_size + _draft_columns(runner))
    return max(1, min(_WINDOWS, _LOGITS_ON_GPU // logits))


def accepted_at_every_start(
    runner: WindowRunner,
    row: int,
    greedy_drafts: bool,
    generator: torch.Generator | None = None,
    chunk: int | None = None,
) -> list[int]:
    """k of the window at every start of one trajectory; arguments as in `simulate_walk`.

    Args:
        generator: of the acceptance draws, on the CPU; drafts that are greedy need none.
    """
    chunk = _windows_at_a_time(runner) if chunk is None else chunk
    room = int(runner.trajectories.num_starts(runner.num_speculative_tokens)[row])
    starts = runner.trajectories.first_starts()[row] + torch.arange(
        room, device=runner.trajectories.lengths.device
    )
    accepted: list[int] = []
    for part in starts.split(chunk):
        windows = runner.path_windows(torch.full_like(part, row), part)
        if greedy_drafts:
            kept = greedy_accepted_length(windows.draft_logits.argmax(-1), windows.tokens)
        else:
            draft_logps = token_logps(windows.draft_logits, windows.tokens)
            target_logps = token_logps(windows.target_logits, windows.tokens)
            uniforms = torch.rand(draft_logps.shape, generator=generator).to(draft_logps.device)
            # The other way round than in a rollout: given y, not given the draft.
            ratio = acceptance_ratio(draft_logps, target_logps)
            kept = sampled_accepted_length(ratio, uniforms)
        accepted += kept.tolist()
    return accepted
