"""A head in the original EAGLE format, with a reduced vocabulary and the target's embeddings, served with an adapter.

One engine shows all of it: the target's output, the acceptance that the vocabulary allows, weights equal to PEFT's
merge, and drafts that are, token by token, those of the training library's own chain (slots, positions, norms, d2t).
"""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from serving_engine import MAX_TOKENS, PROMPTS, engine, expected, generate
from serving_pair import ORIGINAL_IDS, VOCAB, K, load_drafter, restoring_adapter

from ppow_train.drafters.eagle3 import Eagle3Drafter
from ppow_train.target import Target
from ppow_train.types import Trajectories
from vllm_ppow.metrics import SpecDecodeCounts

pytestmark = pytest.mark.engine

PROMPT = [250, 3, 77, 120]  # for the drafts that are compared; its tokens are all different


@pytest.fixture(scope="module", params=["original", "original31"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def restoring(kind, pair, tmp_path_factory):
    """The head spoiled, and the adapter that restores it."""
    return restoring_adapter(tmp_path_factory.mktemp("original"), kind, pair)


def counted(llm) -> tuple[list[list[int]], SpecDecodeCounts]:
    before = SpecDecodeCounts.from_metrics(llm.get_metrics())
    output = generate(llm)
    return output, SpecDecodeCounts.from_metrics(llm.get_metrics()) - before


def accepted_drafts() -> tuple[int, int]:
    """Drafts and first tokens accepted, where every first token that can be drafted is right and no second one is."""
    drafts = accepted = 0
    for prompt in PROMPTS:
        token, written = (
            prompt[-1] + 1,
            1,
        )  # prefill writes one, then every draft adds what is accepted and one more
        while written < MAX_TOKENS:
            drafts += 1
            right = (token + 1) % VOCAB in ORIGINAL_IDS
            accepted += right
            token, written = token + 1 + right, written + 1 + right
    return drafts, accepted


def our_drafts(drafter: Eagle3Drafter, target: Target, tokens: list[int]) -> dict[int, list[int]]:
    """What the training library drafts after each verified token of PROMPT's continuation, by that token."""
    ids = torch.tensor([tokens])
    trajectories = Trajectories(ids, torch.tensor([len(PROMPT)]), torch.tensor([len(tokens)]))
    encoded = target.encode(trajectories)
    starts = torch.arange(len(PROMPT) + 1, len(tokens) + 1)[None]
    with torch.no_grad():
        drafts, _ = drafter.sample(drafter.encode(trajectories, encoded), starts, K, temperature=0)
    return {tokens[start - 1]: row for start, row in zip(starts[0].tolist(), drafts[0].tolist(), strict=True)}


def test_an_adapter_on_an_original_head(pair, kind, restoring, monkeypatch):
    from vllm import SamplingParams
    from vllm.model_executor.model_loader import base_loader
    from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

    loaded: list[dict[str, torch.Tensor]] = []
    process, propose = base_loader.process_weights_after_loading, SpecDecodeBaseProposer.propose

    def snapshot(model, *args, **kwargs):
        loaded.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
        return process(model, *args, **kwargs)

    seen: list[tuple[list[int], list[list[int]]]] = []

    def record(self, *args, next_token_ids, **kwargs):
        drafts = propose(self, *args, next_token_ids=next_token_ids, **kwargs)
        seen.append((next_token_ids.tolist(), drafts.tolist()))
        return drafts

    monkeypatch.setattr(base_loader, "process_weights_after_loading", snapshot)
    monkeypatch.setattr(SpecDecodeBaseProposer, "propose", record)
    spoiled, adapter = restoring
    spec = {"method": "ppow", "model": str(adapter.directory), "draft_sample_method": "greedy"}
    spec["ppow"] = {"window": "fixed"}
    with engine(pair.target, spec, dtype="float32") as llm:
        output, counts = counted(llm)
        seen.clear()
        params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True)
        one = llm.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False)
        continuation = list(one[0].outputs[0].token_ids)

    assert output == expected(VOCAB)
    assert (counts.num_drafts, counts.num_accepted_tokens) == accepted_drafts()
    assert counts.acceptance_per_position[1:] == (0.0,) * (K - 1)

    model = PeftModel.from_pretrained(load_drafter(kind, spoiled, pair.target), adapter.directory)
    merged = model.merge_and_unload().float()
    check_weights(loaded[-1], merged)
    tokens = [
        *PROMPT,
        *(PROMPT[-1] + 1 + i for i in range(MAX_TOKENS + K + 1)),
    ]  # the engine looks past the end
    assert continuation == tokens[len(PROMPT) :][:MAX_TOKENS]
    ours = our_drafts(Eagle3Drafter(merged), Target(pair.target, (2, 4, 5)), tokens)
    assert len(seen) >= MAX_TOKENS // 2
    for next_tokens, drafts in seen:
        assert drafts[0] == ours[next_tokens[0]]


def check_weights(found: dict[str, torch.Tensor], merged: torch.nn.Module) -> None:
    """What vLLM holds after fusing, before kernels repack it, against PEFT's merge."""
    wanted = merged.state_dict()
    layer = "layers.0.self_attn"
    qkv = torch.cat([wanted[f"{layer}.{part}_proj.weight"] for part in "qkv"])
    for name, weight in (
        ("fc", wanted["fc.weight"]),
        ("self_attn.o_proj", wanted[f"{layer}.o_proj.weight"]),
        ("self_attn.qkv_proj", qkv),
        ("mlp.down_proj", wanted["layers.0.mlp.down_proj.weight"]),
    ):
        (ours,) = [value for key, value in found.items() if key.endswith(f"{name}.weight")]
        assert torch.equal(ours, weight), name
    assert torch.equal(found["lm_head.weight"][: len(ORIGINAL_IDS)], wanted["lm_head.weight"])
    assert torch.equal(found["draft_id_to_target_id"], wanted["d2t"])


def test_without_the_adapter_little_is_accepted(pair, restoring):
    """The spoiled head, served natively: what the adapter restores is not there by itself."""
    native = {"method": "eagle3", "model": str(restoring[0]), "num_speculative_tokens": K}
    with engine(pair.target, native, dtype="float32") as llm:
        output, counts = counted(llm)
    assert output == expected(VOCAB)
    assert counts.num_accepted_tokens < accepted_drafts()[1] / 2
