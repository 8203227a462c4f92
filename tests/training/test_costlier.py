"""The costlier target computes more and writes the same."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from ppow_train.errors import UserError
from ppow_train.tiny.costlier import carry_over, make_costlier
from vllm_ppow.artifact import (
    AdapterConfig,
    ArtifactError,
    ModelRef,
    fingerprint_model,
    read_adapter,
    write_adapter,
)

TINY = Path(__file__).parents[2] / "examples" / "tiny"


@pytest.fixture(scope="module")
def costlier(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("costlier") / "pair"
    make_costlier(TINY, output, num_layers=11, intermediate_size=700)
    return output


def test_same_logits_and_the_same_states_where_the_head_reads_them(costlier):
    tokens = torch.randint(2048, (2, 40), generator=torch.Generator().manual_seed(0))
    small, large = (
        AutoModelForCausalLM.from_pretrained(directory / "target", dtype=torch.float32)(
            tokens, output_hidden_states=True
        )
        for directory in (TINY, costlier)
    )
    torch.testing.assert_close(large.logits, small.logits, atol=1e-4, rtol=1e-4)
    for tap in json.loads((costlier / "eagle3" / "config.json").read_text())[
        "eagle_aux_hidden_state_layer_ids"
    ]:
        torch.testing.assert_close(large.hidden_states[tap], small.hidden_states[tap], atol=1e-4, rtol=1e-4)
    assert len(large.hidden_states) == 12 > len(small.hidden_states)


def test_added_layers_are_not_empty(costlier):
    """They must cost something: only what writes to the residual stream is zero."""
    model = AutoModelForCausalLM.from_pretrained(costlier / "target")
    layer = model.model.layers[10]
    assert layer.self_attn.q_proj.weight.any()
    assert layer.mlp.gate_proj.weight.any()
    assert not layer.self_attn.o_proj.weight.any()
    assert not layer.mlp.down_proj.weight.any()
    assert layer.mlp.gate_proj.weight.shape == (700, 192)


def test_an_adapter_is_carried_over(costlier, tmp_path):
    drafter = ModelRef(str(TINY / "eagle3"), fingerprint_model(TINY / "eagle3"))
    target = ModelRef(str(TINY / "target"), fingerprint_model(TINY / "target"))
    config = AdapterConfig("eagle3", drafter, target, 8, 0.12, "probabilistic", 1.0)

    def write_peft(directory: Path) -> None:
        (directory / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
        save_file(
            {"base_model.model.fc.lora_A.weight": torch.ones(2, 576)}, directory / "adapter_model.safetensors"
        )

    old = write_adapter(tmp_path / "adapter", config, write_peft)
    new = read_adapter(carry_over(old.directory, costlier))
    assert new.config.target.fingerprint == fingerprint_model(costlier / "target") != target.fingerprint
    assert new.config.adapter_fingerprint == old.config.adapter_fingerprint
    assert new.config.base_drafter == drafter
    with pytest.raises(ArtifactError):
        carry_over(tmp_path / "none", costlier)


def test_bad_input(costlier, tmp_path):
    with pytest.raises(UserError, match="exists already"):
        make_costlier(TINY, costlier, 11, 700)
    with pytest.raises(UserError, match="at least as many"):
        make_costlier(TINY, tmp_path / "smaller", 4, 700)
    with pytest.raises(UserError, match="does not hold the tiny pair"):
        make_costlier(tmp_path, tmp_path / "none", 11, 700)
    assert not list(tmp_path.iterdir()), "a part of one"
