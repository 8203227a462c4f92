"""Which KL the penalty of ppow is: the gradient of TRL's own loss, summed over every token that may be drafted.

Left out: along a window, whose later tokens' prefixes are taken as they come.
"""

from __future__ import annotations

import pytest
import torch
from training_pair import K, load

from ppow_train.config import PPOWConfig
from ppow_train.generation import load_tokenizer
from ppow_train.rollout import WindowRunner
from ppow_train.trainer import PPOWTrainer

BETA = 0.5
DRAFTED = torch.tensor([4, 0, 2])


@pytest.fixture(scope="module")
def trainer(directories, trajectories, tmp_path_factory):
    config = PPOWConfig(
        objective="ppow",
        num_speculative_tokens=K,
        max_steps=1,
        beta=BETA,
        use_cpu=True,
        use_bias_correction_kl=False,  # whoever sets it gets the KL that is documented
        output_dir=str(tmp_path_factory.mktemp("kl") / "out"),
    )
    pair = load(directories, "causal_lm")
    runner = WindowRunner(pair.target, pair.drafter, trajectories, K, 1.0)
    trainer = PPOWTrainer(runner, config, load_tokenizer(directories.target))
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


@pytest.mark.parametrize("ids", [torch.arange(6), DRAFTED], ids=["full vocabulary", "reduced vocabulary"])
def test_the_penalty_has_the_gradient_of_kl_from_drafter_to_target(ids, trainer, monkeypatch):
    """Of KL(q ‖ p), p renormalised on what can be drafted; the two other candidates are far away."""
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(6, generator=generator).mul(2).log_softmax(-1)[ids]
    logits = torch.randn(len(ids), generator=generator).mul(2).requires_grad_()
    expected = torch.zeros(len(ids))
    for column in range(len(ids)):
        q = logits.log_softmax(-1)
        drafted = q[column].expand(1, K)
        monkeypatch.setattr(
            trainer,
            "_get_per_token_logps_and_entropies",
            lambda *args, drafted=drafted, **kwargs: (drafted, torch.zeros(1, K), None),
        )
        loss = trainer._compute_loss(trainer.model, penalty_alone(p[column]))
        (gradient,) = torch.autograd.grad(loss, logits)
        expected += q[column].exp().detach() * gradient / BETA
    q, renormalised = logits.log_softmax(-1), p.log_softmax(-1)
    (ours,) = torch.autograd.grad((q.exp() * (q - renormalised)).sum(), logits, retain_graph=True)
    torch.testing.assert_close(expected, ours)
    for scale in (1.0, float(p.exp().sum())):
        (other,) = torch.autograd.grad(-scale * (renormalised.exp() * q).sum(), logits, retain_graph=True)
        assert (other - ours).abs().max() > 0.05


def penalty_alone(target_logp: torch.Tensor) -> dict[str, torch.Tensor]:
    """One window of K like tokens that have earned nothing."""
    ones = torch.ones(1, K, dtype=torch.long)
    return {
        "prompt_ids": torch.zeros(1, 2, dtype=torch.long),
        "prompt_mask": torch.ones(1, 2, dtype=torch.long),
        "completion_ids": ones,
        "completion_mask": ones,
        "advantages": torch.zeros(1),
        "ref_per_token_logps": target_logp.expand(1, K),
    }
