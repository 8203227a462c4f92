"""Adapters served by a real vLLM engine inside this process: same output, restored acceptance, exact weights."""

from __future__ import annotations

import importlib

import pytest
import torch
from serving_engine import MAX_TOKENS, PROMPTS, engine, expected, generate
from serving_pair import VOCAB, K, load_drafter, random_adapter, random_lora, restoring_adapter

from vllm_ppow.metrics import SpecDecodeCounts

pytestmark = pytest.mark.engine

FIXED = {"ppow": {"window": "fixed"}}  # test_window.py has the adaptive one
KINDS = ("eagle3", "causal_lm")
NATIVE = {"eagle3": "eagle3", "causal_lm": "draft_model"}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def without_speculation(pair):
    with engine(pair.target, None) as llm:
        return generate(llm)


@pytest.fixture(scope="module")
def restoring(pair, tmp_path_factory, kind):
    """A spoiled drafter and the adapter that restores it."""
    return restoring_adapter(tmp_path_factory.mktemp("restoring"), kind, pair)


def serve(pair, spec):
    """Output and counts of one engine."""
    with engine(pair.target, spec) as llm:
        before = SpecDecodeCounts.from_metrics(llm.get_metrics())
        output = generate(llm)
        return output, SpecDecodeCounts.from_metrics(llm.get_metrics()) - before


def test_target_is_what_the_tests_assume(without_speculation):
    assert without_speculation == expected(VOCAB)


def test_adapter_restores_acceptance_and_output_stays_the_targets(pair, kind, restoring, without_speculation):
    spoiled, adapter = restoring
    native = {"method": NATIVE[kind], "num_speculative_tokens": K}
    original_output, original = serve(pair, {**native, "model": str(pair.drafter(kind))})
    spoiled_output, bare = serve(pair, {**native, "model": str(spoiled)})
    output, counts = serve(pair, {"method": "ppow", "model": str(adapter.directory), **FIXED})
    assert output == original_output == spoiled_output == without_speculation
    assert counts == original
    assert original.acceptance_per_position == ((1.0, 0.0, 0.0) if kind == "eagle3" else (1.0, 1.0, 1.0))
    assert bare.mean_accepted < 0.5 < counts.mean_accepted
    assert counts.num_draft_tokens == K * counts.num_drafts
    assert counts.num_drafts + counts.num_accepted_tokens >= len(PROMPTS) * (MAX_TOKENS - 1)


def test_weights_inside_vllm_are_pefts_merge_bit_for_bit(
    pair, kind, tmp_path, monkeypatch, without_speculation
):
    from vllm.model_executor.model_loader import base_loader

    loaded = []  # what each model holds after fusing q/k/v and gate/up, before kernels repack it
    original = base_loader.process_weights_after_loading

    def snapshot(model, *args, **kwargs):
        loaded.append({name: weight.detach().cpu().clone() for name, weight in model.named_parameters()})
        return original(model, *args, **kwargs)

    monkeypatch.setattr(base_loader, "process_weights_after_loading", snapshot)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    options = {
        "target_modules": targets,
        "exclude_modules": "verifier_lm_head",
        "rank_pattern": {"o_proj": 2},
    }
    adapter = random_adapter(tmp_path, kind, pair, **options)
    output, _ = serve(pair, {"method": "ppow", "model": str(adapter.directory), **FIXED})
    assert output == without_speculation

    reference = random_lora(load_drafter(kind, pair.drafter(kind)), **options).merge_and_unload()
    weights = {
        f"model.{name}".replace("model.model.", "model."): w for name, w in reference.named_parameters()
    }
    weights["lm_head.weight"] = reference.lm_head.weight
    base = dict(load_drafter(kind, pair.drafter(kind)).named_parameters())
    assert not torch.equal(base["lm_head.weight"], weights["lm_head.weight"])
    layer = "model.layers.0"
    fused = {
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
        "self_attn.o_proj": ("self_attn.o_proj",),
        "mlp.down_proj": ("mlp.down_proj",),
    }
    found = loaded[-1]  # the drafter is loaded after the target
    checked = 0
    for name, parts in fused.items():
        wanted = torch.cat([weights[f"{layer}.{part}.weight"] for part in parts])
        assert wanted.dtype == torch.bfloat16
        assert torch.equal(_layer_weight(found, name), wanted), name
        checked += len(parts)
    assert torch.equal(found["lm_head.weight"][:VOCAB], weights["lm_head.weight"])
    assert checked + 1 == len(targets)


def _layer_weight(parameters, name):
    """The only layer's weight; vLLM numbers an EAGLE head's layer on from the target's."""
    (found,) = [value for key, value in parameters.items() if key.endswith(f"{name}.weight")]
    return found


def test_start_up_fails_when_nothing_was_merged(pair, restoring, monkeypatch):
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    from vllm_ppow.loader import PPOWModelLoader

    monkeypatch.setattr(PPOWModelLoader, "get_all_weights", DefaultModelLoader.get_all_weights)
    with pytest.raises(ValueError, match=r"loaded without adapter sha256:.*install a tested version"):
        serve(pair, {"method": "ppow", "model": str(restoring[1].directory), **FIXED})


def test_start_up_fails_when_vllm_ignores_the_drafters_load_config(pair, tmp_path, monkeypatch):
    """The silent case: vLLM's draft_model proposers load with the target's load config unless they are shimmed."""
    from vllm_ppow.compat import draft_loading, seams

    monkeypatch.setattr(draft_loading, "install", lambda: None)
    for shim in (
        draft_loading.V1_DRAFT_MODEL,
        draft_loading.V2_DRAFT_MODEL,
        draft_loading.V2_PLAIN_DRAFT_MODEL,
    ):
        if shim in seams._installed:  # by a test before this one
            module, owner, method = shim
            cls = getattr(importlib.import_module(module), owner)
            monkeypatch.setattr(cls, method, seams._installed[shim])
    adapter = random_adapter(tmp_path, "causal_lm", pair)
    with pytest.raises(ValueError, match="loaded without adapter"):
        serve(pair, {"method": "ppow", "model": str(adapter.directory), **FIXED})


def test_probabilistic_drafts_as_the_adapter_was_trained_for(pair, kind, tmp_path, restoring):
    """The adapter's own num_speculative_tokens and draft_sample_method are the defaults, and the user's win."""
    from serving_pair import save_adapter

    spoiled, _ = restoring
    model = random_lora(load_drafter(kind, spoiled), 0.01)
    adapter = save_adapter(
        tmp_path / "a",
        model,
        kind,
        spoiled,
        pair.target,
        num_speculative_tokens=2,
        draft_sample_method="probabilistic",
    )
    with engine(pair.target, {"method": "ppow", "model": str(adapter.directory), **FIXED}) as llm:
        config = llm.llm_engine.vllm_config.speculative_config
        assert (config.num_speculative_tokens, config.draft_sample_method) == (2, "probabilistic")
        assert len(generate(llm, temperature=1.0)) == len(PROMPTS)
