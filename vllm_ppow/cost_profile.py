"""What steps of a server cost, as `ppow profile` measured them: the file `cost_profile.json` and what follows from it.

It stands beside the adapter's files and is no part of the adapter: neither its fingerprint nor its loading looks at it.
It holds for one machine and one vLLM, which it names, so that a stale one is noticed (`differences`). Left out:
measuring (compat/profiling.py, `ppow profile`), deciding on a draft length (window.py).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from vllm_ppow import grid
from vllm_ppow.artifact import ArtifactError
from vllm_ppow.speedup import tokens_per_second

COST_PROFILE_FILE = "cost_profile.json"
FORMAT = 1

_GRIDS = ("target_step_seconds", "draft_seconds", "overhead_seconds")
_AXES = ("context_lengths", "batch_sizes", "draft_lengths")
_TEXTS = (
    *("vllm_version", "device", "dtype", "quantization", "kv_cache_dtype"),
    *("target_fingerprint", "adapter_fingerprint"),
)
_FLAGS = ("enforce_eager", "full_graphs")


class CostProfileError(ArtifactError):
    """A cost profile that cannot be used; the message is one sentence with the remedy."""


@dataclasses.dataclass(frozen=True)
class CostProfile:
    """Times of decoding steps, in seconds, on three axes, and the acceptance on given prompts.

    A step is one pass of the engine in which every one of B requests gets its drafted tokens verified and the next ones
    drafted. The three grids have the axes [context_lengths][batch_sizes][draft_lengths] and split the time of a step.

    Attributes:
        vllm_version: as `vllm.__version__`.
        device: name of the device, for people, and compared as text.
        dtype: of the target, as vLLM names it.
        tensor_parallel_size: of the target.
        target_fingerprint: `fingerprint_model` of the target.
        adapter_fingerprint: `adapter_fingerprint` of the adapter.
        num_speculative_tokens: K, the longest draft measured.
        context_lengths: tokens in the KV cache per request, increasing.
        batch_sizes: requests per step, increasing.
        draft_lengths: tokens per draft, increasing from 0 to K.
        target_step_seconds: the target's pass over B · (draft + 1) tokens, with sampling and verification.
        draft_seconds: the drafter's passes that make one draft; at length 0, what it still does to keep its KV cache.
        overhead_seconds: the rest of the step: scheduling, preparing inputs, handing out outputs.
        acceptance_per_position: P(first i drafted tokens accepted), i = 1..K, unconditional as vLLM counts it; may be
            empty, where no prompts were run.
        num_drafts: drafts that the acceptance was counted on.
        enforce_eager: measured without compilation and CUDA graphs.
        full_graphs: measured with CUDA graphs of whole steps.
        quantization: of the target, as vLLM names it (its checkpoint's, or one made while loading); "none".
        kv_cache_dtype: as vLLM names it; "auto" for the target's own dtype.
        format: version of this file's format.
    """

    vllm_version: str
    device: str
    dtype: str
    tensor_parallel_size: int
    target_fingerprint: str
    adapter_fingerprint: str
    num_speculative_tokens: int
    context_lengths: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    draft_lengths: tuple[int, ...]
    target_step_seconds: grid.Grid
    draft_seconds: grid.Grid
    overhead_seconds: grid.Grid
    acceptance_per_position: tuple[float, ...] = ()
    num_drafts: int = 0
    enforce_eager: bool = False
    full_graphs: bool = False
    quantization: str = "none"
    kv_cache_dtype: str = "auto"
    format: int = FORMAT

    def __post_init__(self) -> None:
        _check(self)

    def step_seconds(self, batch: int, num_draft_tokens: int, context: int | None = None) -> float:
        """Time of one step of `batch` requests whose drafts have `num_draft_tokens` tokens.

        The sum of the three grids, made monotone in each axis (grid.py), linear between the measured points and beyond
        the last ones. Beyond the longest context every draft length is given the same slope (`_context_slopes`).

        Args:
            batch: requests in the step (>= 1).
            num_draft_tokens: tokens per draft (>= 0).
            context: tokens in each request's KV cache; None for the mean over the measured context lengths.
        """
        longest = self.context_lengths[-1]
        if context is None or context <= longest:
            return self._at(self._step_grid, batch, num_draft_tokens, context)
        slope = grid.interpolate([self.batch_sizes], self._context_slopes, [batch])
        return self._at(self._step_grid, batch, num_draft_tokens, longest) + (context - longest) * slope

    @functools.cached_property
    def _context_slopes(self) -> tuple[float, ...]:
        """Seconds per token of context beyond the longest (>= 0), by batch size; the mean over draft lengths.

        Of one draft length alone it is a difference of two noisy times. Carried on to a context many times as long it
        would say which K is cheap, and together with a batch beyond the largest that a step takes less than no time.
        """
        if len(self.context_lengths) < 2:
            return (0.0,) * len(self.batch_sizes)
        before, last = self._step_grid[-2:]
        distance = self.context_lengths[-1] - self.context_lengths[-2]
        return tuple((sum(b) - sum(a)) / len(a) / distance for a, b in zip(before, last, strict=True))

    def draft_cost_ratio(self, batch: int = 1, context: int | None = None) -> float:
        """γ: time of one draft step / one target step, both at `batch` requests (>= 0; ours).

        One draft step is `pass_seconds`, one target step the target's pass without drafted tokens.
        """
        return self.pass_seconds(batch, context) / self._at(self.target_step_seconds, batch, 0, context)

    def drafting_seconds(self, batch: int, num_draft_tokens: int, context: int | None = None) -> float:
        """Time of the drafter's passes that make drafts of that length, linear between the measured points."""
        return self._at(self.draft_seconds, batch, num_draft_tokens, context)

    def pass_seconds(self, batch: int, context: int | None = None) -> float:
        """Time of one more pass of the drafter over `batch` requests (>= 0; ours).

        The slope of the drafter's time over draft lengths >= 1 (least squares): the first pass, which reads what the
        target just verified, is left to the intercept. With one such length it is that draft's time per token.
        """
        lengths = [length for length in self.draft_lengths if length >= 1]
        seconds = [self.drafting_seconds(batch, length, context) for length in lengths]
        return max(0.0, grid.slope(lengths, seconds) if len(lengths) > 1 else seconds[0] / lengths[0])

    def token_seconds(self, batch: int, context: int | None = None) -> float:
        """What one more token adds to a target step of `batch` requests (>= 0; ours): its slope (least squares)."""
        seconds = [
            self._at(self.target_step_seconds, batch, length, context) for length in self.draft_lengths
        ]
        return max(0.0, grid.slope(self.draft_lengths, seconds)) / batch

    def most_tokens_per_second(self, batch: int, context: int | None = None) -> float:
        """Tokens per second of `batch` requests at the draft length that makes most of them, bonus tokens included."""
        accepted = [0.0, *itertools.accumulate(self.acceptance_per_position)]
        return max(
            tokens_per_second(
                batch,
                accepted[min(length, len(accepted) - 1)],
                self.step_seconds(batch, length, context),
            )
            for length in self.draft_lengths
        )

    def token_cost_ratio(self, batch: int, num_draft_tokens: int, context: int | None = None) -> float:
        """What a drafted token adds to a step, over a step without drafts (>= 0; ours).

        (step(B, K) / step(B, 0) − 1) / K, with drafting, verifying and overhead in it. As the `draft_cost_ratio` of
        `speedup.expected_speedup`, it makes 1 + K·γ the measured step(B, K) / step(B, 0).

        Args:
            num_draft_tokens: K >= 1.
        """
        with_drafts = self.step_seconds(batch, num_draft_tokens, context)
        return (with_drafts / self.step_seconds(batch, 0, context) - 1.0) / num_draft_tokens

    def differences(self, **found: str | int | bool | None) -> list[str]:
        """How what is found now differs from what was measured; empty if the profile holds.

        Args:
            found: any of vllm_version, device, dtype, tensor_parallel_size, target_fingerprint, adapter_fingerprint,
                enforce_eager, full_graphs, quantization, kv_cache_dtype; None is not compared.

        Returns:
            One text per difference, such as "vllm_version 0.33.0, measured with 0.32.0".
        """
        return [
            f"{name} {_short(value)}, measured with {_short(getattr(self, name))}"
            for name, value in found.items()
            if value is not None and value != getattr(self, name)
        ]

    @property
    def set_up(self) -> str:
        """How the engine ran that was measured, for people."""
        graphs = "eager" if self.enforce_eager else f"compiled{', full graphs' * self.full_graphs}"
        return (
            f"{self.dtype}, quantization {self.quantization}, KV cache {self.kv_cache_dtype}, {graphs}, "
            f"TP {self.tensor_parallel_size}"
        )

    @functools.cached_property
    def _step_grid(self) -> grid.Grid:
        return grid.monotone(grid.add(*(getattr(self, name) for name in _GRIDS)), len(_AXES))

    def _at(self, values: grid.Grid, batch: int, num_draft_tokens: int, context: int | None) -> float:
        axes = [getattr(self, name) for name in _AXES]
        contexts = self.context_lengths if context is None else (context,)
        found = [grid.interpolate(axes, values, (at, batch, num_draft_tokens)) for at in contexts]
        return sum(found) / len(found)


def _short(value: str | int) -> str:
    return f"{value[:19]}…" if isinstance(value, str) and value.startswith("sha256:") else str(value)


# ---------------------------------------------------------------- validation


def _check(profile: CostProfile) -> None:
    for name in _TEXTS:
        _require(isinstance(getattr(profile, name), str), name, "text", getattr(profile, name))
    for name in _FLAGS:
        _require(isinstance(getattr(profile, name), bool), name, "true or false", getattr(profile, name))
    for name in ("tensor_parallel_size", "num_speculative_tokens"):
        _require(_is_int(getattr(profile, name), 1), name, "a whole number >= 1", getattr(profile, name))
    for name, least in zip(_AXES, (1, 1, 0), strict=True):
        _check_axis(name, getattr(profile, name), least)
    ends = (profile.draft_lengths[0], profile.draft_lengths[-1])
    whole = ends == (0, profile.num_speculative_tokens)
    _require(whole, "draft_lengths", "from 0 to num_speculative_tokens", profile.draft_lengths)
    shape = tuple(len(getattr(profile, name)) for name in _AXES)
    for name in _GRIDS:
        if not _has_shape(getattr(profile, name), shape):
            raise CostProfileError(
                f"{name} must hold numbers of seconds >= 0 on the axes {list(_AXES)}, {shape}: measure again with "
                "`ppow profile`."
            )
    steps = [value for context in profile.target_step_seconds for batch in context for value in batch]
    _require(min(steps) > 0, "target_step_seconds", "above 0 everywhere", min(steps))
    _check_acceptance(profile.acceptance_per_position)
    _require(_is_int(profile.num_drafts, 0), "num_drafts", "a whole number >= 0", profile.num_drafts)


def _check_axis(name: str, values: Any, least: int) -> None:
    good = isinstance(values, tuple) and values and all(_is_int(value, least) for value in values)
    _require(
        bool(good) and list(values) == sorted(set(values)),
        name,
        f"increasing whole numbers >= {least}",
        values,
    )


def _check_acceptance(values: Any) -> None:
    good = isinstance(values, tuple) and all(_is_number(value) and value <= 1 for value in values)
    _require(good, "acceptance_per_position", "numbers from 0 to 1", values)
    _require(
        list(values) == sorted(values, reverse=True),
        "acceptance_per_position",
        "unconditional, so never rising",
        values,
    )


def _has_shape(values: Any, shape: tuple[int, ...]) -> bool:
    if not shape:
        return _is_number(values)
    good = isinstance(values, tuple) and len(values) == shape[0]
    return good and all(_has_shape(value, shape[1:]) for value in values)


def _is_int(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and value >= 0


def _require(holds: bool, name: str, wanted: str, value: Any) -> None:
    if not holds:
        raise CostProfileError(
            f"{name} of a cost profile must be {wanted}, got {value!r}: measure again with `ppow profile`."
        )


# ---------------------------------------------------------------- file


def read_cost_profile(directory: str | os.PathLike[str]) -> CostProfile | None:
    """The profile beside an adapter; None if there is none.

    Raises:
        CostProfileError: there is one, and it cannot be read.
    """
    path = Path(directory) / COST_PROFILE_FILE
    return read_profile_file(path) if path.exists() else None


def read_profile_file(path: str | os.PathLike[str]) -> CostProfile:
    """Read and validate one profile.

    Raises:
        CostProfileError: missing, unreadable, of another format, with unknown or missing keys, or with values out of
            range.
    """
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CostProfileError(
            f"Cost profile {path} does not exist: measure one with `ppow profile`."
        ) from None
    except (OSError, ValueError) as error:
        raise CostProfileError(
            f"Cost profile {path} is not readable JSON ({error}): measure again with `ppow profile`, or delete it."
        ) from error
    return parse_profile(raw, f"Cost profile {path}")


def parse_profile(raw: Any, source: str = COST_PROFILE_FILE) -> CostProfile:
    """Validate the parsed JSON of a profile.

    Raises:
        CostProfileError: as `read_profile_file`; `source` begins the message.
    """
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        found = raw.get("format") if isinstance(raw, dict) else type(raw).__name__
        raise CostProfileError(
            f"{source} has format {found!r}, this version reads {FORMAT}: measure again with `ppow profile`."
        )
    known = {field.name for field in dataclasses.fields(CostProfile)}
    if different := sorted(known ^ set(raw)):
        raise CostProfileError(
            f"{source} lacks keys, or has unknown ones ({', '.join(different)}): measure again with "
            "`ppow profile`, or delete it."
        )
    try:
        return CostProfile(**{name: _tuples(value) for name, value in raw.items()})
    except CostProfileError as error:
        raise CostProfileError(f"{source}: {error}") from None


def write_cost_profile(directory: str | os.PathLike[str], profile: CostProfile) -> Path:
    """Write the profile beside an adapter, whole or not at all; its path.

    Raises:
        OSError: no such directory, no room or no permission; an older profile is left as it was.
    """
    return write_profile_file(Path(directory) / COST_PROFILE_FILE, profile)


def write_profile_file(path: str | os.PathLike[str], profile: CostProfile) -> Path:
    """As `write_cost_profile`, to a file of any name."""
    final = Path(path)
    text = json.dumps(dataclasses.asdict(profile), indent=2)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{final.name}.", dir=final.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text + "\n")
        Path(temporary).chmod(0o644)  # mkstemp's own mode hides it from the server's user
        Path(temporary).replace(final)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return final


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
