"""Adapters swapped in a running engine: greedy output never changes, drafts become the new one's, failures go back."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch
from serving_engine import MAX_TOKENS, PROMPTS, engine, expected, generate
from serving_pair import VOCAB, load_drafter, random_lora, restoring_adapter, save_adapter

from vllm_ppow.artifact import write_adapter
from vllm_ppow.hot_swap import AcceptanceWatch, SwapError, swap_adapter, undo_swap
from vllm_ppow.metrics import SpecDecodeCounts

pytestmark = pytest.mark.engine

KINDS = ("eagle3", "causal_lm", "original")
SWAPPING = {"hot_swap": True}


@dataclasses.dataclass(frozen=True)
class Case:
    """One kind of drafter: its adapters A (right) and B (wrong), and what engines started with them draft."""

    kind: str
    a: object
    b: object
    probes: dict[str, dict]
    counts: dict[str, SpecDecodeCounts]


@pytest.fixture(scope="module", params=KINDS)
def case(pair, tmp_path_factory, request):
    root, kind = tmp_path_factory.mktemp("swap"), request.param
    spoiled, a = restoring_adapter(root, kind, pair)
    model = random_lora(load_drafter(kind, spoiled, pair.target), 0.3, lora_alpha=4)
    b = save_adapter(root / "b", model, kind, spoiled, pair.target)
    probes, counts = {}, {}
    for name, adapter in (("a", a), ("b", b)):
        with engine(pair.target, spec_of(adapter)) as llm:
            probes[name] = probe(llm)
            counts[name] = counted(llm)
    assert counts["a"] != counts["b"]
    assert not same(probes["a"], probes["b"])
    return Case(kind, a, b, probes, counts)


def spec_of(adapter, **options):
    return {"method": "ppow", "model": str(adapter.directory), "ppow": {"window": "fixed", **options}}


@pytest.fixture(scope="module")
def running(pair, case):
    """One engine of the kind, started with A; every test leaves it with A."""
    with engine(pair.target, spec_of(case.a, **SWAPPING)) as llm:
        yield llm


def counted(llm):
    """Counts of one greedy pass, whose output must be the target's."""
    before = SpecDecodeCounts.from_metrics(llm.get_metrics())
    assert generate(llm) == expected(VOCAB)
    return SpecDecodeCounts.from_metrics(llm.get_metrics()) - before


def probe(llm):
    """What every linear layer of the drafter makes of a fixed input, and its embeddings: the weights in use."""

    def on_worker(worker):
        from vllm.model_executor.layers.linear import LinearBase
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

        made = {}

        def rows(width):
            x = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
            return x.to(worker.model_runner.device, torch.bfloat16)

        for name, module in worker.get_draft_model().named_modules():
            if isinstance(module, LinearBase):
                out = module(rows(module.input_size))
                made[name] = out[0] if isinstance(out, tuple) else out
            elif isinstance(module, ParallelLMHead):
                made[name] = module.quant_method.apply(module, rows(module.embedding_dim))
            elif isinstance(module, VocabParallelEmbedding):
                made[name] = module.weight.detach().clone()
        return made

    with torch.inference_mode():
        return llm.collective_rpc(on_worker)[0]


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def storage(llm):
    """Where the parameters of target and drafter lie."""

    def on_worker(worker):
        models = {"target": worker.get_model(), "draft": worker.get_draft_model()}
        return {
            f"{role}.{name}": parameter.data_ptr()
            for role, model in models.items()
            for name, parameter in model.named_parameters()
            if parameter.numel()  # CPU kernels keep packed copies, and leave nothing behind
        }

    return llm.collective_rpc(on_worker)[0]


@pytest.fixture(scope="module")
def adapters(pair, tmp_path_factory):
    """Two adapters of one drafter."""
    root = tmp_path_factory.mktemp("refused")
    spoiled, first = restoring_adapter(root, "causal_lm", pair)
    model = random_lora(load_drafter("causal_lm", spoiled), 0.3)
    return first, save_adapter(root / "b", model, "causal_lm", spoiled, pair.target)


# ---------------------------------------------------------------- engines that cannot swap


def test_an_engine_without_the_option(pair, adapters):
    first, second = adapters
    with (
        engine(pair.target, spec_of(first)) as llm,
        pytest.raises(SwapError, match=r'start it with method "ppow" and "ppow": {"hot_swap": true}'),
    ):
        swap_adapter(llm, second.directory)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(
            {"enforce_eager": False},
            "on a CPU needs --enforce-eager",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="of a CPU's engine"),
        ),
        ({"worker_extension_cls": "other.Extension"}, r"worker extension, which is set to other\.Extension"),
    ],
)
def test_engines_that_are_refused(pair, adapters, options, message):
    with (
        pytest.raises(ValueError, match=message),
        engine(pair.target, spec_of(adapters[0], **SWAPPING), **options),
    ):
        pass


# ---------------------------------------------------------------- swaps


def test_a_b_a_is_each_time_the_engine_started_with_it(case, running):
    start = storage(running)
    assert same(probe(running), case.probes["a"])
    assert counted(running) == case.counts["a"]
    reply = swap_adapter(running, case.b.directory)
    assert reply["adapter"] == str(case.b.directory)
    assert reply["previous"] == str(case.a.directory)
    assert same(probe(running), case.probes["b"])
    running.reset_prefix_cache()
    assert counted(running) == case.counts["b"]
    swap_adapter(running, case.a.directory)
    assert same(probe(running), case.probes["a"])
    running.reset_prefix_cache()
    assert counted(running) == case.counts["a"]
    assert storage(running) == start, "graphs would read freed memory"


def test_swaps_while_requests_run(case, running):
    from vllm import SamplingParams

    llm_engine = running.llm_engine
    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)
    for number, ids in enumerate(PROMPTS):
        llm_engine.add_request(f"swap-{number}", {"prompt_token_ids": ids}, params)
    outputs, steps = {}, 0
    while llm_engine.has_unfinished_requests():
        for output in llm_engine.step():
            outputs[output.request_id] = list(output.outputs[0].token_ids)
        steps += 1
        swap_adapter(running, (case.b if steps % 2 else case.a).directory)
    assert steps > 3
    assert [outputs[f"swap-{number}"] for number in range(len(PROMPTS))] == expected(VOCAB)
    swap_adapter(running, case.a.directory)


def test_undo_needs_no_files(case, running, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(case.b.directory, copy)
    swap_adapter(running, copy)
    shutil.rmtree(copy)
    undo_swap(running)
    assert same(probe(running), case.probes["a"])
    undo_swap(running)
    assert same(probe(running), case.probes["b"])
    swap_adapter(running, case.a.directory)


def changed(adapter, directory, **changes):
    """A copy of an adapter whose ppow_config.json says something else."""

    def copy(path):
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(adapter.directory / name, path)

    return write_adapter(directory, dataclasses.replace(adapter.config, **changes), copy).directory


def other(ref):
    return dataclasses.replace(ref, name_or_path="other", fingerprint="sha256:other")


def corrupt(case, tmp_path):
    directory = tmp_path / "corrupt"
    shutil.copytree(case.b.directory, directory)
    weights = directory / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return directory


def incomplete(case, tmp_path):
    """An adapter with one module more than the drafter has."""
    from safetensors.torch import load_file, save_file

    def copy(path):
        shutil.copy(case.b.directory / "adapter_config.json", path)
        tensors = load_file(case.b.directory / "adapter_model.safetensors")
        for side in "AB":
            name = next(name for name in tensors if f"q_proj.lora_{side}" in name)
            tensors[name.replace("q_proj", "absent")] = tensors[name].clone()
        save_file(tensors, path / "adapter_model.safetensors")

    return write_adapter(tmp_path / "incomplete", case.b.config, copy).directory


REFUSALS = {
    "corrupt": (corrupt, "is truncated: copy or download it again."),
    "incomplete": (incomplete, "which the drafter's checkpoint does not contain"),
    "absent": (lambda case, tmp_path: tmp_path / "absent", "is not a directory"),
    "another target": (
        lambda case, tmp_path: changed(case.b, tmp_path / "t", target=other(case.b.config.target)),
        r"was trained for another target \(other\) than the one being served",
    ),
    "another drafter": (
        lambda case, tmp_path: changed(
            case.b, tmp_path / "d", base_drafter=other(case.b.config.base_drafter)
        ),
        r"was trained for another drafter \(other\) than the one being served",
    ),
    "other drafts": (
        lambda case, tmp_path: changed(case.b, tmp_path / "s", draft_sample_method="probabilistic"),
        "was trained for probabilistic drafts, this engine makes greedy ones",
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_a_refused_adapter_leaves_the_old_one(case, running, tmp_path, what):
    make, message = REFUSALS[what]
    with pytest.raises(ValueError, match=message) as caught:
        swap_adapter(running, make(case, tmp_path))
    assert "\n" not in str(caught.value)
    assert same(probe(running), case.probes["a"])


@pytest.mark.parametrize("after", [0, 3, 1000], ids=["at once", "half way", "at the end"])
def test_a_load_that_fails_goes_back(case, running, monkeypatch, after):
    """Whatever was written by then is written over again with what ran before."""
    models = []
    running.collective_rpc(lambda worker: models.append(worker.get_draft_model()))
    original, calls = models[0].load_weights, []

    def failing(weights):
        if calls:
            return original(weights)
        calls.append(1)
        original(pair for number, pair in enumerate(weights) if number < after)
        raise RuntimeError("planted")

    monkeypatch.setattr(models[0], "load_weights", failing)
    with pytest.raises(SwapError, match="failed, the one before it serves on: planted"):
        swap_adapter(running, case.b.directory)
    assert calls
    assert same(probe(running), case.probes["a"])
    running.reset_prefix_cache()
    assert counted(running) == case.counts["a"]


@pytest.mark.parametrize("case", ["eagle3", "original"], indirect=True)
def test_what_would_write_to_the_target_is_refused(case, running):
    """A drafter whose output layer is the target's, as vLLM makes it where both are equal in a checkpoint."""

    def share(worker):
        draft, target = worker.get_draft_model(), worker.get_model()
        own, draft.lm_head = draft.lm_head, target.lm_head
        return own

    own = running.collective_rpc(share)[0]
    try:
        with pytest.raises(
            SwapError, match=r"changes lm_head, which the running drafter shares with the target"
        ):
            swap_adapter(running, case.b.directory)
    finally:
        running.collective_rpc(lambda worker: setattr(worker.get_draft_model(), "lm_head", own))
    assert same(probe(running), case.probes["a"])


def test_a_bad_adapter_is_swapped_back_and_a_good_one_is_not(case, running):
    """The acceptance that vLLM counted decides."""

    def counts():
        return SpecDecodeCounts.from_metrics(running.get_metrics())

    def swapped_to(directory):
        watch = AcceptanceWatch(drafts=15)
        watch.observe(counts())
        generate(running)
        swap_adapter(running, directory)
        watch.start(counts())
        while (verdict := watch.verdict(counts())) is None:
            generate(running)
        if verdict.undo:
            undo_swap(running, str(verdict))
        return verdict

    good = swapped_to(shutil.copytree(case.a.directory, case.a.directory.parent / "again"))
    assert not good.undo
    bad = swapped_to(case.b.directory)
    assert bad.undo
    assert bad.after < 0.8 * bad.before
    assert same(probe(running), case.probes["a"])
    shutil.rmtree(case.a.directory.parent / "again")
    swap_adapter(running, case.a.directory)
