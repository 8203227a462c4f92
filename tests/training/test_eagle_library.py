"""Our EAGLE-3 windows against the `speculators` library's own training forward: slots, positions, states, logits.

The library starts a chain at every position of a document and feeds the document's own tokens back. Its loss is
therefore ours over the windows at every start. Left out: its packed batches of several documents.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from speculators.losses import resolve_loss_config
from training_pair import VOCAB, build_eagle3, load

from ppow_train.drafters import load_drafter
from ppow_train.target import Target
from ppow_train.types import Trajectories

STEPS = 3


@pytest.fixture(scope="module", params=["eagle3", "eagle31", "norm_before_fc"])
def pair(request, directories, tmp_path_factory):
    if request.param in directories.drafter:
        loaded = load(directories, request.param)
        return loaded.target, loaded.drafter
    out = tmp_path_factory.mktemp("head")
    build_eagle3(out, directories.target, seed=8, norm_before_residual=True, norm_before_fc=True)
    drafter = load_drafter(out)
    return Target(directories.target, drafter.tap_layers), drafter


def library_loss(target: Target, head: Any, ids: torch.Tensor) -> torch.Tensor:
    """KL summed over three teacher-forced steps, each a mean over slots, by the library's `forward`."""
    seen: list[torch.Tensor] = []
    final_norm = target.model.base_model.norm
    hook = final_norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        states = target.model(input_ids=ids, output_hidden_states=True).hidden_states
    hook.remove()
    # What only this forward reads, and a head that is read here lacks.
    head.verifier_lm_head, head.verifier_norm = copy.deepcopy((target.model.lm_head, final_norm))
    taps = torch.cat([states[i] for i in target.tap_layers], dim=-1)
    _, loss, _ = head(  # as the library's `shift_batch` pairs them: x1 with g0 and y1
        hidden_states=taps[:, :-1],
        input_ids=ids[:, 1:],
        document_ids=torch.zeros_like(ids[:, 1:]),
        verifier_last_hidden_states=seen[0][:, 1:],
        position_ids=torch.arange(1, ids.shape[1])[None],
        ttt_steps=STEPS,
        loss_config=resolve_loss_config("kl_div", "eager"),
    )
    return loss


def our_loss(target: Target, drafter: Any, ids: torch.Tensor, first_slot: int | None = None) -> torch.Tensor:
    """The same from windows at every start; a window's steps beyond the document's end do not count."""
    length = ids.shape[1]
    padded = torch.cat([ids, ids.new_zeros(1, STEPS)], dim=1)
    trajectories = Trajectories(padded, torch.tensor([1]), torch.tensor([length]))
    starts = torch.arange(2, length + 1)[None]
    encoded = target.encode(trajectories)
    draft = drafter.encode(trajectories, encoded)
    if first_slot is not None:
        draft = dataclasses.replace(draft, first_slot=first_slot)
    p = target.path_logits(encoded, starts, STEPS).log_softmax(-1)
    q = drafter.path_logits(draft, trajectories, starts, STEPS).log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1)[0]
    return sum(divergence[starts[0] + step <= length, step].mean() for step in range(STEPS))


def test_loss_and_gradients_are_the_librarys(pair):
    target, drafter = pair
    ids = torch.randint(1, VOCAB, (1, 12), generator=torch.Generator().manual_seed(3))
    weights = [drafter.model.fc.weight, drafter.model.layers[0].self_attn.k_proj.weight]
    for weight in weights:
        weight.requires_grad_(True)
    ours, theirs = our_loss(target, drafter, ids), library_loss(target, drafter.model, ids)
    assert ours.item() > 0.5
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    gradients = zip(torch.autograd.grad(ours, weights), torch.autograd.grad(theirs, weights), strict=True)
    for one, other in gradients:
        scale = other.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(one, other, atol=1e-3 * scale, rtol=0)


def test_the_comparison_notices_a_slot_too_many(pair):
    target, drafter = pair
    ids = torch.randint(1, VOCAB, (1, 12), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        ours = our_loss(target, drafter, ids[:, 1:], first_slot=1)
        assert (ours - library_loss(target, drafter.model, ids[:, 1:])).abs() > 1e-3
