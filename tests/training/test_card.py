"""The model card: valid front matter, what was measured as it was measured, nothing of the machine."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from ppow_train.card import CARD, write_card
from ppow_train.objectives.formulas import formula
from ppow_train.options import PPOWOptions
from ppow_train.report import CURVE, write_curve
from vllm_ppow.artifact import AdapterConfig, ModelRef

SELECTION = {"prompts": 31, "curve": [(0, 0.9), (10, 1.1), (20, 1.0)], "written_after_updates": 10}
CONFIG = AdapterConfig(
    drafter_type="eagle3",
    base_drafter=ModelRef("someone/head", "sha256:" + "1" * 64),
    target=ModelRef("/home/me/secret/target-8b", "sha256:" + "2" * 64),
    num_speculative_tokens=2,
    draft_cost_ratio=0.12,
    draft_sample_method="probabilistic",
    temperature=1.0,
    training={
        "objective": "cst:tv",
        "seed": 7,
        "updates": 20,
        "windows_per_update": 128,
        "trajectories": 1234,
        "tokens": 56789,
        "prompts": "requests.jsonl",
        "options": {"objective": "cst:tv", "lora_rank": 32},
        "report": {
            "prompts": 33,
            "before": {"accepted_per_draft": 0.9, "per_position": [0.6, 0.3]},
            "after": {"accepted_per_draft": 1.1, "per_position": [0.7, 0.4]},
        },
        "gain_above_zero": True,
        "selection": SELECTION,
    },
    versions={"torch": "2.13.0"},
)
PARITY = {"holds": True, "simulated_accepted_per_draft": 1.123, "served_accepted_per_draft": 1.098}


def card(directory: Path, config: AdapterConfig = CONFIG, parity: dict | None = None) -> ModelCard:
    write_card(directory, config, parity)
    assert [path.name for path in directory.iterdir() if path.name.startswith(".")] == []
    return ModelCard.load(directory / CARD)


def with_training(**facts: object) -> AdapterConfig:
    return dataclasses.replace(CONFIG, training={**CONFIG.training, **facts})


def test_front_matter(tmp_path):
    data = card(tmp_path).data
    assert data.library_name == "peft"
    assert data.tags == ["speculative-decoding", "vllm", "ppow"]
    assert data.base_model == "someone/head"
    assert data.get("base_model_relation") == "adapter"
    assert data.license is None


def test_a_local_drafter_is_no_base_model_and_paths_stay_at_home(tmp_path):
    local = dataclasses.replace(CONFIG, base_drafter=ModelRef("/home/me/secret/my-head", "sha256:3"))
    written = card(tmp_path, local)
    assert written.data.base_model is None
    assert "`my-head`" in written.content
    assert '"base_drafter": "my-head"' in written.content
    assert "/home" not in written.content
    assert "secret" not in written.content


def test_what_a_prompt_was_continued_with(tmp_path):
    assert "at temperature 1, 56,789 tokens" in card(tmp_path).content
    often = with_training(options={"continuations": 8})
    assert "at temperature 1 (8 of each prompt), 56,789 tokens" in card(tmp_path, often).content
    greedy = dataclasses.replace(often, temperature=0.0)
    assert "(8 of each prompt, the first greedy, the others sampled)" in card(tmp_path, greedy).content


def test_what_was_measured(tmp_path):
    write_curve(tmp_path / CURVE, SELECTION)
    text = card(tmp_path, parity=PARITY).text
    for part in (
        "| drafter alone | 0.900 | 0.600 0.300 |",
        "| with this adapter | 1.100 | 0.700 0.400 |",
        "33 held-out prompts",
        "agrees at every position (1.098 counted, 1.123 simulated)",
        "after 10 of 20 updates",
        "31 other held-out prompts",
        f"]({CURVE})",
        "vllm serve target-8b --speculative-config",
        "1,234 continuations",
        "56,789 tokens",
        "`requests.jsonl`",
        "seed 7; torch 2.13.0",
        "lora_rank: 32",
        "LoRA adapter",
    ):
        assert part in text, part
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    assert CURVE not in card(tmp_path).text, "no picture that is not there"


def test_the_last_adapter_is_not_called_the_best(tmp_path):
    last = SELECTION | {"keep_best": False, "written_after_updates": 20}
    write_curve(tmp_path / CURVE, last)
    text = card(tmp_path, with_training(selection=last)).text
    assert "the adapter after the last of 20 updates (`keep_best: false`), which need not be the best" in text
    assert "by its expected acceptance" not in text


def test_what_was_not_measured_or_failed(tmp_path):
    assert "not checked" in card(tmp_path).text
    assert "**differs**" in card(tmp_path, parity=PARITY | {"holds": False}).text
    assert "Not measured" in card(tmp_path, with_training(report=None)).text
    assert "do not serve it" not in card(tmp_path).text
    assert "do not serve it" in card(tmp_path, with_training(gain_above_zero=False)).text


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"objective": "ppow"}, ["group-relative", "2605.14978", "k / (kγ + 1)", "one standardised advantage"]),
        ({"objective": "ppow", "ppow_credit": "acceptance"}, ["1[q < p] · (f(k) − f(t−1))"]),
        ({"objective": "exact"}, ["min(1, q/p)(y_t) · Σ_v min(p, q)_i", "γ = 0.12"]),
        ({"objective": "exact", "draft_sample_method": "greedy"}, ["q_τ(y_t) · Σ_v (p q_τ)_i", "q_τ: q at temp"]),
        ({"objective": "overlap", "draft_sample_method": "greedy"}, ["S_i = Π_(l≤i) Σ_v (p q_τ)_l"]),
        ({"objective": "overlap", "cost_reading": "drafted"}, ["k / (Kγ + 1)"]),
        ({"objective": "exact", "serving_temperature": 0.0, "greedy_target": "hard"}, ["Π_(l≤i) q_τ(y_l)"]),
        ({"objective": "drafts", "survival_smoothing": 0.25}, ["1 / (1 + Σ_i", "a_l = Σ_v min(p, q)_l", "s = 0.25"]),
        ({"objective": "drafts", "draft_sample_method": "greedy"}, ["a_l = Σ_v (p q_τ)_l"]),
        ({"objective": "cst:tv", "position_decay": 0.7}, ["tv(p, q)_i", "w_i ∝ 0.7^i"]),
        ({"objective": "cst:ce", "position_weights": "dpace"}, ["c = q(argmax p)", "2605.18810"]),
        ({"objective": "overlap + 4 * cst:tv"}, ["Π_(l≤i) Σ_v min(p, q)_l", "; 4 times Σ_i w_i · tv(p, q)_i"]),
    ],
)  # fmt: skip
def test_formulas(options, parts, tmp_path):
    stated = formula(PPOWOptions(**options))
    assert [part for part in parts if part not in stated] == []
    assert stated in card(tmp_path, with_training(objective=options["objective"], options=options)).text
