"""The cost profile measured in real vLLM: inside this process, and by the command `ppow profile`."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ppow_train import profiling
from ppow_train.errors import UserError
from ppow_train.profiling import ProfileOptions, measure_steps
from vllm_ppow.cost_profile import parse_profile, read_cost_profile
from vllm_ppow.metrics import SpecDecodeCounts

REPOSITORY = Path(__file__).parents[2]
TINY = REPOSITORY / "examples" / "tiny"
OPTIONS = ProfileOptions((1, 4), (16, 96), (0, 1, 2, 4), steps=4, rounds=3, max_tokens=32)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """On the tiny pair's EAGLE-3 head, with deltas too small to matter."""
    import torch
    from serving_pair import random_lora, save_adapter

    from ppow_train.drafters import load_drafter

    drafter = load_drafter(TINY / "eagle3", dtype=torch.bfloat16, target=TINY / "target")
    model = random_lora(drafter.model, 1e-3)
    directory = tmp_path_factory.mktemp("profile") / "adapter"
    return save_adapter(
        directory, model, "eagle3", TINY / "eagle3", TINY / "target", num_speculative_tokens=4
    )


@pytest.fixture(scope="module")
def llm(adapter):
    from serving_engine import engine

    from ppow_train.profile_engine import measured_spec

    with engine(
        TINY / "target",
        measured_spec(adapter, TINY / "eagle3", OPTIONS),
        max_model_len=OPTIONS.max_model_len,
        enable_prefix_caching=False,
    ) as started:
        yield started


@pytest.fixture(scope="module")
def prompts():
    from transformers import AutoTokenizer

    lines = (TINY / "prompts" / "tests_held_out.jsonl").read_text("utf-8").splitlines()[:8]
    return AutoTokenizer.from_pretrained(TINY / "target")([json.loads(line)["prompt"] for line in lines])[
        "input_ids"
    ]


@pytest.fixture(scope="module")
def measured(llm, adapter, prompts):
    from ppow_train.profile_engine import run

    return run(llm, adapter, OPTIONS, prompts)


@pytest.mark.engine
def test_figures_are_plausible(measured, adapter):
    profile = measured.profile
    assert profile.adapter_fingerprint == adapter.config.adapter_fingerprint
    assert (profile.dtype, profile.tensor_parallel_size, profile.enforce_eager) == ("bfloat16", 1, True)
    assert 0 <= measured.spread <= measured.worst_spread
    for context, batch in itertools.product(range(2), range(2)):
        target = profile.target_step_seconds[context][batch]
        drafts = profile.draft_seconds[context][batch]
        assert min(target) > 0
        assert min(drafts) > 0  # at length 0 the drafter still reads what was verified
        assert drafts[3] > drafts[2] > drafts[1]  # 4, 2 and 1 tokens
    for batch in (1, 4):
        assert 0 < profile.draft_cost_ratio(batch) < 1  # one layer against eight
        assert profile.token_cost_ratio(batch, 4) > 0
    # 20 tokens against one; layers of this size are mostly overhead, and the machine may be busy.
    assert profile.target_step_seconds[1][1][3] > 0.8 * profile.target_step_seconds[0][0][0]


@pytest.mark.engine
def test_acceptance_is_what_vllm_counts(measured, llm, prompts):
    """The same prompts once more, with nobody steering: greedy, so the counters must repeat."""
    from vllm import SamplingParams

    before = SpecDecodeCounts.from_metrics(llm.get_metrics())
    sampling = SamplingParams(temperature=0.0, max_tokens=OPTIONS.max_tokens, detokenize=False)
    lookup = llm.llm_engine.engine_core.engine_core.scheduler.dynamic_sd_lookup
    was, lookup[:] = list(lookup), [4] * len(lookup)
    try:
        llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
    finally:
        lookup[:] = was
    counts = SpecDecodeCounts.from_metrics(llm.get_metrics()) - before
    assert counts.num_drafts == measured.profile.num_drafts > 50
    assert counts.acceptance_per_position == measured.profile.acceptance_per_position
    assert counts.acceptance_per_position[0] > 0.3


@pytest.mark.engine
def test_every_step_counted_was_the_one_asked_for(llm, prompts):
    """Each pass verifies as many tokens as it was told to, of every request; nothing of it is left afterwards."""
    from vllm_ppow.compat.profiling import StepProfiler

    core = llm.llm_engine.engine_core.engine_core
    runner = llm.collective_rpc(lambda worker: type(worker.model_runner))[0]
    before = type(core.scheduler), core.step_fn
    options = ProfileOptions((2,), (16,), (0, 3), steps=3, rounds=2)
    with StepProfiler(llm, 3) as profiler:
        samples = measure_steps(llm, profiler, options, prompts).samples
        as_often = 2 * profiling._MOST_TURNS * 3  # rounds, turns that are short, steps
        assert {point: len(found.step) for point, found in samples.items()} == {
            (16, 2, 0): as_often,
            (16, 2, 3): as_often,
        }
        assert type(core.scheduler) is not before[0]
    assert (type(core.scheduler), core.step_fn) == before
    assert llm.collective_rpc(lambda worker: type(worker.model_runner))[0] is runner


@pytest.mark.engine
def test_a_batch_that_cannot_run_together_is_refused(llm, prompts):
    from vllm_ppow.compat.profiling import StepProfiler

    options = ProfileOptions((8,), (16,), (0, 1), steps=1, rounds=1)  # the engine takes 4
    with (
        StepProfiler(llm, 1) as profiler,
        pytest.raises(UserError, match=r"8 requests with 16 tokens .* never decoded together"),
    ):
        measure_steps(llm, profiler, options, prompts)
    llm.llm_engine.abort_request(list(llm.llm_engine.output_processor.request_states))


@pytest.mark.slow
def test_the_command_stores_a_profile_beside_the_adapter(adapter, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    lines = (TINY / "prompts" / "tests_held_out.jsonl").read_text("utf-8").splitlines()
    prompts.write_text("\n".join(lines[:4]), "utf-8")
    command = [sys.executable, "-m", "ppow_train.cli", "profile", "--adapter", str(adapter.directory)]
    command += ["--prompts", str(prompts), "--eager", "--batch-sizes", "2,1", "--context-lengths", "16"]
    command += ["--num-speculative-tokens", "2", "--steps", "2", "--rounds", "1", "--max-tokens", "16"]
    done = subprocess.run(
        [*command, "--json"],
        cwd=REPOSITORY,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    value = json.loads(done.stdout)
    profile = read_cost_profile(adapter.directory)
    assert profile is not None
    assert parse_profile(value["profile"]) == profile
    assert (profile.batch_sizes, profile.draft_lengths) == ((1, 2), (0, 1, 2))
    assert profile.num_drafts > 0
    rows = value["by_batch_size"]
    assert [row["batch_size"] for row in rows] == [1, 2]
    for row in rows:
        assert len(row["expected_speedup"]) == 3
        assert row["draft_cost_ratio"] == profile.draft_cost_ratio(row["batch_size"])
    assert "best K" in done.stderr
    assert "warm-up: 2 requests" in done.stderr
