"""The mended expansion of per-request values, and the question that finds the fault. Engines: e2e/test_distribution."""

import logging

import pytest
import torch

from vllm_ppow.compat import cpu_sampling, seams, worker


def test_expansion_equals_a_loop():
    values = torch.tensor([0.7, 0.0, 1.3, 0.2])
    counts = [3, 0, 2, 1]
    expected = [v if v else 1.0 for v, n in zip(values.tolist(), counts, strict=True) for _ in range(n)]
    cumulative = torch.tensor(counts).cumsum(0).int()
    got = cpu_sampling.expand_batch_to_tokens(values, cumulative, sum(counts), replace_from=0, replace_to=1)
    assert got.tolist() == pytest.approx(expected)
    assert got.dtype == values.dtype


def test_integers_stay_integers():
    got = cpu_sampling.expand_batch_to_tokens(
        torch.tensor([5, 9], dtype=torch.int32), torch.tensor([1, 3]), 3
    )
    assert got.tolist() == [5, 9, 9]
    assert got.dtype == torch.int32


def test_the_question_finds_a_dropped_output_and_a_truncated_one():
    def dropped(x, cu, n, **_):
        return torch.full((n,), 7.0)

    def truncated(x, cu, n, **kw):
        return cpu_sampling.expand_batch_to_tokens(x.long().float(), cu, n, **kw)

    assert cpu_sampling.is_lossy(dropped)
    assert cpu_sampling.is_lossy(truncated)
    assert not cpu_sampling.is_lossy(cpu_sampling.expand_batch_to_tokens)


def test_install_leaves_a_sound_sampler(monkeypatch):
    sampler = pytest.importorskip("vllm.v1.sample.rejection_sampler", reason="needs vLLM")
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("the fault is of CPU builds")
    monkeypatch.setattr(
        sampler, "expand_batch_to_tokens", lambda x, cu_num_tokens, num_tokens, **_: x.new_zeros(num_tokens)
    )
    assert cpu_sampling.install()
    assert not cpu_sampling.is_lossy(sampler.expand_batch_to_tokens)
    assert not cpu_sampling.install()


def test_top_k_alone_survives_a_step_without_drafts(monkeypatch):
    sampler = pytest.importorskip("vllm.v1.sample.rejection_sampler", reason="needs vLLM")
    from vllm.platforms import current_platform

    def stopping(logits, k, p):
        k.max()
        return logits.masked_fill(logits < 0, float("-inf"))

    assert cpu_sampling.stops_without_drafts(stopping)
    if not current_platform.is_cpu():
        pytest.skip("the fault is of CPU builds")
    # Sound already, so that only the other fault is asked after; vLLM's own needs what its workers set up.
    monkeypatch.setattr(sampler, "expand_batch_to_tokens", cpu_sampling.expand_batch_to_tokens)
    monkeypatch.setattr(sampler, "apply_top_k_top_p", stopping)
    assert cpu_sampling.install()
    assert not cpu_sampling.stops_without_drafts(sampler.apply_top_k_top_p)
    logits, k = torch.tensor([[1.0, -1.0]]), torch.tensor([1], dtype=torch.int32)
    assert sampler.apply_top_k_top_p(logits, k, None).tolist() == [[1.0, float("-inf")]]
    assert not cpu_sampling.install()


@pytest.mark.parametrize("ours", [True, False])
def test_a_seam_that_is_gone_stops_method_ppow_only(monkeypatch, caplog, ours):
    def missing():
        raise seams.missing("module", "Class", "method", "not there")

    monkeypatch.setattr(worker.cpu_sampling, "install", missing)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    if ours:
        with pytest.raises(seams.SeamMissingError):
            worker._mend_sampling(ours=True)
    else:
        worker._mend_sampling(ours=False)
        assert "was not looked for" in caplog.text
