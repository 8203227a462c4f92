"""The HTTP routes for swapping, in an app as vLLM builds it, with workers that only answer."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from argparse import Namespace
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from serving_pair import random_adapter

from ppow_train.commands import swap
from vllm_ppow.artifact import read_adapter
from vllm_ppow.compat import endpoints, hot_swap
from vllm_ppow.compat.endpoints import PATH, EndpointPlugin
from vllm_ppow.config import HOT_SWAP_KEY
from vllm_ppow.merge import Merger
from vllm_ppow.metrics import SpecDecodeCounts


class Engine:
    """An engine client whose one worker loads whatever it is told to."""

    def __init__(self, allowed):
        extra = {} if allowed is None else {HOT_SWAP_KEY: allowed}
        load_config = SimpleNamespace(model_loader_extra_config=extra)
        self.vllm_config = SimpleNamespace(
            speculative_config=SimpleNamespace(draft_load_config=load_config),
            model_config=SimpleNamespace(enable_sleep_mode=True),
        )
        self.adapters, self.staged, self.refuses = ["start"], "", ""
        self.sleeping, self.undo_failures = False, 0

    async def is_sleeping(self):
        return self.sleeping

    async def collective_rpc(self, method, timeout=None, args=()):
        if method == "ppow_stage":
            self.staged = args[0]
        elif method == "ppow_stage_previous":
            self.staged = self.adapters[-2] if len(self.adapters) > 1 else ""
            self.refuses = "" if self.staged else "none"
            if self.undo_failures:
                self.undo_failures -= 1
                raise OSError("planted")
        elif method == "ppow_load":
            await asyncio.sleep(0.2)  # others may ask meanwhile
            self.adapters.append(self.staged)
        reply = {
            "ok": not self.refuses,
            "error": self.refuses,
            "adapter": self.adapters[-1],
            "fingerprint": "f",
        }
        return [
            {
                **reply,
                "previous": self.adapters[-2] if len(self.adapters) > 1 else None,
                "seconds": 0.0,
                "changed": True,
            }
        ]


@pytest.fixture
def root(pair, tmp_path):
    """An allowed directory with adapters b and c."""
    adapter = random_adapter(tmp_path, "causal_lm", pair)
    for name in "bc":
        shutil.copytree(adapter.directory, tmp_path / "allowed" / name)
    return tmp_path / "allowed"


@pytest.fixture
def counts(monkeypatch):
    """What vLLM has counted; tests set it."""
    counted = SimpleNamespace(now=SpecDecodeCounts(0, 0, 0, (0,)))
    monkeypatch.setattr(endpoints, "_counts", lambda: counted.now)
    monkeypatch.setattr(endpoints, "_LOOK_EVERY_S", 0.01)
    return counted


def client(engine, **args):
    """A client of a server on `engine`; use it as a context manager."""
    plugin = EndpointPlugin()
    app = FastAPI()

    async def startup(app):
        await plugin.init_state(engine, app.state, Namespace(**args))
        yield

    app.router.lifespan_context = contextlib.asynccontextmanager(startup)
    plugin.attach_router(app)
    return TestClient(app)


def test_swap_and_undo(root, counts):
    with client(Engine({"directory": str(root), "repo": None})) as http:
        assert http.get(PATH).json() == {
            "adapter": "start",
            "fingerprint": "f",
            "previous": None,
            "comparing": False,
            "last": None,
        }
        shown = http.post(PATH, json={"adapter": "b", "watch": False}).json()
        assert (shown["adapter"], shown["previous"], shown["comparing"]) == (str(root / "b"), "start", False)
        assert shown["last"]["event"] == "swapped"
        assert http.post(PATH, json={"undo": True}).json()["adapter"] == "start"


@pytest.mark.parametrize(("accepted", "event"), [(90, "kept"), (70, "swapped back")])
def test_the_server_watches_and_goes_back(root, counts, accepted, event):
    engine = Engine({"directory": str(root), "repo": None})
    with client(engine) as http:
        counts.now = SpecDecodeCounts(0, 0, 0, (0,))
        assert http.post(PATH, json={"adapter": "b", "watch": False}).status_code == 200
        counts.now = SpecDecodeCounts(100, 300, 100, (100,))
        shown = http.post(PATH, json={"adapter": "c", "drafts": 100}).json()
        assert shown["comparing"]
        counts.now = SpecDecodeCounts(200, 600, 100 + accepted, (100 + accepted,))
        while (shown := http.get(PATH).json())["comparing"]:
            pass
        assert shown["last"]["event"] == event, "what is said between the verdict and going back is neither"
        assert shown["adapter"] == str(root / ("c" if event == "kept" else "b"))
        assert shown["last"]["why"].startswith("accepted tokens per draft 1.000 before the swap, 0.")
        assert not shown["comparing"]


def test_going_back_is_tried_until_it_works(root, counts):
    engine = Engine({"directory": str(root), "repo": None})
    engine.undo_failures = 3
    with client(engine) as http:
        counts.now = SpecDecodeCounts(100, 300, 100, (100,))
        http.post(PATH, json={"adapter": "b", "watch": False})
        counts.now = SpecDecodeCounts(200, 600, 200, (200,))
        assert http.post(PATH, json={"adapter": "c", "drafts": 100}).json()["comparing"]
        counts.now = SpecDecodeCounts(300, 900, 201, (201,))
        events = []
        while "swapped back" not in events:
            events.append(http.get(PATH).json()["last"]["event"])
        assert "could not swap back, trying again" in events
        assert (engine.undo_failures, engine.adapters[-1]) == (0, str(root / "b"))


def test_what_the_server_left_by_itself_is_not_brought_back_by_an_undo(root, counts):
    engine = Engine({"directory": str(root), "repo": None})
    with client(engine) as http:
        http.post(PATH, json={"adapter": "b", "watch": False})
        counts.now = SpecDecodeCounts(100, 300, 100, (100,))
        assert http.post(PATH, json={"adapter": "c", "drafts": 100}).json()["comparing"]
        counts.now = SpecDecodeCounts(200, 600, 101, (101,))
        while http.get(PATH).json()["last"]["event"] == "swapped":
            time.sleep(0.01)
        refused = http.post(PATH, json={"undo": True})
        assert (refused.status_code, engine.adapters[-1]) == (409, str(root / "b"))
        assert "has gone back by itself (accepted tokens per draft 1.000" in refused.json()["error"]
        assert http.post(PATH, json={"adapter": "c", "watch": False}).status_code == 200
        assert http.post(PATH, json={"undo": True}).json()["adapter"] == str(root / "b")


def test_nobody_goes_back_over_a_later_swap(root, counts):
    engine = Engine({"directory": str(root), "repo": None})
    engine.undo_failures = 10**9
    with client(engine) as http:
        counts.now = SpecDecodeCounts(100, 300, 100, (100,))
        http.post(PATH, json={"adapter": "b", "watch": False})
        counts.now = SpecDecodeCounts(200, 600, 200, (200,))
        http.post(PATH, json={"adapter": "c", "drafts": 100})
        counts.now = SpecDecodeCounts(300, 900, 201, (201,))
        while "could not" not in http.get(PATH).json()["last"]["event"]:
            pass
        http.post(PATH, json={"adapter": "b", "watch": False})
        engine.undo_failures = 0
        time.sleep(0.1)
        shown = http.get(PATH).json()
        assert (shown["last"]["event"], shown["adapter"]) == ("swapped", str(root / "b"))


def test_a_sleeping_engine_is_not_written_to(root, counts):
    engine = Engine({"directory": str(root), "repo": None})
    engine.sleeping = True
    with client(engine) as http:
        answer = http.post(PATH, json={"adapter": "b"})
        assert (answer.status_code, "wake it, then swap" in answer.json()["error"]) == (409, True)
        assert engine.adapters == ["start"]
        engine.sleeping = False
        assert http.post(PATH, json={"adapter": "b", "watch": False}).status_code == 200


def test_a_watch_that_fails_once_goes_on(root, counts, monkeypatch):
    calls = []

    def failing():
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("planted")
        return counts.now

    monkeypatch.setattr(endpoints, "_counts", failing)
    with client(Engine({"directory": str(root), "repo": None})) as http:
        while len(calls) < 3:
            http.get(PATH)


@pytest.mark.parametrize(
    ("allowed", "args", "said"),
    [
        (None, {}, 'Swapping is off: start the server with "ppow": {"hot_swap": true}'),
        ("directory", {"api_server_count": 2}, "by several API servers: serve with --api-server-count 1"),
    ],
)
def test_off(root, counts, allowed, args, said):
    """Not turned on; or several API servers, which count apart and would not take turns."""
    engine = Engine(allowed and {"directory": str(root), "repo": None})
    with client(engine, **args) as http:
        for answer in (http.get(PATH), http.post(PATH, json={"adapter": "b"})):
            assert answer.status_code == 403
            assert said in answer.json()["error"]
    assert engine.adapters == ["start"]


def test_refusals_are_sentences_and_in_the_log(root, counts, caplog, monkeypatch):
    monkeypatch.setattr(endpoints.logger, "propagate", True)  # vLLM's loggers keep to themselves
    engine = Engine({"directory": str(root), "repo": None})
    with client(engine) as http:
        outside = http.post(PATH, json={"adapter": str(root.parent)})
        assert (outside.status_code, "may swap to: inside" in outside.json()["error"]) == (409, True)
        assert http.post(PATH, json={"adapter": "absent"}).status_code == 409
        for impossible in ("a\0b", "a" * 5000):
            answer = http.post(PATH, json={"adapter": impossible})
            assert (answer.status_code, "may swap to: inside" in answer.json()["error"]) == (409, True)
        assert http.post(PATH, json={"undo": True}).json() == {"error": "none"}
        unreadable = (b'{"drafts": ' + b"9" * 5000 + b"}", b"[" * 100_000)
        for body in (b"{", b"[]", b'{"adapter": 1}', b"\xff", *unreadable):
            assert http.post(PATH, content=body).status_code == 400
    assert sum("The adapter was not swapped: " in record.getMessage() for record in caplog.records) == 5
    assert engine.adapters == ["start"]


class Workers(Engine):
    """An engine client with one worker, whose own methods answer; only tensors are not written."""

    def __init__(self, root, monkeypatch):
        super().__init__({"directory": str(root), "repo": None})
        running = read_adapter(root / "a")
        speculative = SimpleNamespace(draft_sample_method=running.config.draft_sample_method)
        self.worker = hot_swap.WorkerExtension()
        self.worker.vllm_config = SimpleNamespace(speculative_config=speculative)
        hot_swap._states[self.worker] = hot_swap._State(Merger(running))
        monkeypatch.setattr(hot_swap, "_merged", lambda worker, merger: (merger, []))
        monkeypatch.setattr(hot_swap, "_write", lambda worker, tensors: None)

    async def collective_rpc(self, method, timeout=None, args=()):
        return [getattr(self.worker, method)(*args)]


@pytest.fixture
def three(pair, tmp_path):
    """An allowed directory with adapters a, b and c that differ."""
    for seed, name in enumerate("abc"):
        adapter = random_adapter(tmp_path / f"made-{name}", "causal_lm", pair, scale=0.1 * (seed + 1))
        shutil.copytree(adapter.directory, tmp_path / "three" / name)
    return tmp_path / "three"


@pytest.mark.parametrize("posted", [["b"], ["b", "b"], ["b", "c"], ["b", "b", "c", "b"]])
def test_what_had_no_verdict_is_not_gone_back_to(three, counts, monkeypatch, posted):
    """Whatever is posted before the verdict, also the same twice: the server goes back to what it was compared with."""
    with client(Workers(three, monkeypatch)) as http:
        time.sleep(0.1)  # it looks once before anything is drafted
        counts.now = SpecDecodeCounts(2000, 6000, 4000, (4000,))  # two accepted per draft with a
        time.sleep(0.1)
        for name in posted:
            assert http.post(PATH, json={"adapter": name}).json()["adapter"] == str(three / name)
        assert http.get(PATH).json()["previous"] == str(three / "a")
        counts.now = SpecDecodeCounts(4000, 12000, 4020, (4020,))
        while (shown := http.get(PATH).json())["last"]["event"] == "swapped":
            time.sleep(0.01)
        assert (shown["last"]["event"], shown["adapter"]) == ("swapped back", str(three / "a"))


def test_the_running_adapter_posted_again_changes_nothing(three, counts, monkeypatch):
    with client(Workers(three, monkeypatch)) as http:
        assert http.post(PATH, json={"adapter": "b", "watch": False}).status_code == 200
        again = http.post(PATH, json={"adapter": "b"}).json()
        assert (again["previous"], again["comparing"]) == (str(three / "a"), False)
        assert again["last"]["event"] == "kept"
        assert again["last"]["why"].startswith("it is the adapter that was running already")
        assert http.post(PATH, json={"undo": True}).json()["adapter"] == str(three / "a")


def test_an_unwatched_swap_goes_back_to_the_one_right_before(three, counts, monkeypatch):
    with client(Workers(three, monkeypatch)) as http:
        assert http.post(PATH, json={"adapter": "b"}).json()["comparing"]
        unwatched = http.post(PATH, json={"adapter": "c", "watch": False}).json()
        assert (unwatched["previous"], unwatched["comparing"]) == (str(three / "b"), False)


def test_without_statistics_it_swaps_and_does_not_compare(root, counts):
    counts.now = None
    with client(Engine({"directory": str(root), "repo": None})) as http:
        assert http.post(PATH, json={"adapter": "b"}).json()["comparing"] is False


def test_the_command_asks_the_same_path():
    assert swap.PATH == PATH
