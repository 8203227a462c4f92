"""Soak: a real server for half an hour, with aborts, hot swaps and a cache too small for its requests.

First the greedy outputs are recorded from a server without speculation; then a server with an adapter is kept at its
highest concurrency by clients that mix greedy and sampled requests, close connections in the middle of answers, and
swap the adapter every minute, while the KV cache is so small that requests are preempted all the time. It passes if
no request failed, every greedy answer is token-identical to no speculation, and no process keeps growing. With
`--plain` the same load runs on the bare drafter under vLLM's own method, without swaps: what grows there is not the
plugin's. Left out: judging what was found (soak_report.py).

    python examples/benchmarks/soak.py --output runs/soak --adapter runs/adapter
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import shutil
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import click
from bench_adapters import make_adapter, train_adapter
from bench_server import MODEL_NAME, TINY, Server, ServerOptions
from soak_report import Demands, Findings, as_json

from ppow_train.progress import make_progress
from vllm_ppow.artifact import NATIVE_METHOD, read_adapter

ABORTED_SHARE = 0.25  # of requests
MEMORY_EVERY_S = 2.0
LAYERS_EVERY_S = 2.0  # the server reports once a second
SWAP_PATH = "/v1/ppow/adapter"
_BLOCK_TOKENS = 32  # of the KV cache; the smallest that vLLM's CPU kernels take
_REQUEST_S = 300  # the longest that any request may take
_LAYER = re.compile(r"ppow:window_layer_active\{layer=(\w+)\}")
# oneDNN keeps its newest 1024 kernels, one for every shape of a step: memory that grows for long, and would hide what
# never stops.
_NO_KERNELS_KEPT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0"}
_ERROR_LINE = re.compile(r"^.*\bERROR \d\d-\d\d .*$", re.MULTILINE)  # as vLLM's loggers write it


class SwapRefusedError(Exception):
    """The server did not swap."""


class Client:
    """Requests to one server."""

    def __init__(self, session: aiohttp.ClientSession, server: Server, max_tokens: int) -> None:
        self.session, self.server, self.max_tokens = session, server, max_tokens

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        timeout = aiohttp.ClientTimeout(total=_REQUEST_S)
        return self.session.post(self.server.url + path, json=body, timeout=timeout, raise_for_status=True)

    async def complete(self, prompt: str, temperature: float = 0.0) -> list[int]:
        """Token ids of a whole answer."""
        body = {**self._body(prompt, temperature), "return_token_ids": True}
        async with self._post("/v1/completions", body) as answer:
            return list((await answer.json())["choices"][0]["token_ids"])

    async def abort(self, prompt: str, temperature: float, after_chunks: int) -> bool:
        """Read some chunks of an answer, then close the connection; False if the answer ended before."""
        body = {**self._body(prompt, temperature), "stream": True}
        async with self._post("/v1/completions", body) as answer:
            for _ in range(after_chunks):
                line = await answer.content.readline()
                await answer.content.readline()  # chunks are lines with an empty one after each
                if not line or b"[DONE]" in line:
                    return False
            answer.close()
        return True

    async def swap(self, adapter: Path) -> None:
        """Hot-swap the adapter through the plugin's endpoint; it is kept, whatever its acceptance.

        Raises:
            SwapRefusedError: with the server's own words.
        """
        body, timeout = {"adapter": str(adapter), "watch": False}, aiohttp.ClientTimeout(total=_REQUEST_S)
        async with self.session.post(self.server.url + SWAP_PATH, json=body, timeout=timeout) as answer:
            if answer.status != 200:
                raise SwapRefusedError(f"{answer.status}: {await answer.text()}")

    def _body(self, prompt: str, temperature: float) -> dict[str, Any]:
        limits = {"max_tokens": self.max_tokens, "ignore_eos": True, "temperature": temperature}
        return {"model": MODEL_NAME, "prompt": prompt, **limits}


async def record_expected(
    client: Client, prompts: list[str], concurrency: int
) -> tuple[list[list[int]], list[int]]:
    """Greedy outputs without speculation, and the prompts whose output depends on what runs beside them."""
    alone = [await client.complete(prompt) for prompt in prompts]
    gate = asyncio.Semaphore(concurrency)

    async def in_company(prompt: str) -> list[int]:
        async with gate:
            return await client.complete(prompt)

    crowded = await asyncio.gather(*map(in_company, prompts))
    return alone, [i for i, (one, other) in enumerate(zip(alone, crowded, strict=True)) if one != other]


class Soak:
    """The load on one server, until a deadline.

    Args:
        expected: greedy output of every prompt.
        sampled_share: of requests, those at temperature 1.
    """

    def __init__(
        self,
        client: Client,
        prompts: list[str],
        expected: list[list[int]],
        found: Findings,
        seed: int,
        sampled_share: float,
    ) -> None:
        self.client, self.prompts, self.expected, self.found = client, prompts, expected, found
        self.sampled_share = sampled_share
        self.draw = random.Random(seed)
        self.began = time.monotonic()
        self.deadline = self.began

    async def run(
        self, seconds: float, concurrency: int, swaps: Callable[[], Awaitable[None]] | None, swap_every: float
    ) -> None:
        """Keep `concurrency` requests running for some time; what happens is in the findings."""
        self.began = time.monotonic()
        self.deadline = self.began + seconds
        tasks = [self._work() for _ in range(concurrency)] + [self._watch_memory(), self._watch_layers()]
        if swaps is not None:
            tasks.append(self._swap(swaps, swap_every))
        await asyncio.gather(*tasks)

    @property
    def elapsed(self) -> float:
        """Seconds since the load began."""
        return time.monotonic() - self.began

    async def _work(self) -> None:
        while time.monotonic() < self.deadline:
            try:
                await self._request()
            except (TimeoutError, aiohttp.ClientError, KeyError, ValueError) as error:
                self.found.errors.append(f"{type(error).__name__} after {self.elapsed:.0f} s: {error}")
                self.client.server.check_alive()
                await asyncio.sleep(1)

    async def _request(self) -> None:
        index = self.draw.randrange(len(self.prompts))
        temperature = 1.0 if self.draw.random() < self.sampled_share else 0.0
        if self.draw.random() < ABORTED_SHARE:
            after = self.draw.randrange(1, max(2, self.client.max_tokens // 4))
            self.found.aborted += await self.client.abort(self.prompts[index], temperature, after)
            return
        tokens = await self.client.complete(self.prompts[index], temperature)
        kind = "sampled" if temperature else "greedy"
        self.found.completed[kind] = self.found.completed.get(kind, 0) + 1
        if len(tokens) != self.client.max_tokens:
            self.found.errors.append(
                f"{len(tokens)} tokens instead of {self.client.max_tokens} for prompt {index}"
            )
        if not temperature and index not in self.found.unstable_prompts:
            self.found.compared += 1
            if tokens != self.expected[index]:
                self.found.different.append((index, self.elapsed))

    async def _swap(self, swap: Callable[[], Awaitable[None]], every: float) -> None:
        while time.monotonic() + every < self.deadline:
            await asyncio.sleep(every)
            try:
                await swap()
                self.found.swaps += 1
            except (TimeoutError, aiohttp.ClientError, SwapRefusedError) as error:
                self.found.errors.append(f"hot swap after {self.elapsed:.0f} s: {error}")

    async def _watch_layers(self) -> None:
        """Which layers decide draft lengths; where requests' temperatures decide that, it changes."""
        while time.monotonic() < self.deadline:
            with contextlib.suppress(OSError):  # a busy server; requests tell of one that is gone
                active = layers_of(await asyncio.to_thread(self.client.server.metrics))
                self.found.layers[active] = self.found.layers.get(active, 0) + 1
            await asyncio.sleep(LAYERS_EVERY_S)

    async def _watch_memory(self) -> None:
        while time.monotonic() < self.deadline:
            for process in self.client.server.processes():
                with contextlib.suppress(Exception):  # a helper process may end between listing and reading
                    name = f"{process.name()} {process.pid}"
                    resident = process.memory_info().rss / 2**20
                    self.found.memory.setdefault(name, []).append((self.elapsed, resident))
            await asyncio.sleep(MEMORY_EVERY_S)


def layers_of(metrics: dict[str, float]) -> str:
    """The layers that a server's metrics name as active, such as "request, step"; "none" for a fixed window."""
    active = [match[1] for name, value in metrics.items() if (match := _LAYER.fullmatch(name)) and value]
    return ", ".join(sorted(active)) or "none"


def read_prompts(path: Path, limit: int) -> list[str]:
    """Prompts of a JSON lines file."""
    return [json.loads(line)["prompt"] for line in path.read_text().splitlines()[:limit]]


def server_options(settings: dict[str, Any], small_cache: bool) -> ServerOptions:
    """Both servers are alike, but for the size of the cache and the endpoint for swaps."""
    arguments = ["--block-size", str(_BLOCK_TOKENS)]
    if small_cache:
        arguments += ["--num-gpu-blocks-override", str(settings["kv_blocks"])]
    swaps = (
        small_cache and settings["swap_every"]
    )  # vLLM attaches routes of plugins only where they are named
    return ServerOptions(
        settings["target"],
        settings["dtype"],
        settings["max_model_len"],
        settings["concurrency"],
        tuple(arguments),
        {**_NO_KERNELS_KEPT, **({"VLLM_PLUGINS": "ppow"} if swaps else {})},
    )


def speculative_config(settings: dict[str, Any], adapters: list[Path]) -> dict[str, Any]:
    """Of the server that is soaked; swaps are allowed among the adapters, which lie in one directory."""
    spec: dict[str, Any] = {"num_speculative_tokens": settings["num_speculative_tokens"]}
    if settings["plain"]:
        served = read_adapter(adapters[0]).config
        return {
            **spec,
            "method": NATIVE_METHOD[served.drafter_type],
            "model": served.base_drafter.name_or_path,
        }
    spec |= {"method": "ppow", "model": str(adapters[0])}
    if settings["swap_every"]:
        spec["ppow"] = {"hot_swap": True, "hot_swap_directory": str(adapters[0].parent)}
    return spec


def gather_adapters(given: Sequence[Path], output: Path) -> list[Path]:
    """Copies of the adapters to serve, side by side; without any, a trained one and one whose deltas are noise."""
    directory = output.resolve() / "adapters"
    shutil.rmtree(directory, ignore_errors=True)
    if not given:
        trained = train_adapter(output / "trained", 100)
        drafts = read_adapter(trained).config.draft_sample_method
        given = [trained, make_adapter(output / "noise", 0.1, draft_sample_method=drafts).directory]
    return [Path(shutil.copytree(path, directory / f"{index}")) for index, path in enumerate(given)]


@contextlib.contextmanager
def running(name: str, options: ServerOptions, spec: dict[str, Any] | None, output: Path) -> Any:
    """A healthy server, stopped at the end."""
    server = Server(name, options, spec, output / f"{name}.log")
    try:
        server.wait_until_healthy()
        yield server
    finally:
        server.stop()


async def expected_outputs(
    settings: dict[str, Any], prompts: list[str], output: Path
) -> tuple[Any, list[int]]:
    """What no speculation answers."""
    with running("no-speculation", server_options(settings, small_cache=False), None, output) as server:
        async with aiohttp.ClientSession() as session:
            client = Client(session, server, settings["max_tokens"])
            return await record_expected(client, prompts, settings["concurrency"])


async def soak_server(
    settings: dict[str, Any],
    adapters: list[Path],
    prompts: list[str],
    expected: Any,
    found: Findings,
    output: Path,
) -> None:
    """The soak proper; the server's own counters and its log are read before it stops."""
    spec = speculative_config(settings, adapters)
    with running("ppow", server_options(settings, small_cache=True), spec, output) as server:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            client = Client(session, server, settings["max_tokens"])
            soak = Soak(client, prompts, expected, found, settings["seed"], settings["sampled_share"])
            turn = iter(range(1, 1 << 30))

            async def swap() -> None:
                await client.swap(adapters[next(turn) % len(adapters)])

            with make_progress() as progress:
                task = progress.add_task("soak", total=60 * settings["minutes"], note="")
                showing = asyncio.create_task(_show(progress, task, soak))
                await soak.run(
                    60 * settings["minutes"], settings["concurrency"],
                    swap if settings["swap_every"] else None, settings["swap_every"],
                )  # fmt: skip
                showing.cancel()
        server.check_alive()
        counters = server.metrics()
        found.preemptions = int(counters.get("vllm:num_preemptions_total", 0))
        found.drafts = int(counters.get("vllm:spec_decode_num_drafts_total", 0))
        found.errors += _ERROR_LINE.findall(server.log.read_text(errors="replace"))


async def _show(progress: Any, task: Any, soak: Soak) -> None:
    while True:
        found = soak.found
        note = f"{sum(found.completed.values())} completed, {found.compared} compared, {len(found.different)} differ, "
        note += f"{found.aborted} aborted, {found.swaps} swaps, {len(found.errors)} errors"
        progress.update(task, completed=min(soak.elapsed, progress.tasks[task].total or 0), note=note)
        await asyncio.sleep(1)


@click.command()
@click.option("--target", default=str(TINY / "target"), show_default=True)
@click.option(
    "--adapter", "adapters", multiple=True, type=click.Path(path_type=Path),
    help="directory of an adapter; several are swapped in turn  [default: two are made]",
)  # fmt: skip
@click.option("--prompts", default=TINY / "prompts" / "tests_held_out.jsonl", type=click.Path(path_type=Path))
@click.option("--num-prompts", default=48, show_default=True)
@click.option("--output", required=True, type=click.Path(path_type=Path), help="soak.json and logs")
@click.option("--minutes", default=30.0, show_default=True)
@click.option("--concurrency", default=32, show_default=True)
@click.option("--max-tokens", default=64, show_default=True, help="output tokens of a request")
@click.option(
    "--sampled-share", default=0.25, show_default=True, type=click.FloatRange(0, 1), help="of requests"
)
@click.option("--num-speculative-tokens", default=8, show_default=True)
@click.option(
    "--kv-blocks", default=96, show_default=True, help=f"blocks of {_BLOCK_TOKENS} tokens in the KV cache"
)
@click.option("--swap-every", default=60.0, show_default=True, help="seconds between hot swaps; 0: none")
@click.option(
    "--plain", is_flag=True, help="the first adapter's bare drafter, by vLLM's own method, without swaps"
)
@click.option(
    "--max-growth-mib",
    default=Demands.max_growth_mib,
    show_default=True,
    help="that a process may gain after warming up",
)
@click.option("--max-model-len", default=256, show_default=True)
@click.option(
    "--dtype", default="float32", show_default=True, help="float32: output does not depend on the batch"
)
@click.option("--seed", default=0, show_default=True)
def main(
    adapters: tuple[Path, ...],
    prompts: Path,
    num_prompts: int,
    output: Path,
    max_growth_mib: float,
    **settings: Any,
) -> None:
    """Soak a server; exits with 1 if anything was wrong."""
    output.mkdir(parents=True, exist_ok=True)
    if settings["plain"]:
        settings["swap_every"] = 0
    served = gather_adapters(adapters, output)
    texts = read_prompts(prompts, num_prompts)
    found = Findings(num_prompts=len(texts))
    # The first swap comes after one interval, and none when less than another is left.
    swaps = (
        max(0, int(60 * settings["minutes"] / settings["swap_every"]) - 1) if settings["swap_every"] else 0
    )
    demands = Demands(swaps=swaps, max_growth_mib=max_growth_mib)
    click.echo("Recording greedy outputs without speculation.", err=True)
    expected, found.unstable_prompts = asyncio.run(expected_outputs(settings, texts, output))
    try:
        asyncio.run(soak_server(settings, served, texts, expected, found, output))
    except click.ClickException as error:  # the server died: say so in the report, too
        found.errors.append(error.format_message())
    report = as_json(found, demands, {**settings, "adapters": [str(path) for path in served]})
    (output / "soak.json").write_text(json.dumps(report, indent=2) + "\n")
    for sentence in report["violations"]:
        click.echo(f"VIOLATION: {sentence}", err=True)
    click.echo(f"{'passed' if report['passed'] else 'FAILED'}: {output / 'soak.json'}", err=True)
    if not report["passed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
