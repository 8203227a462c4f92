"""Swapping over HTTP, in vLLM's own API server: `GET` and `POST /v1/ppow/adapter`.

Attached through entry point group `vllm.endpoint_plugins` (vLLM 0.32 and newer), which vLLM loads only where
VLLM_PLUGINS names it. The path lies under /v1, so that the server's --api-key guards it as it guards completions. Off
unless the operator set `"ppow": {"hot_swap": true}`, and then only for adapters inside `hot_swap_directory`, or of the
Hub repo that the server started with. Left out: the swap and its rules (vllm_ppow/hot_swap.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
from argparse import Namespace
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from vllm_ppow.artifact import ArtifactError
from vllm_ppow.compat import hot_swap
from vllm_ppow.hot_swap import AcceptanceWatch, Allowed, HotSwap, Reply, SwapError
from vllm_ppow.metrics import SpecDecodeCounts

logger = logging.getLogger("vllm.ppow.endpoints")

PATH = "/v1/ppow/adapter"
_KINDS: dict[str, tuple[type, ...]] = {
    "adapter": (str,),
    "revision": (str, type(None)),
    "undo": (bool,),
    "watch": (bool,),
    "drafts": (int,),
    "max_drop": (float,),
}
_LOOK_EVERY_S = 1.0
_OFF = 'Swapping is off: start the server with "ppow": {"hot_swap": true}, ppow serve --hot-swap DIRECTORY.'


class Service:
    """Swaps the adapter of one server, one request at a time, and goes back when acceptance falls.

    Args:
        engine_client: vLLM's.
        allowed: from where adapters may come.
    """

    def __init__(self, engine_client: Any, allowed: Allowed) -> None:
        async def rpc(method: str, args: tuple[Any, ...]) -> list[Reply]:
            return await engine_client.collective_rpc(method, args=args)

        sleeps = engine_client.vllm_config.model_config.enable_sleep_mode
        self._swap = HotSwap(rpc, engine_client.is_sleeping if sleeps else None)
        self._allowed = allowed
        self._turn = asyncio.Lock()
        self._watch = AcceptanceWatch()
        self._going_back: str | None = None  # why, from the verdict until it has been done
        self._went_back: str | None = None  # why, from then on until somebody swaps
        self._last: dict[str, str] | None = None
        self._watching = asyncio.create_task(self._watch_on())

    async def describe(self) -> dict[str, Any]:
        """What is running, whether a swap awaits its verdict, and what happened last; never halfway through a swap."""
        async with self._turn:
            return await self._describe()

    async def change(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Swap as a request asks.

        Raises:
            ArtifactError: it cannot be done; what was running serves on.
        """
        if asked.get("undo"):
            async with self._turn:
                if self._went_back is not None:
                    raise SwapError(
                        f"The server has gone back by itself ({self._went_back}), and undoing that would bring back "
                        "the adapter that it left: swap to an adapter by its name."
                    )
                await self._swap.undo("asked to")
                self._watch, self._going_back = AcceptanceWatch(), None
                self._note("swapped back", "asked to")
                return await self._describe()
        watch = AcceptanceWatch(asked.get("drafts", 1000), asked.get("max_drop", 0.2))
        # The Hub may take minutes; nobody waits for them but who asked.
        directory = await asyncio.to_thread(self._allowed.resolve, asked["adapter"], asked.get("revision"))
        async with self._turn:
            watched = asked.get("watch", True)
            # Of two swaps in a row the first has no verdict yet: both are judged by, and go back to, what was before.
            swapped = await self._swap.swap(directory, keep_previous=watched and self._watch.comparing)
            self._going_back = None
            if swapped["changed"]:
                self._went_back = None
                self._note("swapped", f"to {directory}")
            elif not self._watch.comparing:
                self._note(
                    "kept", "it is the adapter that was running already, and was compared with nothing"
                )
            if swapped["changed"] or not watched:
                self._start_comparing(watch if watched else None)
            return await self._describe()

    async def _describe(self) -> dict[str, Any]:
        running = await self._swap.running()
        if not running["ok"]:
            raise SwapError(running["error"])
        shown = {key: running[key] for key in ("adapter", "fingerprint", "previous")}
        return {**shown, "comparing": self._watch.comparing, "last": self._last}

    def _start_comparing(self, watch: AcceptanceWatch | None) -> None:
        counts = _counts()
        if watch is None or counts is None:
            self._watch = AcceptanceWatch()
            return
        self._watch.drafts, self._watch.max_drop = watch.drafts, watch.max_drop
        self._watch.start(counts)

    async def _watch_on(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            try:
                await self._look()
            except Exception:  # a watch that ended would never swap back, and nobody would notice
                logger.exception("The watch over acceptance failed; it goes on")

    async def _look(self) -> None:
        async with self._turn:
            counts = _counts()
            if counts is None:
                return
            if self._going_back is not None:
                await self._go_back(self._going_back)
            elif not self._watch.comparing:
                self._watch.observe(counts)
            elif verdict := self._watch.verdict(counts):
                if verdict.undo:
                    await self._go_back(str(verdict))
                else:
                    logger.info("Adapter kept: %s", verdict)
                    self._note("kept", str(verdict))

    async def _go_back(self, why: str) -> None:
        """Swap back, and try again at every look until it works or somebody else swaps."""
        again, self._going_back = self._going_back is not None, why
        try:
            await self._swap.undo(why)
        except Exception as error:
            self._note("could not swap back, trying again", f"{why}: {error}")
            if not again:
                logger.exception("Swapping back failed, and is tried again every %g s", _LOOK_EVERY_S)
            return
        self._going_back, self._went_back = None, why
        self._note("swapped back", why)

    def _note(self, event: str, why: str) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._last = {"event": event, "why": why, "at": now}


def _counts() -> SpecDecodeCounts | None:
    """vLLM's counters of this server; None where statistics are off."""
    from vllm.v1.metrics.reader import get_metrics_snapshot

    with contextlib.suppress(ValueError):
        return SpecDecodeCounts.from_metrics(get_metrics_snapshot())
    return None


class EndpointPlugin:
    """What vLLM asks for: see vllm.plugins.endpoint_plugins.interface.EndpointPlugin."""

    name = "ppow"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add both routes; they answer 403 where swapping is off."""
        app.add_api_route(PATH, _get, methods=["GET"])
        app.add_api_route(PATH, _post, methods=["POST"])

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Build the service where the operator turned swapping on."""
        state.ppow_service, state.ppow_off = None, _OFF
        allowed = hot_swap.allowed(engine_client.vllm_config) if engine_client is not None else None
        if allowed is None:
            return
        if (vars(args).get("api_server_count") or 1) > 1:
            state.ppow_off = (
                "Adapters are not swapped over HTTP by several API servers: serve with --api-server-count 1."
            )
            logger.warning("%s", state.ppow_off)
            return
        directory = allowed["directory"]
        state.ppow_service = Service(
            engine_client, Allowed(Path(directory) if directory else None, allowed["repo"])
        )
        logger.info(
            "Adapters may be swapped at %s, from %s.", PATH, directory or allowed["repo"] or "nowhere"
        )


async def _get(request: Request) -> JSONResponse:
    return await _respond(request, None)


async def _post(request: Request) -> JSONResponse:
    try:
        asked = parse(await request.json())
    except SwapError as error:
        return JSONResponse({"error": str(error)}, 400)
    except (
        ValueError,
        RecursionError,
    ):  # no JSON, no UTF-8, a number of thousands of digits, lists in lists in lists
        return JSONResponse({"error": "The body must be a JSON object."}, 400)
    return await _respond(request, asked)


async def _respond(request: Request, asked: dict[str, Any] | None) -> JSONResponse:
    service: Service | None = request.app.state.ppow_service
    if service is None:
        return JSONResponse({"error": request.app.state.ppow_off}, 403)
    try:
        return JSONResponse(await (service.describe() if asked is None else service.change(asked)))
    except ArtifactError as error:
        logger.warning("The adapter was not swapped: %s", error)
        return JSONResponse({"error": str(error)}, 409)


def parse(body: Any) -> dict[str, Any]:
    """Validate the body of a POST.

    Raises:
        SwapError: naming the key and what is accepted.
    """
    if not isinstance(body, dict):
        raise SwapError("The body must be a JSON object.")
    if unknown := sorted(set(body) - set(_KINDS)):
        raise SwapError(f"The body has unknown keys {unknown}: known are {list(_KINDS)}.")
    for key, value in body.items():
        kinds = _KINDS[key]
        number = isinstance(value, bool) and bool not in kinds
        if not isinstance(value, kinds) or number or value == "":
            raise SwapError(f"{key} must be {' or '.join(kind.__name__ for kind in kinds)}, got {value!r}.")
    if ("adapter" in body) == bool(body.get("undo")):
        raise SwapError('The body needs either "adapter", or "undo": true.')
    AcceptanceWatch(body.get("drafts", 1000), body.get("max_drop", 0.2))
    return body
