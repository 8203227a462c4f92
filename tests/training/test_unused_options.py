"""Options that change nothing are told, if they were given: by what objective, temperature or other option."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_training_command import command, values_of  # noqa: F401  (a fixture)

from ppow_train import unused_options as module
from ppow_train.objectives.choose import make_objective
from ppow_train.objectives.path_windows import PathWindows
from ppow_train.options import PPOWOptions
from ppow_train.unused_options import unused_options

# Not in any rule: used by every run.
ALWAYS = {
    "objective", "num_speculative_tokens", "trajectories_per_step", "windows_per_step", "windows_per_forward",
    "continuations", "serving_temperature", "draft_sample_method", "target_cache", "lora_rank", "lora_alpha",
    "lora_targets", "learning_rate", "max_steps", "warmup_steps", "eval_steps", "early_stop_patience", "push_to_hub",
    "logging_steps", "save_strategy", "report_to", "bf16", "target_dtype",
}  # fmt: skip


@pytest.mark.parametrize(
    ("objective", "unused"),
    [
        ("cst:jsd", ["draft_cost_ratio", "survival_smoothing", "beta"]),
        ("drafts", ["draft_cost_ratio", "beta", "position_decay"]),
        ("exact", ["survival_smoothing", "beta", "position_decay"]),
        ("overlap + 4 * cst:tv", ["survival_smoothing", "beta"]),
        ("drafts + exact + cst:tv", ["beta"]),
        ("ppow", ["survival_smoothing", "position_decay"]),
    ],
)
def test_options_that_an_objective_does_not_use(objective, unused):
    given = dict.fromkeys(
        ["draft_cost_ratio", "survival_smoothing", "beta", "position_decay", "max_steps", "lora_rank"], 1
    )
    assert unused_options({**given, "objective": objective}) == {f"by objective {objective}": unused}


HARD = {"serving_temperature": 0.0, "greedy_target": "hard"}
GREEDY = {"greedy_sampling_temperature": 0.5}
SHARP = {"greedy_sharpness_temperature": 0.2}
ADAPTIVE = {
    "criticality": "lost_tokens",
    "criticality_refresh": 5,
    "uniform_share": 0.1,
    "adaptive_after": 0.1,
}
NEAR = {"proximity_weight": 1.0, "proximity_quantile": 0.5, "proximity_epsilon": 2.0}


@pytest.mark.parametrize(
    ("given", "unused"),
    [
        # Greedy drafts and targets.
        ({"greedy_target": "hard"}, {"by objective cst:jsd": ["greedy_target"]}),
        (SHARP, {"by objective cst:jsd": ["greedy_sharpness_temperature"]}),
        (HARD | SHARP | {"objective": "ppow"}, {"by objective ppow": ["greedy_target", *SHARP]}),
        ({"objective": "exact", "greedy_target": "hard"}, {"at serving_temperature 1": ["greedy_target"]}),
        ({"objective": "exact"} | HARD | SHARP, {}),
        ({"objective": "drafts"} | SHARP, {"with draft_sample_method probabilistic": [*SHARP]}),
        ({"objective": "drafts", "draft_sample_method": "greedy"} | SHARP, {}),
        ({"objective": "drafts", "serving_temperature": 0.0} | SHARP, {"with greedy_target soft": [*SHARP]}),
        (GREEDY, {"at serving_temperature 1": [*GREEDY]}),
        (GREEDY | {"serving_temperature": 0.0}, {}),
        (GREEDY | HARD | {"objective": "overlap"}, {"with greedy_target hard": [*GREEDY]}),
        (GREEDY | HARD | {"objective": "overlap", "continuations": 2}, {}),
        (GREEDY | HARD | {"objective": "overlap", "adaptive_windows": "true"}, {}),
        (GREEDY | HARD | {"objective": "overlap + cst:tv"}, {}),
        # Windows by criticality.
        (ADAPTIVE, {"without adaptive_windows true": [*ADAPTIVE]}),
        (ADAPTIVE | {"objective": "ppow", "adaptive_windows": False}, {"without adaptive_windows true": [*ADAPTIVE]}),
        (ADAPTIVE | {"objective": "ppow"}, {}),
        (ADAPTIVE | {"adaptive_windows": True}, {}),
        ({"uniform_share": 1.0, "criticality_refresh": 2, "adaptive_windows": "true"},
         {"with uniform_share 1": ["criticality_refresh", "adaptive_windows"]}),
        ({"uniform_share": 0.5, "adaptive_after": 1.0, "objective": "ppow"},
         {"with adaptive_after 1 and max_steps 100": ["uniform_share"]}),
        # ppow's rewards.
        (NEAR | {"objective": "ppow", "ppow_credit": "acceptance"}, {"with ppow_credit acceptance": [*NEAR]}),
        ({"objective": "ppow", "proximity_weight": 0.0, "proximity_quantile": 0.5},
         {"with proximity_weight 0": ["proximity_quantile"]}),
        (NEAR | {"objective": "ppow"}, {"with proximity_epsilon": ["proximity_quantile"]}),
        # Weights of positions.
        ({"position_decay": 0.5, "position_weights": "dpace", "objective": "cst:tv"},
         {"with position_weights dpace": ["position_decay"]}),
        ({"dpace_alpha": 0.1, "position_decay": 0.5}, {"with position_weights decay": ["dpace_alpha"]}),
        # What is kept and where.
        ({"keep_best": False}, {"without eval_steps": ["keep_best"]}),
        ({"keep_best": False, "eval_steps": 5}, {}),
        ({"hub_model_id": "me/it", "hub_private_repo": False},
         {"without push_to_hub": ["hub_model_id", "hub_private_repo"]}),
        ({"hub_model_id": "me/it", "push_to_hub": True}, {}),
        ({"save_strategy": "no", "save_steps": 5}, {"with save_strategy no": ["save_steps"]}),
    ],
)  # fmt: skip
def test_options_that_another_one_leaves_nothing_to_do(given, unused):
    assert unused_options(given) == unused


def test_only_what_was_given_is_told():
    assert unused_options({}) == {}
    assert unused_options({"seed": 3, "weight_decay": 0.1}) == {}, "TRL's own"


def test_every_option_is_in_a_rule_or_used_by_every_run():
    options = PPOWOptions()
    rules = [
        *module._of_objective(options, set()),
        *module._of_temperature(options, set()),
        *module._of_others(options),
    ]
    ruled = {name for _, _, names in rules for name in names}
    assert ruled | ALWAYS == {option.name for option in dataclasses.fields(PPOWOptions)}
    assert ruled & ALWAYS == set()


@pytest.mark.parametrize("objective", ["exact", "overlap", "drafts"])
def test_a_hard_target_has_no_use_for_the_temperature_that_it_is_sampled_at(objective):
    logits = torch.randn(2, 6, 3, 9, generator=torch.Generator().manual_seed(0))
    tokens = torch.randint(9, (6, 3), generator=torch.Generator().manual_seed(1))

    def value(temperature: float, **more: Any) -> torch.Tensor:
        given = {
            "objective": objective,
            "greedy_sampling_temperature": temperature,
            "serving_temperature": 0.0,
        }
        windows = PathWindows(tokens, *(logits / temperature))
        return make_objective(PPOWOptions(**given, **more))(windows)

    assert value(0.7, greedy_target="hard").item() == pytest.approx(
        value(0.3, greedy_target="hard").item(), rel=1e-5
    )
    assert value(0.7).item() != pytest.approx(value(0.3).item(), rel=1e-3)


# ---------------------------------------------------------------- the command


def test_continuations_that_were_made_before_count(command, tmp_path, monkeypatch, capsys):  # noqa: F811
    """After the first, they were sampled at the temperature in question."""
    call = [
        *command[: command.index("--prompts")],
        "--data",
        str(tmp_path),
        "--output",
        str(tmp_path / "out"),
    ]
    call += ["--objective", "exact", "--serving-temperature", "0", "--greedy-target", "hard"]
    call += ["--greedy-sampling-temperature", "0.5"]
    for continuations, told in ((1, True), (8, False)):
        manifest = SimpleNamespace(facts={"continuations": continuations})
        monkeypatch.setattr("ppow_train.trajectory_store.read_manifest", lambda data, given=manifest: given)
        values_of(call, monkeypatch)
        assert ("not used with greedy_target hard" in capsys.readouterr().err) is told


def test_the_command_tells_each_reason_once(command, monkeypatch, capsys):  # noqa: F811
    given = ["--greedy-target", "hard", "--criticality", "lost_tokens", "--uniform-share", "0.5"]
    values_of([*command, *given, "--beta", "0.1"], monkeypatch)
    told = capsys.readouterr().err
    assert "greedy_target, beta are not used by objective cst:jsd.\n" in told
    assert "criticality, uniform_share are not used without adaptive_windows true.\n" in told
    values_of(command, monkeypatch)
    assert "not used" not in capsys.readouterr().err
