"""Reduced draft vocabularies: the columns that acceptance maths sees, against logits over all of the target's tokens.

That acceptance, rewards and their gradients are right on a reduced vocabulary is shown by enumeration in
test_verification.py, that the losses are, in test_objectives.py.
"""

from __future__ import annotations

import pytest
import torch

from ppow_train.objectives.path_windows import PathWindows
from ppow_train.objectives.window import exact, overlap_window
from ppow_train.verification import overlap, token_logps
from ppow_train.vocabulary import FULL_VOCABULARY, reduced_vocabulary

IDS = torch.tensor([7, 1, 4, 10])
VOCAB = 12


def logits(columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 3, columns, generator=generator, dtype=torch.float64) * 2


def test_with_the_full_vocabulary_nothing_is_computed():
    """Every number is then what it was without this module, bit for bit."""
    values, tokens = logits(VOCAB, 0), torch.randint(VOCAB, (6, 3))
    for same in (FULL_VOCABULARY.with_rest, FULL_VOCABULARY.with_empty_rest, FULL_VOCABULARY.renormalised):
        assert same(values) is values
    assert FULL_VOCABULARY.columns(tokens) is tokens
    assert FULL_VOCABULARY.to_target(tokens) is tokens
    assert not FULL_VOCABULARY.is_reduced
    windows = PathWindows(tokens, values, values)
    assert windows.without_rest() is windows


def test_columns_and_target_ids():
    vocabulary = reduced_vocabulary(IDS, VOCAB)
    assert vocabulary.to_target(torch.tensor([[3, 0]])).tolist() == [[10, 7]]
    assert vocabulary.columns(torch.tensor([[10, 0], [1, 11]])).tolist() == [[3, 4], [1, 4]]
    assert vocabulary.columns(vocabulary.to_target(torch.arange(4))).tolist() == [0, 1, 2, 3]


def test_target_over_draft_columns_is_unnormalised_and_its_rest_is_the_rest():
    target = logits(VOCAB, 0)
    p = reduced_vocabulary(IDS, VOCAB).with_rest(target).softmax(-1)
    torch.testing.assert_close(p[..., :-1], target.softmax(-1)[..., IDS])
    torch.testing.assert_close(p[..., -1], 1 - target.softmax(-1)[..., IDS].sum(-1))


def test_renormalised():
    target = logits(VOCAB, 0)
    inside = target.softmax(-1)[..., IDS]
    ours = reduced_vocabulary(IDS, VOCAB).renormalised(target.log_softmax(-1))
    torch.testing.assert_close(ours.exp(), inside / inside.sum(-1, keepdim=True))


@pytest.mark.parametrize("objective", [exact, overlap_window])
def test_a_reduced_head_is_a_full_one_that_never_drafts_the_rest(objective):
    """Same value and gradient as logits over all tokens, so low outside the draft vocabulary that q is zero there."""
    vocabulary = reduced_vocabulary(IDS, VOCAB)
    target, draft = logits(VOCAB, 0), logits(len(IDS), 1).requires_grad_()
    full = torch.full((6, 3, VOCAB), -1e4, dtype=torch.float64).index_copy(-1, IDS, draft)
    tokens = torch.randint(VOCAB, (6, 3), generator=torch.Generator().manual_seed(2))
    assert torch.isin(tokens, IDS).any()
    assert not torch.isin(tokens, IDS).all()
    reduced = PathWindows(
        vocabulary.columns(tokens), vocabulary.with_rest(target), vocabulary.with_empty_rest(draft), True
    )
    torch.testing.assert_close(overlap(reduced.target_logits, reduced.draft_logits), overlap(target, full))
    kept = torch.isin(tokens, IDS)
    ours = token_logps(reduced.target_logits, reduced.tokens)
    torch.testing.assert_close(ours[kept], token_logps(target, tokens)[kept])
    one, other = objective(reduced, 0.1), objective(PathWindows(tokens, target, full), 0.1)
    torch.testing.assert_close(one, other)
    (gradient,), (wanted,) = torch.autograd.grad(one, draft), torch.autograd.grad(other, draft)
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(gradient, wanted)


def test_all_tokens_are_no_reduced_vocabulary():
    with pytest.raises(ValueError, match="no reduced vocabulary"):
        reduced_vocabulary(torch.arange(VOCAB), VOCAB)
