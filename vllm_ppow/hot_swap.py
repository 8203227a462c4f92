"""Another adapter in a running engine: all workers or none, and back again when acceptance falls.

A swap has two steps on every worker. *Stage* checks the new adapter as start-up does and merges it into the base
drafter's tensors beside the running ones; *load* writes them over the running ones between two engine steps, so no
request is dropped. If a worker fails in the second step, all of them go back; once none has, each forgets what it would
have gone back to. What is written belongs to the drafter only: output stays the target's own throughout.

The KV cache that the old drafter filled for running requests, and prefixes cached from it, stay: clearing them would
throw away the target's too. Acceptance of those requests may dip until they end.

Left out: what a worker does (compat/hot_swap.py), HTTP (compat/endpoints.py).
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import re
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

from vllm_ppow.artifact import (
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    PPOW_CONFIG,
    Adapter,
    ArtifactError,
    read_adapter,
)
from vllm_ppow.metrics import SpecDecodeCounts
from vllm_ppow.resolve import resolve_directory

logger = logging.getLogger("vllm.ppow.hot_swap")

NOT_ON = 'This engine cannot swap adapters: start it with method "ppow" and "ppow": {"hot_swap": true}.'

# A worker's answer to each step: {"ok": bool, "error": str, …}. Workers never raise: on several ranks, an exception of
# one leaves the answers of the others in vLLM's queues, and the next step would read those.
Reply = dict[str, Any]
_MOST_DRAFTS = 10**9  # that a verdict may take
_REVISION = re.compile(r"\w[\w.+@-]*(/\w[\w.+@-]*)*", re.ASCII)  # no part begins with a dot
Rpc = Callable[[str, tuple[Any, ...]], Awaitable[list[Reply]]]


class SwapError(ArtifactError):
    """A swap that was refused or failed; the message is one sentence, and says which adapter serves on."""


@dataclasses.dataclass(frozen=True)
class Allowed:
    """From where a server may be told to take adapters.

    Attributes:
        directory: adapters inside it, symbolic links followed; None for no directory.
        repo: the Hub repo of the adapter that the server started with; None if it started from a directory.
    """

    directory: Path | None = None
    repo: str | None = None

    def resolve(self, name: str, revision: str | None = None) -> Path:
        """The adapter's directory.

        Args:
            name: the Hub repo, or a path, relative ones taken from the allowed directory.
            revision: of the Hub repo.

        Raises:
            SwapError: it lies outside of what is allowed.
        """
        if self.repo is not None and name == self.repo:
            # The Hub client reads the file of a revision's name in its cache, and follows what it says.
            if revision is not None and not _REVISION.fullmatch(revision):
                raise SwapError(f"{revision[:80]!r} is not a branch, tag or commit of a Hub repo: give one.")
            return resolve_directory(name, revision)[0]
        if revision is not None:
            raise SwapError(f"{name!r} is not the Hub repo this server started with: leave the revision out.")
        if self.directory is not None and (found := _inside(self.directory.resolve(), name)) is not None:
            return found
        allowed = [
            f"inside {self.directory}" if self.directory else "",
            f"the Hub repo {self.repo}" if self.repo else "",
        ]
        raise SwapError(
            f"Adapter {name!r} is not among those that this server may swap to: "
            f"{' or '.join(part for part in allowed if part) or 'none'}."
        )


def _inside(root: Path, name: str) -> Path | None:
    """The adapter of that name if all its files lie in a directory, symbolic links followed."""
    try:
        found = (root / name).resolve()
        files = [found, *(found / part for part in (PPOW_CONFIG, PEFT_CONFIG, PEFT_WEIGHTS))]
        found.is_dir()  # raises for what cannot be a path: a null byte, a name too long
        return found if all(file.resolve().is_relative_to(root) for file in files) else None
    except (ValueError, OSError, RuntimeError):  # RuntimeError: links in a circle, up to Python 3.12
        return None


def check_successor(running: Adapter, candidate: Adapter, draft_sample_method: str) -> None:
    """Whether an adapter may follow another in the same engine; its drafter's fingerprint is checked by the worker.

    Raises:
        SwapError: it belongs to another target or drafter, or drafts otherwise than the engine does.
    """
    old, new = running.config, candidate.config
    for role, before, after in (
        ("target", old.target, new.target),
        ("drafter", old.base_drafter, new.base_drafter),
    ):
        if before.fingerprint != after.fingerprint:
            raise SwapError(
                f"Adapter {candidate.directory} was trained for another {role} ({after.name_or_path}) than the one "
                f"being served ({before.name_or_path}): swap to an adapter for this {role}."
            )
    if new.draft_sample_method not in (old.draft_sample_method, draft_sample_method):
        raise SwapError(
            f"Adapter {candidate.directory} was trained for {new.draft_sample_method} drafts, this engine makes "
            f"{draft_sample_method} ones: start a server with it."
        )


class HotSwap:
    """Swaps the adapter of one engine. Steps must not overlap: callers take turns.

    Args:
        rpc: calls a method on every worker and returns their replies.
        asleep: whether the engine has given up the memory that its weights lie in; None for one that never does.
    """

    def __init__(self, rpc: Rpc, asleep: Callable[[], Awaitable[bool]] | None = None) -> None:
        self._rpc = rpc
        self._asleep = asleep

    async def running(self) -> Reply:
        """What the first worker says of its adapter: "adapter", "fingerprint", "previous"."""
        return (await self._rpc("ppow_adapter", ()))[0]

    async def swap(self, directory: str | os.PathLike[str], keep_previous: bool = False) -> Reply:
        """Load another adapter, on all workers or on none.

        Args:
            directory: of the adapter. If it is the one that is running, what could be gone back to stays.
            keep_previous: what can be gone back to stays in any case: the running adapter awaits its verdict.

        Returns:
            What `running` says, and "changed": whether the drafter is another now.

        Raises:
            ArtifactError: it cannot be served here; what was running serves on.
        """
        await self._check_awake()
        candidate = read_adapter(Path(os.path.abspath(directory)))
        fingerprint = candidate.config.adapter_fingerprint
        staged = await self._rpc("ppow_stage", (str(candidate.directory), fingerprint))
        if error := _error(staged):
            await self._rpc("ppow_discard", ())
            raise SwapError(error)
        return await self._load(f"adapter {candidate.directory} ({fingerprint[:19]})", keep_previous)

    async def undo(self, why: str) -> Reply:
        """Go back to the adapter before the last swap, which workers still hold in memory.

        Raises:
            SwapError: there is none, or it cannot be loaded.
        """
        await self._check_awake()
        staged = await self._rpc("ppow_stage_previous", ())
        if error := _error(staged):
            await self._rpc("ppow_discard", ())
            raise SwapError(error)
        running = await self._load("the previous adapter")
        logger.warning("Swapped back to adapter %s: %s.", running["adapter"], why)
        return running

    async def _check_awake(self) -> None:
        if self._asleep is not None and await self._asleep():
            raise SwapError(
                "The engine sleeps or is paused, and its adapter cannot be written: wake it, then swap."
            )

    async def _load(self, what: str, keep_previous: bool = False) -> Reply:
        try:
            await self._check_awake()  # staging takes seconds, and an engine may be sent to sleep meanwhile
        except SwapError:
            await self._rpc("ppow_discard", ())
            raise
        loaded = await self._rpc("ppow_load", (keep_previous,))
        if error := _error(loaded):
            restored = await self._rpc("ppow_restore", ())
            if again := _error(restored):
                raise SwapError(
                    f"Loading {what} failed ({error}), and so did going back ({again}): restart the server; its output "
                    "is right, its drafts are not."
                )
            raise SwapError(f"Loading {what} failed, the one before it serves on: {error}")
        running = {**(await self._rpc("ppow_settle", ()))[0], "changed": loaded[0]["changed"]}
        logger.info(
            "Now drafting with %s, written in %.2f s.", what, max(reply["seconds"] for reply in loaded)
        )
        return running


def _error(replies: list[Reply]) -> str:
    return next((reply["error"] for reply in replies if not reply["ok"]), "")


# ---------------------------------------------------------------- in process


def swap_adapter(llm: Any, directory: str | os.PathLike[str]) -> Reply:
    """Swap the adapter of an `LLM` (or `LLMEngine`) that was started with `"ppow": {"hot_swap": true}`.

    Returns:
        {"adapter": directory, "fingerprint": …, "previous": directory or None}

    Raises:
        ArtifactError: the adapter cannot be served here; what was running serves on.
    """
    return _finish(_in_process(llm).swap(directory))


def undo_swap(llm: Any, why: str = "asked to") -> Reply:
    """Go back to the adapter before the last `swap_adapter`.

    Raises:
        SwapError: there is none.
    """
    return _finish(_in_process(llm).undo(why))


def _in_process(llm: Any) -> HotSwap:
    from vllm_ppow.compat.hot_swap import allowed

    async def rpc(method: str, args: tuple[Any, ...]) -> list[Reply]:
        return llm.collective_rpc(method, args=args)

    async def asleep() -> bool:
        return llm_engine.is_sleeping()

    llm_engine = getattr(llm, "llm_engine", llm)
    if allowed(llm_engine.vllm_config) is None:
        raise SwapError(NOT_ON)
    return HotSwap(rpc, asleep if llm_engine.vllm_config.model_config.enable_sleep_mode else None)


def _finish(coroutine: Coroutine[Any, Any, Reply]) -> Reply:
    """Run a coroutine whose awaits never suspend, whether or not an event loop is running."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("a step of an in-process swap was suspended")


# ---------------------------------------------------------------- acceptance after a swap


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a watch found: accepted tokens per draft before and after a swap, and whether to go back."""

    before: float
    after: float
    undo: bool

    def __str__(self) -> str:
        if math.isnan(self.before):
            return "nothing was drafted before the swap, so there was nothing to compare with"
        return f"accepted tokens per draft {self.before:.3f} before the swap, {self.after:.3f} after it"


class AcceptanceWatch:
    """Compares acceptance over the next drafts after a swap with that over the last ones before it.

    Acceptance has fallen when accepted tokens per draft fell by more than `max_drop`, and, where drafts became shorter
    by more than a twentieth meanwhile (an adaptive window, larger batches), accepted tokens per drafted token did too.
    Less than half of the acceptance that would do is a verdict after a tenth of the drafts. Traffic that changes at the
    moment of the swap looks the same as a bad adapter, and cannot be told apart.

    Args:
        drafts: drafts to compare on each side; fewer are taken before the swap if there were no more.
        max_drop: share of the acceptance before the swap that may be lost, in (0, 1).
    """

    def __init__(self, drafts: int = 1000, max_drop: float = 0.2) -> None:
        if not 1 <= drafts <= _MOST_DRAFTS or not 0 < max_drop < 1:
            raise SwapError(
                f"drafts must be 1 to {_MOST_DRAFTS} and max_drop between 0 and 1, got {str(drafts)[:40]} and "
                f"{max_drop}."
            )
        self.drafts, self.max_drop = drafts, max_drop
        self._seen: deque[SpecDecodeCounts] = deque()
        self._known: SpecDecodeCounts | None = None  # the running adapter's, from the last comparison
        self._before: SpecDecodeCounts | None = None
        self._at_swap: SpecDecodeCounts | None = None

    def observe(self, counts: SpecDecodeCounts) -> None:
        """Note the engine's counts; call it now and then while nothing is being compared."""
        if self._seen and counts.num_drafts == self._seen[-1].num_drafts:
            self._seen[-1] = counts  # an idle server is looked at as often as a busy one
        else:
            self._seen.append(counts)
        while len(self._seen) > 1 and counts.num_drafts - self._seen[1].num_drafts >= self.drafts:
            self._seen.popleft()

    def start(self, counts: SpecDecodeCounts) -> None:
        """A swap has just happened.

        Another that awaits its verdict gets none: what follows is compared with what that one was to be compared with,
        the last adapter of which there is a verdict, which is also what the engine goes back to.
        """
        if self._at_swap is not None:
            self._at_swap = counts
            return
        self.observe(counts)
        latest = counts - self._seen[0]
        enough = self._known is None or latest.num_drafts >= self.drafts
        self._before = latest if enough else self._known
        self._at_swap = counts

    @property
    def comparing(self) -> bool:
        """Whether a swap awaits its verdict."""
        return self._at_swap is not None

    def verdict(self, counts: SpecDecodeCounts) -> Verdict | None:
        """The verdict once there are enough drafts since the swap; None before, and when nothing was swapped.

        A swap before which nothing was drafted has nothing to be compared with, and is kept.
        """
        if self._at_swap is None or self._before is None:
            return None
        before, after = self._before, counts - self._at_swap
        kept = 1 - self.max_drop
        # An adaptive window hardly drafts with a very bad adapter, and its verdict need not wait for them all.
        hopeless = after.num_drafts >= self.drafts / 10 and _fell(before, after, kept / 2)
        if after.num_drafts < self.drafts and not hopeless:
            return None
        verdict = Verdict(before.mean_accepted, after.mean_accepted, _fell(before, after, kept))
        # Whichever adapter drafts from now on, its acceptance is known, should another swap follow at once.
        self._known = before if verdict.undo else after
        self._at_swap = self._before = None
        self._seen.clear()
        self.observe(counts)
        return verdict


def _fell(before: SpecDecodeCounts, after: SpecDecodeCounts, kept: float) -> bool:
    """Whether less than a share of the acceptance was kept; never where nothing was drafted before."""
    if not before.num_drafts:
        return False
    shorter = after.num_draft_tokens / after.num_drafts < 0.95 * before.num_draft_tokens / before.num_drafts
    fell = after.mean_accepted < kept * before.mean_accepted
    return fell and (not shorter or after.acceptance_rate < kept * before.acceptance_rate)
