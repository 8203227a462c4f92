"""An exported drafter under vLLM's own method: the same drafts are accepted as with the adapter merged at start-up."""

from __future__ import annotations

import json

import pytest
from serving_engine import engine, expected, generate
from serving_pair import VOCAB, restoring_adapter

from ppow_train import cli
from vllm_ppow.compat.engine_args import serves_ppow
from vllm_ppow.metrics import SpecDecodeCounts

pytestmark = pytest.mark.engine


def serve(target, spec):
    with engine(target, spec) as llm:
        ours = serves_ppow(llm.llm_engine.vllm_config.speculative_config)
        before = SpecDecodeCounts.from_metrics(llm.get_metrics())
        output = generate(llm)
        return ours, output, SpecDecodeCounts.from_metrics(llm.get_metrics()) - before


@pytest.mark.parametrize("kind", ["eagle3", "causal_lm", "original"])
def test_the_same_drafts_are_accepted(pair, tmp_path, capsys, kind):
    spoiled, adapter = restoring_adapter(tmp_path / "a", kind, pair)
    options = ["--adapter", str(adapter.directory), "--output", str(tmp_path / "exported")]
    capsys.readouterr()
    assert cli.run(["export", *options]) == 0
    native = json.loads(capsys.readouterr().out)
    ours, output, counts = serve(
        pair.target, {"method": "ppow", "model": str(adapter.directory), "ppow": {"window": "fixed"}}
    )
    plain, exported_output, exported = serve(pair.target, native)
    assert (ours, plain) == (True, False)
    assert output == exported_output == expected(VOCAB)
    assert exported == counts
    assert counts.mean_accepted > 0.5
    bare = serve(pair.target, {**native, "model": str(spoiled)})[2]
    assert bare.mean_accepted < counts.mean_accepted, "the adapter makes no difference: the test cannot fail"
