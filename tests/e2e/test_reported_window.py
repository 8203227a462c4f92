"""The window's counts leave a real engine: what is reported is what the scheduler counted, and nothing stays behind."""

from __future__ import annotations

import pytest
from serving_engine import engine, generate
from serving_pair import restoring_adapter

from vllm_ppow.metrics import SpecDecodeCounts
from vllm_ppow.window_report import begin_report, read_report, report_path

pytestmark = [pytest.mark.engine]

K = 3


def test_an_engine_reports_what_vllm_counts(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", str(tmp_path))
    monkeypatch.setattr("vllm_ppow.window_report.INTERVAL_S", 0.0)
    adapter = restoring_adapter(tmp_path, "causal_lm", pair)[1].directory
    spec = {"method": "ppow", "model": str(adapter), "num_speculative_tokens": K}
    with engine(pair.target, spec) as llm:
        path = report_path(llm.llm_engine.vllm_config, 0)
        assert not path.exists(), "nobody reads"
        begin_report(path)
        generate(llm)
        counts = SpecDecodeCounts.from_metrics(llm.get_metrics())
        report = read_report(path)
    assert report is not None
    assert report["drafts"] == counts.num_drafts > 0
    assert report["drafted"] == counts.num_draft_tokens
    assert report["accepted"] == counts.num_accepted_tokens
    assert len(report["chosen"]) == K + 1
    assert "step" in report["layers"]
    assert report["speedup"] > 0
    assert not path.exists(), "the report goes with the engine"
