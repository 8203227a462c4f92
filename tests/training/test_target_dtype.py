"""A target in bfloat16, as it is served: half the memory, the same windows within rounding, and the adapter says so."""

from __future__ import annotations

import pytest
import torch
from test_bad_input import refused
from training_lives import curve, train_into
from training_pair import VOCAB, K, load

from ppow_train.pair import load_pair, weight_bytes
from ppow_train.target import Target
from ppow_train.target_cache import cache_bytes
from ppow_train.types import Trajectories
from vllm_ppow.artifact import model_weight_files, read_adapter, safetensors_ranges


@pytest.fixture(scope="module")
def trajectories() -> Trajectories:
    generator = torch.Generator().manual_seed(6)
    ids = torch.randint(1, VOCAB, (8, 24), generator=generator)
    return Trajectories(ids, torch.full((8,), 3), torch.full((8,), 24))


@pytest.mark.parametrize("kind", ["eagle3", "causal_lm"])
def test_what_windows_see_is_float32_and_close(kind, directories, trajectories):
    full = load(directories, kind).target
    half = Target(directories.target, full.tap_layers, dtype="bfloat16")
    starts = torch.tensor([[4, 9, 15]] * len(trajectories))
    drafted = torch.randint(1, VOCAB, (len(trajectories), 3, K), generator=torch.Generator().manual_seed(1))
    assert half.model.dtype == torch.bfloat16
    assert cache_bytes(half, trajectories) * 2 == cache_bytes(full, trajectories)
    on_path, off_path = (
        [
            target.path_logits(target.encode(trajectories), starts, K),
            target.score(target.encode(trajectories), starts, drafted),
        ]
        for target in (full, half)
    )
    for exact, rounded in zip(on_path, off_path, strict=True):
        assert rounded.dtype == torch.float32
        assert not exact.equal(rounded)
        # bfloat16 has 8 bits of mantissa; the layers of a random model add up their errors.
        assert (exact - rounded).abs().mean() < 0.05 * exact.std()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("eagle3", {"objective": "cst:jsd"}),
        ("eagle3", {"objective": "cst:jsd", "target_cache": "disk"}),
        ("causal_lm", {"objective": "ppow"}),
    ],
)
def test_training_with_it_is_training_without_it(kind, options, directories, trajectories, tmp_path):
    for dtype in ("float32", "bfloat16"):
        train_into(
            tmp_path / dtype,
            directories,
            trajectories,
            kind=kind,
            cache=tmp_path / "cache",
            target_dtype=dtype,
            **options,
        )
        assert read_adapter(tmp_path / dtype / "adapter").config.training["target_dtype"] == dtype
    if options["objective"] != "ppow":  # whose drawn windows part at the first rounding
        full, half = (torch.tensor(curve(tmp_path / dtype)) for dtype in ("float32", "bfloat16"))
        torch.testing.assert_close(half, full, rtol=0.05, atol=1e-3)
        assert not half.equal(full)


def test_a_target_that_does_not_fit_is_refused_before_it_is_loaded(directories, monkeypatch):
    model = load(directories, "causal_lm").target.model
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert weight_bytes(directories.target, "float32") == 4 * weights
    assert weight_bytes(directories.target, "bfloat16") == 2 * weights
    stored = {"F32": 4, "BF16": 2}
    kinds = {
        kind.partition("[")[0]
        for file in model_weight_files(directories.target)
        for kind, _, _ in safetensors_ranges(file).values()
    }
    assert weight_bytes(directories.target, "auto") == stored[kinds.pop()] * weights

    names = str(directories.target), str(directories.drafter["causal_lm"])
    monkeypatch.setattr("ppow_train.pair.available_bytes", lambda device: 3 * weights)
    load_pair(*names, target_dtype="bfloat16")
    monkeypatch.setattr("ppow_train.pair.Target", None)
    with refused("The target's weights take .* free on cpu", "give --target-dtype bfloat16"):
        load_pair(*names)


def test_auto_is_float32_on_a_cpu_and_other_names_are_refused(directories, trajectories, tmp_path):
    drafter = str(directories.drafter["causal_lm"])
    assert load_pair(str(directories.target), drafter).target.model.dtype == torch.float32
    with refused("target_dtype must be one of auto, float32, bfloat16, float16"):
        train_into(tmp_path, directories, trajectories, target_dtype="int8")
