"""The rules of a swap without an engine: order of steps, who goes back, whence adapters come, when acceptance fell."""

from __future__ import annotations

import asyncio
import json
import shutil
from types import SimpleNamespace

import pytest
from serving_hub import add_to_cache
from serving_pair import random_adapter

from vllm_ppow.artifact import ArtifactError
from vllm_ppow.compat.endpoints import parse
from vllm_ppow.config import HOT_SWAP_KEY, PPOWServingError, rewrite
from vllm_ppow.hot_swap import AcceptanceWatch, Allowed, HotSwap, SwapError, undo_swap
from vllm_ppow.metrics import SpecDecodeCounts


@pytest.fixture(scope="module")
def adapter(pair, tmp_path_factory):
    return random_adapter(tmp_path_factory.mktemp("swap"), "causal_lm", pair)


# ---------------------------------------------------------------- order of steps


class Ranks:
    """Two workers that answer as they are told to, and remember what they were asked."""

    def __init__(self, **failing):
        self.failing, self.asked = failing, []

    async def rpc(self, method, args):
        self.asked.append(method.removeprefix("ppow_"))
        replies = []
        for rank in range(2):
            error = "planted" if self.failing.get(self.asked[-1]) == rank else ""
            replies.append({"ok": not error, "error": error, "adapter": "a", "seconds": 0.0, "changed": True})
        return replies

    def swap(self, directory):
        return asyncio.run(HotSwap(self.rpc).swap(directory))


def test_all_stage_then_all_load(adapter):
    ranks = Ranks()
    assert ranks.swap(adapter.directory)["ok"]
    assert ranks.asked == ["stage", "load", "settle"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_refusal_of_one_rank_loads_nothing(adapter, rank):
    ranks = Ranks(stage=rank)
    with pytest.raises(SwapError, match=r"^planted$"):
        ranks.swap(adapter.directory)
    assert ranks.asked == ["stage", "discard"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_failure_of_one_rank_takes_all_back(adapter, rank):
    ranks = Ranks(load=rank)
    with pytest.raises(SwapError, match="the one before it serves on: planted"):
        ranks.swap(adapter.directory)
    assert ranks.asked == ["stage", "load", "restore"]


@pytest.mark.parametrize("call", ["swap", "undo"])
def test_an_engine_sent_to_sleep_while_workers_stage_is_not_written(adapter, call):
    ranks = Ranks()
    answers = iter([False, True])  # awake when the swap begins, asleep when it is to be written

    async def asleep():
        return next(answers)

    engine = HotSwap(ranks.rpc, asleep)
    with pytest.raises(SwapError, match="wake it, then swap"):
        asyncio.run(engine.swap(adapter.directory) if call == "swap" else engine.undo("asked to"))
    assert ranks.asked == ["stage" if call == "swap" else "stage_previous", "discard"]


def test_going_back_that_fails_says_so(adapter):
    with pytest.raises(SwapError, match=r"so did going back \(planted\): restart the server"):
        Ranks(load=0, restore=1).swap(adapter.directory)


def test_an_engine_that_was_not_started_for_it_says_how():
    load_config = SimpleNamespace(model_loader_extra_config={})
    config = SimpleNamespace(speculative_config=SimpleNamespace(draft_load_config=load_config))
    for vllm_config in (config, SimpleNamespace(speculative_config=None)):
        with pytest.raises(SwapError, match="hot_swap"):
            undo_swap(SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=vllm_config)))


def test_undo_stages_what_was_before():
    ranks = Ranks()
    asyncio.run(HotSwap(ranks.rpc).undo("asked to"))
    assert ranks.asked == ["stage_previous", "load", "settle"]
    with pytest.raises(SwapError, match="planted"):
        asyncio.run(HotSwap(Ranks(stage_previous=0).rpc).undo("asked to"))


# ---------------------------------------------------------------- from where


@pytest.fixture
def root(tmp_path, adapter):
    """An allowed directory with one adapter, and one beside it."""
    shutil.copytree(adapter.directory, tmp_path / "allowed" / "b")
    shutil.copytree(adapter.directory, tmp_path / "outside")
    return tmp_path / "allowed"


def test_paths_inside_are_allowed_relative_or_not(root):
    assert Allowed(root).resolve("b") == root / "b"
    assert Allowed(root).resolve(str(root / "b")) == root / "b"
    (root.parent / "link").symlink_to(root)
    assert Allowed(root.parent / "link").resolve("b") == root / "b"


def test_nothing_outside_is(root):
    (root / "link").symlink_to(root.parent / "outside")
    shutil.copytree(root / "b", root / "part")
    (root / "part" / "adapter_model.safetensors").unlink()
    (root / "part" / "adapter_model.safetensors").symlink_to(
        root.parent / "outside" / "adapter_model.safetensors"
    )
    (root / "circle").symlink_to(root / "circle")
    for name in ("../outside", str(root.parent / "outside"), "link", "part", "b/../../outside", "circle"):
        with pytest.raises(SwapError, match=r"is not among those that this server may swap to: inside /"):
            Allowed(root).resolve(name)
    with pytest.raises(SwapError, match=r"may swap to: none\.$"):
        Allowed().resolve(str(root / "b"))
    for name in ("~/x", "org/adapter"):  # a name below the directory, never a home directory or another repo
        assert Allowed(root).resolve(name) == root / name


def test_the_same_hub_repo_and_no_other(root, adapter, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit = add_to_cache(tmp_path / "hub", "org/a", adapter.directory, branch="v2")
    add_to_cache(tmp_path / "hub", "org/other", adapter.directory)
    assert commit in str(Allowed(repo="org/a").resolve("org/a", "v2"))
    with pytest.raises(SwapError, match="may swap to: the Hub repo org/a"):
        Allowed(repo="org/a").resolve("org/other")
    with pytest.raises(SwapError, match="is not the Hub repo this server started with"):
        Allowed(root, "org/a").resolve("b", "v2")
    assert commit in str(Allowed(repo="org/a").resolve("org/a", commit))


def test_a_revision_leads_to_no_other_place(adapter, tmp_path, monkeypatch):
    """The Hub client reads <cache>/refs/<revision>, and takes what stands there for the name of a snapshot."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    add_to_cache(tmp_path / "hub", "org/a", adapter.directory, branch="v2")
    shutil.copytree(adapter.directory, tmp_path / "elsewhere" / "adapter")
    (tmp_path / "elsewhere" / "note.txt").write_text("../../../elsewhere/adapter")
    for revision in (
        "../../../elsewhere/note.txt",
        str(tmp_path / "elsewhere" / "note.txt"),
        "v2/..",
        "a\0b",
        "",
    ):
        with pytest.raises(SwapError, match="is not a branch, tag or commit of a Hub repo"):
            Allowed(repo="org/a").resolve("org/a", revision)
    with pytest.raises(ArtifactError, match="does not hold it at revision refs/pr/3 while"):
        Allowed(repo="org/a").resolve("org/a", "refs/pr/3")


def test_the_operator_turns_it_on(pair, root, adapter):
    def extra(**ppow):
        spec = {"method": "ppow", "model": str(adapter.directory), "ppow": ppow}
        return rewrite(spec, str(pair.target))["draft_load_config"]["model_loader_extra_config"]

    assert HOT_SWAP_KEY not in extra()
    assert HOT_SWAP_KEY not in extra(hot_swap=False)
    assert extra(hot_swap=True)[HOT_SWAP_KEY] == {"directory": None, "repo": None}
    directory = extra(hot_swap=True, hot_swap_directory=str(root))[HOT_SWAP_KEY]
    assert directory == {"directory": str(root), "repo": None}
    for wrong in (
        {"hot_swap": 1},
        {"hot_swap_directory": str(root)},
        {"hot_swap": True, "hot_swap_directory": "/absent"},
    ):
        with pytest.raises(PPOWServingError, match=r"\"ppow\": hot_swap"):
            extra(**wrong)


# ---------------------------------------------------------------- acceptance


def counts(drafts, accepted, drafted=None):
    return SpecDecodeCounts(drafts, 4 * drafts if drafted is None else drafted, accepted, (accepted,))


@pytest.mark.parametrize(
    ("drafts", "accepted", "drafted", "undo"),
    [
        (100, 100, 400, False),
        (100, 81, 400, False),
        (100, 79, 400, True),
        (200, 158, 800, True),
        (
            100,
            79,
            300,
            False,
        ),  # shorter drafts accept less, each token as well as before: a larger batch, say
        (100, 50, 300, True),
    ],
)
def test_when_acceptance_fell(drafts, accepted, drafted, undo):
    watch = AcceptanceWatch(drafts=100, max_drop=0.2)
    watch.observe(counts(1000, 5000))
    watch.observe(counts(1100, 5100))
    watch.start(counts(1100, 5100))
    assert watch.comparing
    assert watch.verdict(counts(1199, 5170)) is None, "too few drafts"
    verdict = watch.verdict(counts(1100 + drafts, 5100 + accepted, 4 * 1100 + drafted))
    assert verdict is not None
    assert (verdict.before, verdict.undo) == (1.0, undo)
    assert not watch.comparing
    assert watch.verdict(counts(9999, 9999)) is None


def test_only_the_last_drafts_before_are_compared():
    watch = AcceptanceWatch(drafts=100)
    for step in range(11):  # 5 accepted per draft at first, 1 in the last hundred
        watch.observe(counts(50 * step, 250 * min(step, 8) + 50 * max(0, step - 8)))
    watch.start(counts(500, 2100))
    assert watch.verdict(counts(600, 2200)).before == 1.0


def test_an_idle_server_is_watched_without_remembering_more():
    watch = AcceptanceWatch(drafts=100)
    for drafts in (0, 50, 100):
        for _ in range(1000):
            watch.observe(SpecDecodeCounts(drafts, 3 * drafts, drafts, (drafts,)))
    assert len(watch._seen) <= 3


def test_a_hopeless_one_goes_after_a_tenth_of_the_drafts():
    """An adaptive window stops drafting with it, and the rest of the drafts would never come."""
    watch = AcceptanceWatch(drafts=100, max_drop=0.2)
    watch.observe(counts(0, 0))
    watch.start(counts(100, 100))
    assert watch.verdict(counts(109, 100)) is None
    assert watch.verdict(counts(120, 108)) is None, "two fifths: half of what would do"
    assert watch.verdict(counts(120, 107)).undo


def test_nothing_drafted_before_keeps_the_new_one():
    watch = AcceptanceWatch(drafts=10)
    watch.start(counts(0, 0))
    verdict = watch.verdict(counts(10, 0))
    assert not verdict.undo
    assert str(verdict) == "nothing was drafted before the swap, so there was nothing to compare with"


def test_swaps_one_right_after_the_other_are_compared_with_what_is_known():
    """A good one is kept, a bad one after it goes, and so does another bad one after that."""
    watch = AcceptanceWatch(drafts=10)
    watch.observe(counts(0, 0))
    watch.start(counts(10, 10))
    assert not watch.verdict(counts(20, 30)).undo
    watch.start(counts(20, 30))
    assert watch.verdict(counts(30, 31)).undo
    watch.start(counts(30, 31))
    verdict = watch.verdict(counts(40, 32))
    assert (verdict.before, verdict.undo) == (2.0, True)


@pytest.mark.parametrize("made", [0, 4, 40])
def test_a_swap_before_the_verdict_on_another_is_compared_with_what_that_one_was(made):
    """However much the one between has drafted: there is no verdict on it, and nobody goes back to it."""
    watch = AcceptanceWatch(drafts=50)
    watch.observe(counts(0, 0))
    watch.start(counts(1000, 2000))
    watch.start(counts(1000 + made, 2000))
    verdict = watch.verdict(counts(1050 + made, 2020))
    assert (verdict.before, verdict.undo) == (2.0, True)


def test_wrong_thresholds():
    for drafts, drop in ((0, 0.2), (10, 0.0), (10, 1.0), (10**400, 0.2)):
        with pytest.raises(SwapError, match="drafts must be 1 to 1000000000 and max_drop between 0 and 1"):
            AcceptanceWatch(drafts, drop)


# ---------------------------------------------------------------- what a request may say


def test_bodies_that_are_fine():
    for body in (
        {"adapter": "b"},
        {"adapter": "b", "drafts": 5, "max_drop": 0.5, "watch": False},
        {"undo": True},
    ):
        assert parse(body) == body


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([], "must be a JSON object"),
        ({}, "needs either"),
        ({"undo": False}, "needs either"),
        ({"adapter": "b", "undo": True}, "needs either"),
        ({"adapter": ""}, "adapter must be str"),
        ({"adapter": 1}, "adapter must be str"),
        ({"adapter": "b", "drafts": True}, "drafts must be int"),
        ({"adapter": "b", "max_drop": 2.0}, "max_drop between 0 and 1"),
        ({"adapter": "b", "directory": "/"}, r"unknown keys \['directory'\]"),
    ],
)
def test_bodies_that_are_not(body, message):
    with pytest.raises(ArtifactError, match=message):
        parse(json.loads(json.dumps(body)))
