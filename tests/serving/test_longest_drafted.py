"""When a step near max_model_len still drafts. Left out: in engines (tests/e2e/test_draft_room.py)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from vllm_ppow.compat import draft_room

MAX_MODEL_LEN, NUM_SPECULATIVE_TOKENS = 40, 6


def runner(is_draft_model: bool, parallel: bool) -> SimpleNamespace:
    speculative = SimpleNamespace(
        uses_draft_model=lambda: is_draft_model,
        parallel_drafting=parallel,
        num_speculative_tokens=NUM_SPECULATIVE_TOKENS,
        draft_model_config=SimpleNamespace(max_model_len=MAX_MODEL_LEN),
    )
    return SimpleNamespace(
        speculative_config=speculative,
        effective_drafter_max_model_len=MAX_MODEL_LEN,
        max_model_len=MAX_MODEL_LEN,
        device=None,
    )


@pytest.fixture(autouse=True)
def ours(monkeypatch):
    monkeypatch.setattr(draft_room, "serves_ppow", lambda config: True)
    monkeypatch.setattr(draft_room, "clamps", lambda device: True)
    monkeypatch.setattr(draft_room, "_can_install", lambda: True)


@pytest.mark.parametrize(
    ("is_draft_model", "parallel", "longest"),
    [
        (False, False, MAX_MODEL_LEN),
        (True, False, MAX_MODEL_LEN - 1),
        # One pass reads K tokens behind the last: vLLM's own rule, or they would lie beyond its position table.
        (True, True, MAX_MODEL_LEN - NUM_SPECULATIVE_TOKENS),
        (False, True, MAX_MODEL_LEN - NUM_SPECULATIVE_TOKENS),
    ],
)
def test_the_longest_request_with_which_a_step_drafts(is_draft_model, parallel, longest):
    asked = draft_room._asking_for_the_first_pass_only(
        lambda self, metadata: metadata.max_seq_len + NUM_SPECULATIVE_TOKENS <= MAX_MODEL_LEN
    )
    made = runner(is_draft_model, parallel)
    fits = [n for n in range(1, MAX_MODEL_LEN + 9) if asked(made, SimpleNamespace(max_seq_len=n))]
    assert max(fits) == longest
    config = SimpleNamespace(
        speculative_config=made.speculative_config,
        model_config=SimpleNamespace(max_model_len=MAX_MODEL_LEN),
        use_v2_model_runner=False,
    )
    assert draft_room.longest_drafted(config) == longest
