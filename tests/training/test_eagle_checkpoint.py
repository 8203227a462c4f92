"""EAGLE-3 heads in the original format: what is read, what is refused, what comes from the target.

That a head read this way drafts right is shown by the tests over all of training_pair.KINDS.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_pair import (
    DRAFT_VOCAB,
    KINDS,
    TAP_LAYERS,
    VOCAB,
    Directories,
    original_tensors,
    qwen3,
    vocabulary_map,
    widen,
    write_original,
)

from ppow_train.drafters import detect_drafter_type, load_drafter
from ppow_train.errors import UserError
from ppow_train.pair import load_pair

EMBEDDING = "embed_tokens.weight"


def changed(directories: Directories, out: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """The original-format head of the tests with other tensors."""
    shutil.copytree(directories.drafter["original"], out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors")
    return out


def refusal(directory: Path, target: Path | None) -> str:
    with pytest.raises(UserError) as caught:
        load_drafter(directory, target=target)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------- read


@pytest.mark.parametrize("architecture", ["LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM"])
def test_both_names_of_the_architecture_are_eagle3(architecture, tmp_path):
    write_original(tmp_path / "head", original_tensors(1), architectures=[architecture])
    assert detect_drafter_type(tmp_path / "head") == "eagle3"


@pytest.mark.parametrize("architecture", ["EagleLlamaForCausalLM", "Eagle3DeepseekV2ForCausalLM"])
def test_other_eagle_heads_are_not_taken_for_causal_lms(architecture, tmp_path):
    write_original(tmp_path / "head", original_tensors(1), architectures=[architecture])
    with pytest.raises(UserError, match=f"neither a causal LM nor an EAGLE-3 head.*{architecture}"):
        detect_drafter_type(tmp_path / "head")


def test_every_tensor_lands_where_its_name_says(directories):
    drafter = load_drafter(directories.drafter["original"], target=directories.target)
    tensors = load_file(directories.drafter["original"] / "model.safetensors")
    state = drafter.model.state_dict()
    for name, tensor in tensors.items():
        assert state[name.replace("midlayer.", "layers.0.")].equal(tensor), name
    own = {name.replace("midlayer.", "layers.0.") for name in tensors}
    assert {name for name in state if not name.startswith("verifier_")} == own | {EMBEDDING}
    assert drafter.tap_layers == TAP_LAYERS, "2, n // 2 and n - 3 of 8 layers, as vLLM takes them"
    assert drafter.vocab_size == VOCAB
    ids = torch.arange(DRAFT_VOCAB) + tensors["d2t"]
    assert drafter.vocabulary.target_ids is not None
    assert drafter.vocabulary.target_ids.equal(ids)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "causal_lm"])
def test_a_head_is_built_once_and_draws_no_weights(kind, directories, monkeypatch):
    """What the config decides is the library's all the same, and nothing is left without memory."""
    from speculators.models.eagle3 import Eagle3DraftModel

    built = []
    build = Eagle3DraftModel.__init__
    monkeypatch.setattr(Eagle3DraftModel, "__init__", lambda self, *a: built.append(build(self, *a)))
    random = torch.get_rng_state()
    model = load_drafter(directories.drafter[kind], target=directories.target).model
    assert torch.get_rng_state().equal(random)
    assert len(built) == 1
    parts = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert {part.device.type for part in parts.values()} == {"cpu"}
    assert {part.dtype for part in parts.values() if part.is_floating_point()} == {torch.float32}
    monkeypatch.undo()
    library = Eagle3DraftModel(model.config)
    theirs = {**dict(library.named_parameters()), **dict(library.named_buffers())}
    assert set(parts) == {name for name in theirs if not name.startswith("verifier_")}
    for name, part in parts.items():
        assert part.requires_grad == theirs[name].requires_grad, name
    assert model.rotary_emb.inv_freq.equal(library.rotary_emb.inv_freq)


def test_a_head_does_not_change_with_its_file(directories, tmp_path):
    head = shutil.copytree(directories.drafter["eagle3"], tmp_path / "head")
    weight = load_drafter(head).model.fc.weight
    before = weight.clone()
    content = (head / "model.safetensors").read_bytes()
    with (head / "model.safetensors").open("r+b") as file:
        file.write(content[:8] + bytes(len(content) - 8))
    assert weight.equal(before)


def test_the_targets_embeddings_are_used_with_a_word(directories, caplog):
    with caplog.at_level(logging.WARNING):
        drafter = load_drafter(directories.drafter["original"], target=directories.target)
    target = load_file(directories.target / "model.safetensors")["model.embed_tokens.weight"]
    assert drafter.model.embed_tokens.weight.equal(target)
    assert f"uses those of target {directories.target}" in caplog.text


def test_a_heads_own_embeddings_win(directories, tmp_path, caplog):
    own = torch.randn(VOCAB, 64, generator=torch.Generator().manual_seed(3))
    head = changed(directories, tmp_path / "head", lambda tensors: tensors.update({EMBEDDING: own}))
    with caplog.at_level(logging.WARNING):
        drafter = load_drafter(head, target=directories.target)
    assert drafter.model.embed_tokens.weight.equal(own)
    assert not caplog.text


def test_a_head_may_use_the_librarys_name_for_its_layer_and_leave_out_t2d(directories, tmp_path):
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop("t2d")
        for name in [name for name in tensors if name.startswith("midlayer.")]:
            tensors[name.replace("midlayer.", "layers.0.")] = tensors.pop(name)

    one = load_drafter(directories.drafter["original"], target=directories.target).model.state_dict()
    head = changed(directories, tmp_path / "head", rename)
    other = load_drafter(head, target=directories.target).model.state_dict()
    for name, tensor in one.items():
        assert name.startswith("verifier_") or tensor.equal(other[name]), name


def test_full_vocabulary_and_a_target_of_another_width(directories, tmp_path, trajectories):
    """Embeddings of its own, no draft_vocab_size, taps named under `eagle_config`, windows that run."""
    from ppow_train.target import Target

    tensors = original_tensors(4, hidden=32, tapped=64)
    tensors[EMBEDDING] = torch.randn(VOCAB, 32, generator=torch.Generator().manual_seed(1))
    head = write_original(
        tmp_path / "head",
        tensors,
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=1,
        target_hidden_size=64,
        eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 3, 6]},
    )
    drafter: Any = load_drafter(head, target=directories.target)
    assert drafter.tap_layers == (1, 3, 6)
    assert not drafter.vocabulary.is_reduced
    encoded = Target(directories.target, drafter.tap_layers).encode(trajectories)
    windows = drafter.path_logits(
        drafter.encode(trajectories, encoded), trajectories, torch.full((3, 1), 6), 3
    )
    assert windows.shape == (3, 1, 3, VOCAB)
    assert windows.std() > 0.1


@pytest.mark.parametrize(
    ("switches", "extra"),
    [
        (
            {"norm_before_residual": True, "norm_output": True, "fc_norm": True},
            [f"fc_norm.{i}" for i in range(3)],
        ),
        ({"eagle_config": {"norm_before_fc": True}}, ["input_norm"]),
    ],
)
def test_switches_are_read(switches, extra, directories, tmp_path):
    tensors = original_tensors(4)
    for name in extra:
        tensors[f"{name}.weight"] = torch.ones(192 if name == "input_norm" else 64)
    config = load_drafter(
        write_original(tmp_path / "head", tensors, **switches), target=directories.target
    ).model.config
    flat = {**switches, **switches.get("eagle_config", {})}
    for name in ("norm_before_residual", "norm_output", "fc_norm", "norm_before_fc"):
        assert getattr(config, name) == flat.get(name, False), name


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("norm_before_residual", True),
        ("norm_before_fc", False),
        ("fc_norm", False),
        ("norm_output", False),
        ("draft_vocab_size", VOCAB),
    ],
)
@pytest.mark.parametrize("null", [False, True])
def test_what_a_head_of_the_librarys_format_leaves_out_is_read_as_vllm_reads_it(
    name, read, null, directories, tmp_path
):
    """Which the library would not do; tests/contracts/test_head_config.py asks vLLM."""
    head = shutil.copytree(directories.drafter["eagle3"], tmp_path / "head")
    config = json.loads((head / "config.json").read_text())
    config[name] = None
    if not null:
        del config[name]
    (head / "config.json").write_text(json.dumps(config))
    wanted = False if null and isinstance(read, bool) else read
    assert getattr(load_drafter(head).model.config, name) == wanted


def test_a_layer_without_head_dim_divides_its_width(directories, tmp_path):
    head = shutil.copytree(directories.drafter["eagle3"], tmp_path / "head")
    config = json.loads((head / "config.json").read_text())
    assert config["transformer_layer_config"].pop("head_dim") == 32
    (head / "config.json").write_text(json.dumps(config))
    assert load_drafter(head).model.config.transformer_layer_config.head_dim == 64 // 2


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize("kind", ["eagle3", "original"])
def test_a_scale_that_only_vllm_would_apply(kind, directories, tmp_path):
    head = shutil.copytree(directories.drafter[kind], tmp_path / "head")
    config = json.loads((head / "config.json").read_text())
    config.get("transformer_layer_config", config)["logit_scale"] = 0.5
    (head / "config.json").write_text(json.dumps(config))
    assert "logit_scale 0.5, which vLLM would do and training would not" in refusal(head, directories.target)


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize("name", ["num_key_value_heads", "hidden_act", "intermediate_size"])
@pytest.mark.parametrize("null", [False, True])
def test_what_vllm_would_not_start_without(null, name, model_type, directories, tmp_path):
    """A Qwen3 layer has 32 key-value heads for transformers, and no number for vLLM."""
    head = shutil.copytree(directories.drafter["eagle3"], tmp_path / "head")
    config = json.loads((head / "config.json").read_text())
    layer = {**config["transformer_layer_config"], "model_type": model_type, name: None}
    if not null:
        del layer[name]
    (head / "config.json").write_text(json.dumps({**config, "transformer_layer_config": layer}))
    message = refusal(head, directories.target)
    if (model_type, name, null) == ("llama", "num_key_value_heads", False):
        assert "q_norm.weight" in message, (
            "vLLM takes as many as of queries; the layer is a Qwen3's all the same"
        )
    else:
        assert f"config.json gives no {name} of the head's {model_type} layers, without which" in message


def prefixed(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.fc.weight"] = tensors.pop("fc.weight")


def stripped(tensors: dict[str, torch.Tensor]) -> None:
    tensors["self_attn.q_proj.weight"] = tensors.pop("midlayer.self_attn.q_proj.weight")


def twice(tensors: dict[str, torch.Tensor]) -> None:
    tensors["layers.0.mlp.up_proj.weight"] = tensors["midlayer.mlp.up_proj.weight"].clone()


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (
            lambda tensors: tensors.pop("midlayer.mlp.up_proj.weight"),
            ["lacks", "layers.0.mlp.up_proj.weight"],
        ),
        (lambda tensors: tensors.pop("lm_head.weight"), ["lacks", "lm_head.weight"]),
        (lambda tensors: tensors.pop("d2t"), ["lacks", "d2t"]),
        (prefixed, ["lacks", "fc.weight"]),
        (stripped, ["lacks", "layers.0.self_attn.q_proj.weight"]),
        (
            lambda tensors: tensors.update({"model.fc.weight": torch.zeros(2)}),
            ["has the tensors", "model.fc.weight", "check the key names"],
        ),
        (twice, ["layers.0.mlp.up_proj.weight twice", "save the head again"]),
        (lambda tensors: tensors.update({"fc.weight": torch.zeros(2, 2)}), ["does not fit its own config"]),
        (lambda tensors: tensors["d2t"].add_(1000), ["d2t", f"distinct target ids below {VOCAB}"]),
        (lambda tensors: tensors["d2t"].copy_(-torch.arange(DRAFT_VOCAB)), ["d2t", "distinct"]),
        (lambda tensors: tensors.update(d2t=tensors["d2t"].int()), ["d2t", "int64", "torch.int32"]),
        (lambda tensors: tensors["t2d"].logical_not_(), ["t2d and d2t", "different tokens"]),
    ],
)
def test_tensors_that_do_not_fit(change, parts, directories, tmp_path):
    message = refusal(changed(directories, tmp_path / "head", change), directories.target)
    assert all(part in message.replace("\n", " ") for part in parts), message


def test_a_vocabulary_map_beside_the_full_vocabulary(directories, tmp_path):
    """vLLM has no place for it either."""
    d2t, _ = vocabulary_map(0)
    head = write_original(tmp_path / "head", {**original_tensors(1), "d2t": d2t})
    assert f"['d2t'], which an EAGLE-3 head with a draft vocabulary of {VOCAB} out of {VOCAB}" in refusal(
        head, directories.target
    )


def test_a_head_that_needs_its_target_is_not_loaded_without(directories, tmp_path):
    assert "does not say which target layers" in refusal(directories.drafter["original"], None)
    head = write_original(
        tmp_path / "head", original_tensors(1), eagle_aux_hidden_state_layer_ids=list(TAP_LAYERS)
    )
    message = refusal(head, None)
    assert EMBEDDING in message
    assert "name the target" in message


def test_taps_that_vllm_would_hand_over_in_another_order(directories, tmp_path):
    head = write_original(tmp_path / "head", original_tensors(1), eagle_aux_hidden_state_layer_ids=[5, 2, 4])
    assert "[5, 2, 4], which must ascend" in refusal(head, directories.target)


def test_targets_that_cannot_give_what_the_head_needs(directories, tmp_path):
    from transformers import Qwen3ForCausalLM

    for name, config, part in (
        ("narrow", qwen3(8, hidden_size=32), "of size 64"),
        ("shallow", qwen3(4), "[2, 2, 1], which must ascend"),
        ("larger", qwen3(8, vocab_size=VOCAB + 8), f"[{VOCAB + 8}, 64]"),
    ):
        model = Qwen3ForCausalLM(config)
        widen(model, 1)
        model.save_pretrained(tmp_path / name)
        assert part in refusal(directories.drafter["original"], tmp_path / name)


@pytest.mark.parametrize(
    "config", [{"model_type": "qwen3"}, {"eagle_config": {"use_aux_hidden_state": False}}]
)
def test_other_kinds_of_layers(config, directories, tmp_path):
    head = write_original(tmp_path / "head", original_tensors(1), **config)
    assert "only Llama layers that read hidden states" in refusal(head, directories.target)


def test_a_head_for_another_vocabulary(directories, tmp_path):
    tensors = original_tensors(1)
    tensors["lm_head.weight"] = torch.zeros(VOCAB + 8, 64)
    tensors[EMBEDDING] = torch.zeros(VOCAB + 8, 64)
    head = write_original(tmp_path / "head", tensors, vocab_size=VOCAB + 8)
    with pytest.raises(UserError, match=f"reads {VOCAB + 8} tokens, target .* has {VOCAB}"):
        load_pair(str(directories.target), str(head))


def test_the_config_of_the_tests_is_that_of_a_published_head(directories):
    """Nothing of the speculators format in it."""
    config = json.loads((directories.drafter["original"] / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert not {
        "speculators_model_type",
        "transformer_layer_config",
        "eagle_aux_hidden_state_layer_ids",
    } & set(config)
