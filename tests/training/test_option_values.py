"""Options of training that are wrong, in a file or given in Python: refused when the run begins, in a sentence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from test_bad_input import refused

from ppow_train.config import PPOWConfig, check_keys, read_config_file


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (
            "num_speculative_token: 4",
            ["run.yaml", "unknown key 'num_speculative_token'", "num_speculative_tokens"],
        ),
        ("zzzz: 4", ["unknown key 'zzzz'", "--help"]),
        ("- a", ["mapping", "got list"]),
        ("a: [", ["not readable YAML"]),
        ("learning_rate: 2020-13-45", ["learning_rate must be a number", "got '2020-13-45'"]),
        ("num_speculative_tokens: many", ["num_speculative_tokens must be a whole number", "got 'many'"]),
        ("num_speculative_tokens: 2.5", ["num_speculative_tokens must be a whole number", "got 2.5"]),
        ("draft_cost_ratio: [1]", ["draft_cost_ratio must be a number"]),
        ("draft_cost_ratio: null", ["draft_cost_ratio must be a number", "got None"]),
        ("temperature: 0.3", ["sets 'temperature'", "serving_temperature"]),
        ("gradient_accumulation_steps: 4", ["windows_per_forward"]),
        ("gradient_checkpointing: true", ["packed windows", "windows_per_forward"]),
        ("num_iterations: 2", ["sets 'num_iterations'", "one update per batch"]),
        ("proximity_epsilon: small", ["proximity_epsilon must be a number", "got 'small'"]),
        ("windows_per_forward: '2.5'", ["windows_per_forward must be a whole number", "got '2.5'"]),
        ("eval_steps: .inf", ["eval_steps must be a whole number", "got inf"]),
        ("keep_best: 'no'", ["keep_best must be true or false", "got 'no'"]),
    ],
)
def test_config_file(text, parts, tmp_path):
    with refused(*parts):
        read_config_file(write(tmp_path, text))


def test_config_files_that_cannot_be_read(tmp_path):
    with refused("not readable", "--config"):
        read_config_file(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xfa")
    with refused("not readable", "--config"):
        read_config_file(tmp_path / "binary.yaml")


def test_what_a_config_file_may_hold(tmp_path):
    assert read_config_file(write(tmp_path, "")) == {}
    text = "learning_rate: 3e-3\nnum_speculative_tokens: 4\nproximity_epsilon: null\nmax_grad_norm: 1\nobjective: exact"
    values = read_config_file(write(tmp_path, text))
    assert values["learning_rate"] == 0.003
    assert values["num_speculative_tokens"] == 4
    assert values["proximity_epsilon"] is None
    config = PPOWConfig(output_dir=str(tmp_path), use_cpu=True, **values)
    assert (config.objective, config.learning_rate) == ("exact", 0.003)


@pytest.mark.parametrize("others_change", [False, True])
def test_a_date_is_text_whatever_other_libraries_make_of_it(tmp_path, monkeypatch, others_change):
    # lm-format-enforcer, which vLLM imports, changes PyYAML's loader for the whole process.
    if others_change:
        dates = "tag:yaml.org,2002:timestamp"
        monkeypatch.setitem(yaml.SafeLoader.yaml_constructors, dates, lambda loader, node: "another's")
    assert read_config_file(write(tmp_path, "run_name: 2026-11-24")) == {"run_name": "2026-11-24"}


@pytest.mark.parametrize(
    ("options", "alpha"),
    [({"lora_rank": 16}, 32), ({"lora_rank": 256}, 512), ({"lora_rank": 16, "lora_alpha": 4}, 4)],
)
def test_alpha_is_twice_the_rank_unless_told(options, alpha, tmp_path):
    config = PPOWConfig(output_dir=str(tmp_path), use_cpu=True, **options)
    assert config.to_dict()["lora_alpha"] == alpha  # what a run records


def test_numbers_are_numbers_where_there_may_be_none(tmp_path):
    text = "proximity_epsilon: 5e-1\neval_steps: 1e1\nwindows_per_forward: '8'\nearly_stop_patience: null\ntop_p: '1'"
    values = read_config_file(write(tmp_path, text))
    wanted = {
        "proximity_epsilon": 0.5,
        "eval_steps": 10,
        "windows_per_forward": 8,
        "early_stop_patience": None,
    }
    assert values == wanted | {"top_p": 1.0}
    assert [type(value) for value in values.values()] == [float, int, int, type(None), float]


def test_keys_are_refused_by_their_source():
    with refused("the command line has the unknown key 'objektive'", "objective"):
        check_keys({"objektive": 1}, "the command line")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"windows_per_step": 100}, ["windows_per_step", "multiple of 16", "got 100"]),
        ({"windows_per_step": 0}, ["windows_per_step", "got 0"]),
        ({"trajectories_per_step": 3, "windows_per_step": 9}, ["multiple of 6", "even", "got 9"]),
        (
            {"objective": "ppow", "windows_per_step": 64},
            ["multiple of 128", "trajectories_per_step 16 × num_generations 8", "got 64"],
        ),
        ({"objective": "ppow", "num_generations": 1}, ["num_generations must be >= 2", "got 1"]),
        ({"trajectories_per_step": 0}, ["trajectories_per_step must be >= 1", "got 0"]),
        ({"num_speculative_tokens": 0}, ["num_speculative_tokens must be >= 1", "got 0"]),
        ({"continuations": 0}, ["continuations must be in 1..10000", "got 0"]),
        ({"continuations": 10**11}, ["continuations must be in 1..10000"]),
        ({"serving_temperature": -1.0}, ["serving_temperature must be >= 0", "got -1.0"]),
        ({"greedy_sampling_temperature": 0.0}, ["greedy_sampling_temperature must be > 0"]),
        ({"draft_cost_ratio": -0.1}, ["draft_cost_ratio must be >= 0"]),
        ({"adaptive_windows": "sometimes"}, ["adaptive_windows", "auto", "got 'sometimes'"]),
        ({"criticality": "lost"}, ["criticality", "lost_tokens", "got 'lost'"]),
        ({"criticality_refresh": 0}, ["criticality_refresh", "got 0"]),
        ({"uniform_share": 1.5}, ["uniform_share", "got 1.5"]),
        ({"adaptive_after": -0.5}, ["adaptive_after", "got -0.5"]),
        ({"proximity_quantile": 1.0}, ["proximity_quantile", "got 1.0"]),
        ({"proximity_weight": -1.0}, ["proximity_weight must be >= 0"]),
        ({"position_decay": 0.0}, ["position_decay", "got 0.0"]),
        ({"max_steps": 0}, ["max_steps must be in 1..10000000", "got 0"]),
        ({"max_steps": 10**22}, ["max_steps must be in 1..10000000"]),
        ({"lora_rank": 0}, ["lora_rank must be >= 1"]),
        ({"lora_targets": "q_proj"}, ["lora_targets must be a list", "q_proj"]),
        ({"survival_smoothing": 1.0}, ["survival_smoothing must be in [0, 1)", "got 1.0"]),
        ({"greedy_sharpness_temperature": 0.0}, ["greedy_sharpness_temperature must be > 0"]),
        (
            {"draft_sample_method": "tree"},
            ["draft_sample_method must be one of probabilistic, greedy", "'tree'"],
        ),
        ({"greedy_target": "firm"}, ["greedy_target must be one of soft, hard", "got 'firm'"]),
        ({"position_weights": "pace"}, ["position_weights must be one of decay, dpace", "got 'pace'"]),
        ({"ppow_credit": "all"}, ["ppow_credit must be one of published, acceptance", "got 'all'"]),
        (
            {"ppow_credit": "acceptance", "draft_sample_method": "greedy"},
            ["ppow_credit acceptance", "draft_sample_method is greedy", "objective exact"],
        ),
        ({"cost_reading": "both"}, ["cost_reading must be one of accepted, drafted", "got 'both'"]),
        ({"dpace_alpha": 0.0}, ["dpace_alpha must be in (0, 1]", "got 0.0"]),
        *(
            (
                {"position_weights": "dpace", "objective": name},
                ["dpace needs", "cst:ce and cst:tv", f"got objective '{name}'"],
            )
            for name in ("cst:nla", "exact", "ppow", "cst:tv + cst:kl_div")
        ),
        ({"objective": {"overlap": 1}}, ["objective must be text like", "overlap"]),
        ({"windows_per_forward": 0}, ["windows_per_forward must be >= 1", "got 0"]),
        ({"save_total_limit": 1}, ["save_total_limit must be >= 2", "got 1"]),
        ({"save_strategy": "epoch"}, ["save_strategy must be no or steps", "epoch"]),
        ({"report_to": "tensorbord"}, ["report_to must name none, all, or some of", "got 'tensorbord'"]),
        ({"report_to": ["clearml"]}, ["'clearml'", "not installed", "pip install"]),
        ({"objective": "exakt"}, ["objective must be one of", "exact", "got 'exakt'"]),
        ({"mask_truncated_completions": True}, ["mask_truncated_completions True does not fit", "drop it"]),
        ({"entropy_coef": 0.01}, ["entropy_coef 0.01 does not fit", "no gradient", "drop it"]),
        ({"use_adaptive_entropy": True}, ["use_adaptive_entropy True does not fit", "drop it"]),
        ({"seed": -1}, ["seed must be in 0..2^32 - 1", "got -1"]),
        ({"seed": 2**32}, ["seed must be in 0..2^32 - 1"]),
        ({"learning_rate": -1.0}, ["learning_rate must be > 0", "got -1.0"]),
        ({"learning_rate": float("nan")}, ["learning_rate must be > 0", "got nan"]),
        ({"logging_steps": 0}, ["logging_steps must be a whole number >= 1", "got 0"]),
        ({"logging_steps": 2.5}, ["logging_steps must be", "share of the run below 1", "got 2.5"]),
        ({"save_steps": 0}, ["save_steps must be", "got 0"]),
        ({"warmup_steps": -1}, ["warmup_steps must be >= 0", "got -1"]),
        ({"beta": -1.0}, ["beta must be >= 0", "got -1.0"]),
        ({"lora_alpha": 0}, ["lora_alpha must be >= 1", "got 0"]),
        ({"proximity_epsilon": -0.5}, ["proximity_epsilon must be >= 0", "got -0.5"]),
        ({"eval_strategy": "steps"}, ["eval_strategy steps does not fit", "--held-out", "eval_steps"]),
        ({"eval_on_start": True}, ["eval_on_start True does not fit"]),
        ({"load_best_model_at_end": True}, ["load_best_model_at_end", "keep_best"]),
        ({"save_only_model": True}, ["save_only_model True does not fit", "does not go on", "save_strategy"]),
        ({"ignore_data_skip": True}, ["ignore_data_skip True does not fit"]),
        ({"pad_to_multiple_of": 4}, ["pad_to_multiple_of 4 does not fit"]),
        ({"reward_weights": [1.0]}, ["reward_weights [1.0] does not fit", "proximity_weight"]),
        ({"top_p": 0.9}, ["top_p 0.9 does not fit", "drop it"]),
        ({"top_k": 5}, ["top_k 5 does not fit"]),
        ({"min_p": 0.1}, ["min_p 0.1 does not fit"]),
        ({"repetition_penalty": 1.1}, ["repetition_penalty 1.1 does not fit"]),
        ({"generation_kwargs": {"top_k": 5}}, ["generation_kwargs", "does not fit"]),
        ({"vllm_server_port": 1}, ["vllm_server_port 1 does not fit", "in this process"]),
        ({"num_train_epochs": 1.0}, ["num_train_epochs 1.0 does not fit", "max_steps"]),
        ({"lr_scheduler_type": "steep"}, ["TRL refuses these options", "steep", "change or drop"]),
        ({"auto_find_batch_size": True}, ["TRL refuses these options", "change or drop"]),
    ],
)
def test_options(options, parts, tmp_path):
    with refused(*(re.escape(part) for part in parts)):
        PPOWConfig(output_dir=str(tmp_path), use_cpu=True, **options)
