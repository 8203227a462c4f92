"""Parts of an update against all of it read whole and at once: values, gradients, order, and what is not computed."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from training_pair import KINDS, K, load

from ppow_train import rollout
from ppow_train.last_layer import feed_forward_at, read_slots
from ppow_train.packed_rows import in_rows, pack_in_parts
from ppow_train.rollout import WindowRunner
from ppow_train.target import Target
from ppow_train.types import Reading

TRAJECTORY = torch.tensor([2, 0, 2, 1, 0, 2, 2])
START = torch.tensor([3, 16, 2, 7, 5, 7, 2])
POSITIONS = [1, 20, math.inf]  # three parts, two, one


@pytest.mark.parametrize(("positions", "count"), [(1, 3), (20, 2), (math.inf, 1)])
def test_parts_are_cut_and_put_together_again(positions, count, trajectories):
    parts = pack_in_parts(trajectories, TRAJECTORY, START, K, positions)
    assert len(parts) == count
    assert torch.cat([part.rows for part in parts]).sort().values.tolist() == list(range(7))
    for part in parts:
        assert part.trajectories.input_ids.shape[1] == part.starts.max() + K, "nothing behind the last window"
        assert part.pack(TRAJECTORY).equal(part.ids[:, None].expand_as(part.starts))
        assert part.pack(START).equal(part.starts)
        assert part.trajectories.input_ids.equal(
            trajectories.input_ids[part.ids, : part.trajectories.input_ids.shape[1]]
        )
    lengths = [int(part.starts.max()) for part in parts]
    assert lengths == sorted(lengths)
    for values in (START, torch.randn(7, 2, 3)):
        assert in_rows(parts, [part.pack(values) for part in parts]).equal(values)


def test_rows_in_order_are_not_copied(trajectories):
    parts = pack_in_parts(trajectories, torch.tensor([0, 0, 1, 1]), torch.tensor([5, 6, 5, 6]), K, math.inf)
    values = torch.randn(2, 2, K)
    assert in_rows(parts, [values]).data_ptr() == values.data_ptr()


def test_each_start_once(trajectories):
    (part,) = pack_in_parts(trajectories, TRAJECTORY, START, K, math.inf)
    distinct, column = part.distinct()
    assert sorted(in_rows([distinct], [distinct.starts]).tolist()) == [2, 3, 5, 7, 7, 16]
    assert distinct.starts.gather(1, column).equal(part.starts)


def with_lora(directories, kind, trajectories, plain: bool) -> WindowRunner:
    pair = load(directories, kind)
    inject_adapter_in_model(LoraConfig(r=4, target_modules=pair.drafter.lora_targets), pair.drafter.model)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in pair.drafter.model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        parameter.requires_grad_("lora_" in name)
    return WindowRunner(pair.target, pair.drafter, trajectories, K, 0.7, plain=plain)


def outcome(runner: WindowRunner) -> dict[str, torch.Tensor]:
    noise = runner.draw_noise(len(START), torch.Generator().manual_seed(0))
    drafted = runner.roll_out(TRAJECTORY, START, noise)
    weights = [p for p in runner.drafter.model.parameters() if p.requires_grad]
    logps, entropies = runner.draft_logps(TRAJECTORY, START, drafted.tokens)
    windows = runner.path_windows(TRAJECTORY, START)
    finite = windows.draft_logits[..., :-1]  # the last column may be one that is never drafted
    gradients = {
        f"gradient of {name}": torch.cat([g.flatten() for g in torch.autograd.grad(of, weights)])
        for name, of in (("logps", logps.mean()), ("path", finite.log_softmax(-1).square().mean()))
    }
    values = {field: getattr(drafted, field) for field in drafted.__dataclass_fields__}
    path = {"path p": windows.target_logits, "path q": finite, "path tokens": windows.tokens}
    return {**values, "logps": logps, "entropies": entropies, **path, **gradients}


@pytest.mark.parametrize("kind", KINDS)
def test_parts_give_what_whole_trajectories_give(kind, directories, trajectories, monkeypatch):
    wanted = outcome(with_lora(directories, kind, trajectories, plain=True))
    for positions in POSITIONS:
        monkeypatch.setattr(rollout, "POSITIONS_AT_ONCE", positions)
        seen = outcome(with_lora(directories, kind, trajectories, plain=False))
        for name, values in wanted.items():
            if name.startswith("gradient"):
                assert values.norm() > 0
                assert (seen[name] - values).norm() < 1e-4 * values.norm(), name
            else:
                torch.testing.assert_close(seen[name], values, atol=1e-3, rtol=1e-4)


def test_only_what_is_read_goes_through_the_last_feed_forward(directories, trajectories):
    target = load(directories, "causal_lm").target
    read = read_slots(torch.tensor([[4, 4, 6], [3, 9, 3], [2, 2, 2]]), 2, trajectories.input_ids.shape[1])
    assert read.sum(-1).tolist() == [4, 4, 2]
    whole = target.encode(trajectories).hidden
    seen = []
    layer = target.model.base_model.layers[-1].mlp.gate_proj
    hook = layer.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[:-1].numel()))
    target.forget()
    part = target.encode_parts([Reading(trajectories, read)])[0].hidden
    hook.remove()
    assert seen == [10]
    torch.testing.assert_close(part[read], whole[read], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(part[~read], whole[~read], atol=1e-2), "what is not read is not right"
    target.forget()
    assert target.encode(trajectories).hidden.equal(whole), "undone afterwards"


def test_a_layer_that_returns_more_is_left_as_it_is():
    class Experts(torch.nn.Module):
        def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
            return 2 * hidden, None

    layer = torch.nn.Module()
    layer.mlp = Experts()
    hidden = torch.ones(1, 3, 2)
    with feed_forward_at(layer, torch.tensor([[True, False, False]])):
        assert layer.mlp(hidden)[0].equal(2 * hidden)
    with feed_forward_at(torch.nn.Linear(2, 2), torch.tensor([[True]])):
        pass  # no such part


def test_what_criticality_had_read_is_not_read_again(runner, trajectories, monkeypatch):
    trajectory, start = torch.tensor([0, 2]), torch.tensor([6, 4])
    runner.criticality(trajectory)
    monkeypatch.setattr("ppow_train.causal.encode", lambda *_, **__: pytest.fail("read again"))
    assert runner.target.remembers([runner._reading(part) for part in runner._parts(trajectory, start)])
    assert isinstance(runner.target, Target)
    runner.read_target(trajectory, start)
