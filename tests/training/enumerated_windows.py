"""Enumerable windows (enumeration.py) in the form that the code under test takes, averaged over all target paths.

Left out: the oracle itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from enumeration import Tables

from ppow_train.objectives.path_windows import PathWindows
from ppow_train.vocabulary import FULL_VOCABULARY, DraftVocabulary, reduced_vocabulary

# V, K, seed, tokens that can be drafted
CASES = [(3, 3, 0, None), (4, 2, 1, None), (3, 2, 2, None), (4, 3, 3, (2, 0)), (5, 2, 4, (1, 4, 2))]
CASE_NAMES = ["V{}-K{}-seed{}-drafts{}".format(*case) for case in CASES]


def vocabulary_of(tables: Tables) -> DraftVocabulary:
    if tables.draftable is None:
        return FULL_VOCABULARY
    return reduced_vocabulary(torch.tensor(tables.draftable), tables.vocab_size)


def windows_on(tables: Tables, path: tuple[int, ...]) -> PathWindows:
    """One window, as `WindowRunner.path_windows` makes it."""
    target, draft = tables.along(path)
    vocabulary = vocabulary_of(tables)
    return PathWindows(
        vocabulary.columns(torch.tensor([path])),
        vocabulary.with_rest(target[None]),
        vocabulary.with_empty_rest(draft[None]),
        has_rest=vocabulary.is_reduced,
    )


def over_target_paths(tables: Tables, value_of: Callable[[PathWindows], torch.Tensor]) -> torch.Tensor:
    """Expectation of a function of a `PathWindows` of one window over all target paths."""
    terms = []
    for path in tables.paths():
        p, _ = tables.chances(path)
        terms.append(p.prod() * value_of(windows_on(tables, path)))
    return torch.stack(terms).sum(0)
