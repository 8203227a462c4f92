"""The merge against PEFT's own, bit for bit, and every adapter or drafter it must refuse."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from serving_pair import HIDDEN, LINEAR, load_drafter, random_adapter, random_lora, save_adapter

from vllm_ppow.artifact import Adapter, fingerprint_model, read_adapter, write_adapter
from vllm_ppow.merge import MergeError, Merger, MergeReport, canonical_module

KINDS = ("eagle3", "causal_lm")
Q, DOWN = "layers.0.self_attn.q_proj", "layers.0.mlp.down_proj"


def merge(adapter: Adapter, stream: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], MergeReport]:
    merger = Merger(adapter)
    return dict(merger.wrap(stream.items())), merger.assert_complete()


def merged_drafter(
    adapter: Adapter, drafter, dtype=torch.bfloat16
) -> tuple[dict[str, torch.Tensor], MergeReport]:
    return merge(adapter, {k: t.to(dtype) for k, t in load_file(drafter / "model.safetensors").items()})


@pytest.fixture(scope="module")
def adapter(pair, tmp_path_factory):
    """An adapter of the causal LM drafter."""
    return random_adapter(tmp_path_factory.mktemp("merge"), "causal_lm", pair)


def variant(adapter: Adapter, directory, tensors=None, **options) -> Adapter:
    """A copy of an adapter with other tensors, or other options in adapter_config.json."""

    def write(path):
        save_file(
            load_file(adapter.weights) if tensors is None else tensors, path / "adapter_model.safetensors"
        )
        (path / "adapter_config.json").write_text(json.dumps({**adapter.peft_config, **options}))

    return write_adapter(directory, adapter.config, write)


# ---------------------------------------------------------------- equal to PEFT


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "mlp.down_proj": 6}, "alpha_pattern": {"o_proj": 32}},
        {"target_modules": [*LINEAR, "lm_head"], "exclude_modules": "verifier_lm_head"},
    ],
)
def test_equals_peft_bit_for_bit(pair, tmp_path, kind, dtype, options):
    drafter = pair.drafter(kind)
    peft_model = random_lora(load_drafter(kind, drafter).to(dtype), **options)
    adapter = save_adapter(tmp_path / "a", peft_model, kind, drafter, pair.target)
    merged, report = merged_drafter(adapter, drafter, dtype)
    reference = dict(peft_model.merge_and_unload().named_parameters())
    base = load_file(drafter / "model.safetensors")
    changed = {name for name, tensor in merged.items() if not torch.equal(tensor, base[name].to(dtype))}
    assert report == MergeReport(
        adapter.config.adapter_fingerprint, len(changed), len(load_file(adapter.weights))
    )
    assert {name.removesuffix(".weight").rpartition(".")[2] for name in changed} >= set(LINEAR)
    for name, tensor in merged.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, reference[name]), name


def test_the_streams_own_tensors_are_never_written_to(pair, adapter):
    stream = load_file(pair.causal_lm / "model.safetensors")
    before = {name: tensor.clone() for name, tensor in stream.items()}
    list(Merger(adapter).wrap(stream.items()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in stream.items())


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("model.layers.0.mlp.up_proj", "layers.0.mlp.up_proj"),
        ("layers.0.mlp.up_proj", "layers.0.mlp.up_proj"),
        ("midlayer.mlp.up_proj", "layers.0.mlp.up_proj"),
        ("model.midlayer.mlp.up_proj", "layers.0.mlp.up_proj"),
        ("lm_head", "lm_head"),
        ("model.fc", "fc"),
        ("submodel.layers.0", "submodel.layers.0"),
    ],
)
def test_aliases(name, canonical):
    assert canonical_module(name) == canonical


def test_head_in_the_original_format_takes_an_adapter_of_the_speculators_format(pair, tmp_path):
    adapter = random_adapter(tmp_path, "eagle3", pair)
    base = load_file(pair.eagle3 / "model.safetensors")
    merged, _ = merged_drafter(adapter, pair.eagle3)
    merger = Merger(adapter)
    original = dict(
        merger.wrap((name.replace("layers.0.", "midlayer."), tensor) for name, tensor in base.items())
    )
    assert merger.assert_complete().num_merged == len(LINEAR)
    assert all(torch.equal(original[name.replace("layers.0.", "midlayer.")], merged[name]) for name in base)


def test_adapter_of_an_original_head_merges_into_its_own_checkpoint(pair, tmp_path):
    """PEFT names it by the library's `layers.0.`, the checkpoint by `midlayer.`; equal to PEFT bit for bit."""
    peft_model = random_lora(
        load_drafter("original", pair.original, pair.target),
        target_modules=[*LINEAR, "fc", "lm_head"],
        exclude_modules="verifier_lm_head",
    )
    adapter = save_adapter(tmp_path / "a", peft_model, "original", pair.original, pair.target)
    assert all("midlayer" not in name for name in load_file(adapter.weights))
    Merger(adapter).check_base(pair.original)
    base = load_file(pair.original / "model.safetensors")
    merged, report = merge(adapter, base)
    assert report.num_merged == len(LINEAR) + 2
    reference = peft_model.merge_and_unload().state_dict()
    for name, tensor in merged.items():
        assert torch.equal(tensor, reference[name.replace("midlayer.", "layers.0.")]), name
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert {name for name in changed if name.startswith("midlayer.")} == {
        name for name in base if name.startswith("midlayer.") and "proj" in name
    }
    assert changed == {"fc.weight", "lm_head.weight"} | {name for name in changed if "midlayer." in name}


def test_adapter_of_an_original_head_merges_into_a_head_with_the_librarys_names(pair, tmp_path):
    adapter = random_adapter(tmp_path, "original", pair)
    base = load_file(pair.original / "model.safetensors")
    merged, _ = merge(adapter, base)
    renamed, report = merge(
        adapter, {name.replace("midlayer.", "layers.0."): tensor for name, tensor in base.items()}
    )
    assert report.num_merged == len(LINEAR)
    assert all(torch.equal(merged[name], renamed[name.replace("midlayer.", "layers.0.")]) for name in base)


def test_a_checkpoint_that_names_the_layer_both_ways(pair, tmp_path):
    adapter = random_adapter(tmp_path, "original", pair)
    base = load_file(pair.original / "model.safetensors")
    base |= {name.replace("midlayer.", "layers.0."): tensor for name, tensor in base.items()}
    with pytest.raises(MergeError, match=r"twice, as midlayer.*: copy the drafter again, or leave one"):
        merge(adapter, base)


# ---------------------------------------------------------------- refused adapters


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("peft_type", "IA3"),
        ("use_dora", True),
        ("lora_bias", True),
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("fan_in_fan_out", True),
        ("target_parameters", ["experts.gate_up_proj"]),
        ("trainable_token_indices", [1, 2]),
        ("layer_replication", [[0, 1]]),
        ("init_lora_weights", "pissa"),
    ],
)
def test_refuses_options_that_cannot_be_merged(adapter, tmp_path, option, value):
    changed = variant(adapter, tmp_path / "a", **{option: value})
    with pytest.raises(MergeError, match=f"{option}.*{value if isinstance(value, str) else ''}.*: train "):
        Merger(changed)


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.lm_head.base_layer.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias",
    ],
)
def test_refuses_tensors_that_are_no_lora_pair(adapter, tmp_path, name):
    changed = variant(adapter, tmp_path / "a", {**load_file(adapter.weights), name: torch.zeros(4, HIDDEN)})
    with pytest.raises(MergeError, match=r"no LoRA pair.*save_embedding_layers=False"):
        Merger(changed)


def test_refuses_half_a_pair(adapter, tmp_path):
    tensors = load_file(adapter.weights)
    del tensors[f"base_model.model.model.{Q}.lora_B.weight"]
    with pytest.raises(
        MergeError, match=r"no matching lora_A and lora_B for model.layers.0.self_attn.q_proj"
    ):
        Merger(variant(adapter, tmp_path / "a", tensors))


def test_refuses_tensors_that_are_no_float_matrices(adapter, tmp_path):
    tensors = load_file(adapter.weights)
    tensors[f"base_model.model.model.{Q}.lora_A.weight"] = torch.zeros(4, HIDDEN, dtype=torch.int8)
    with pytest.raises(MergeError, match="floating-point matrix is needed"):
        Merger(variant(adapter, tmp_path / "a", tensors))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_refuses_tensors_that_hold_no_numbers(adapter, tmp_path, value):
    tensors = load_file(adapter.weights)
    tensors[f"base_model.model.model.{Q}.lora_A.weight"][1, 2] = value
    with pytest.raises(MergeError, match=r"q_proj.lora_A.weight holds values that are no numbers"):
        Merger(variant(adapter, tmp_path / "a", tensors))


def test_refuses_a_sum_that_its_dtype_cannot_hold(pair, adapter, tmp_path):
    """Verification would take the draft probabilities of such a drafter for what they are not."""
    huge = variant(adapter, tmp_path / "a", lora_alpha=1e9)
    merged_drafter(huge, pair.causal_lm, torch.bfloat16)
    with pytest.raises(MergeError, match=r"with the adapter is not finite in torch.float16"):
        merged_drafter(huge, pair.causal_lm, torch.float16)


@pytest.mark.timeout(20)
def test_refuses_patterns_that_take_minutes(adapter, tmp_path):
    """Small files do: the time grows with the third power of a name's length."""
    long = f"base_model.model.{'a.' * 2000}q_proj"
    tensors = {f"{long}.lora_{side}.weight": torch.zeros(2, 2) for side in "AB"}
    slow = variant(adapter, tmp_path / "slow", tensors, r=2, rank_pattern={".*.*!": 2})
    with pytest.raises(MergeError, match=r"could take minutes: name modules there, without \.\*"):
        Merger(slow)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("rank_pattern", {"(": 4}),
        ("rank_pattern", ["q_proj"]),
        ("alpha_pattern", 3),
        # Tried in exponentially many ways: seconds for a name of 25 characters, hours for most.
        ("rank_pattern", {"(?:[a-z0-9._]+)+!": 4}),
        ("alpha_pattern", {"(.|.)" * 30 + "!": 4}),
        ("rank_pattern", {".*" * 20 + "!": 4}),
    ],
)
@pytest.mark.timeout(20)
def test_refuses_patterns_that_cannot_be_read(adapter, tmp_path, option, value):
    with pytest.raises(MergeError, match=r"rank_pattern or alpha_pattern .* is not readable"):
        Merger(variant(adapter, tmp_path / "a", **{option: value}))


def test_refuses_scales_that_are_none(adapter, tmp_path):
    empty = {
        name: tensor[:0] if "lora_A" in name else tensor[:, :0]
        for name, tensor in load_file(adapter.weights).items()
    }
    with pytest.raises(MergeError, match=r"has rank 0 and alpha"):
        Merger(variant(adapter, tmp_path / "a", {n: t.contiguous() for n, t in empty.items()}, r=0))
    with pytest.raises(MergeError, match=r"alpha inf"):
        Merger(variant(adapter, tmp_path / "b", lora_alpha=float("inf")))


def test_refuses_two_names_of_one_module(adapter, tmp_path):
    tensors = load_file(adapter.weights)
    for side in "AB":
        tensor = tensors[f"base_model.model.model.{Q}.lora_{side}.weight"]
        tensors[f"base_model.model.midlayer.self_attn.q_proj.lora_{side}.weight"] = tensor.clone()
    with pytest.raises(MergeError, match=f"names {Q} twice"):
        Merger(variant(adapter, tmp_path / "a", tensors))


def test_refuses_a_rank_that_the_config_denies(adapter, tmp_path):
    with pytest.raises(MergeError, match=r"has rank 4 .*says rank 16"):
        Merger(variant(adapter, tmp_path / "a", r=16))


def test_refuses_an_adapter_without_tensors(adapter, tmp_path):
    with pytest.raises(MergeError, match="holds no LoRA tensors"):
        Merger(variant(adapter, tmp_path / "a", {}))


# ---------------------------------------------------------------- refused drafters


def spoil(base, change):
    """The drafter's stream with one thing changed."""
    tensors = {name: tensor.clone() for name, tensor in base.items()}
    change(tensors)
    return tensors


def drop_q(tensors):
    del tensors[f"model.{Q}.weight"]


def reshape_q(tensors):
    tensors[f"model.{Q}.weight"] = tensors[f"model.{Q}.weight"][:-32].clone()


def repeat_q(tensors):
    tensors["model.midlayer.self_attn.q_proj.weight"] = tensors[f"model.{Q}.weight"].clone()


def quantise_q(tensors):
    tensors[f"model.{Q}.weight"] = tensors[f"model.{Q}.weight"].to(torch.int8)


def quantise_down_fp8(tensors):
    tensors[f"model.{DOWN}.weight"] = tensors[f"model.{DOWN}.weight"].to(torch.float8_e4m3fn)


def scale_down(tensors):
    tensors[f"model.{DOWN}.weight_scale"] = torch.ones(1)


def pack_down(tensors):
    tensors[f"model.{DOWN}.qweight"] = tensors.pop(f"model.{DOWN}.weight").to(torch.int32)


def mix_in_lora(tensors):
    tensors[f"base_model.model.model.{Q}.lora_A.weight"] = torch.zeros(4, HIDDEN)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_q, rf"has tensors for {Q}, which the drafter's checkpoint does not contain"),
        (reshape_q, rf"changes {Q} of shape \[128, 64\], the drafter's has \[96, 64\]"),
        (repeat_q, rf"holds {Q} twice"),
        (quantise_q, "is quantised"),
        (quantise_down_fp8, "is quantised"),
        (scale_down, "is quantised"),
        (pack_down, "is quantised"),
        (mix_in_lora, "holds the LoRA tensor .* itself"),
    ],
)
@pytest.mark.parametrize("when", ["streaming", "beforehand"])
def test_refuses_drafters(pair, adapter, tmp_path, change, message, when):
    tensors = spoil(load_file(pair.causal_lm / "model.safetensors"), change)
    if when == "streaming":
        with pytest.raises(MergeError, match=message):
            merge(adapter, tensors)
        return
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((pair.causal_lm / "config.json").read_bytes())
    with pytest.raises(MergeError, match=message):
        Merger(adapter).check_base(tmp_path)


def test_checking_beforehand_leaves_the_merger_usable(pair, adapter):
    merger = Merger(adapter)
    merger.check_base(pair.causal_lm)
    list(merger.wrap(load_file(pair.causal_lm / "model.safetensors").items()))
    assert merger.assert_complete().num_merged == len(LINEAR)


def test_a_second_stream_is_refused(pair, adapter):
    merger = Merger(adapter)
    stream = load_file(pair.causal_lm / "model.safetensors")
    list(merger.wrap(stream.items()))
    with pytest.raises(MergeError, match="twice"):
        list(merger.wrap(stream.items()))


def test_an_unfinished_stream_is_no_complete_merge(pair, adapter):
    merger = Merger(adapter)
    stream = merger.wrap(load_file(pair.causal_lm / "model.safetensors").items())
    for name, _ in stream:
        if "q_proj" in name:
            break
    with pytest.raises(MergeError, match="does not contain"):
        merger.assert_complete()


def test_refuses_a_tied_target(pair, tmp_path):
    adapter = random_adapter(tmp_path, "causal_lm", pair, target_modules=["lm_head", "q_proj"])
    tied = tmp_path / "tied"
    tied.mkdir()
    (tied / "model.safetensors").write_bytes((pair.causal_lm / "model.safetensors").read_bytes())
    config = json.loads((pair.causal_lm / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert fingerprint_model(tied) == adapter.config.base_drafter.fingerprint
    with pytest.raises(MergeError, match=r"changes lm_head, which drafter .* ties to its embeddings"):
        Merger(adapter).check_base(tied)
    eagle = dataclasses.replace(adapter, config=dataclasses.replace(adapter.config, drafter_type="eagle3"))
    Merger(eagle).check_base(tied)


def test_adapter_read_back_is_the_adapter_written(adapter):
    assert read_adapter(adapter.directory) == adapter
