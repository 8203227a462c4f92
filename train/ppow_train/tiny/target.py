"""The tiny target: a Qwen3-architecture causal LM, and how it is trained (next token, whole text).

Eight layers, so that EAGLE-3's three default taps exist. Left out: drafters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import Qwen3Config

NUM_LAYERS = 8


def target_config(
    vocab_size: int, num_layers: int = NUM_LAYERS, hidden_size: int = 192, intermediate_size: int = 576
) -> Qwen3Config:
    """Qwen3 configuration of the tiny models; 2 KV heads, so that tensor parallelism of 2 works."""
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )


def sample_blocks(
    tokens: torch.Tensor, batch_size: int, length: int, generator: torch.Generator
) -> torch.Tensor:
    """Random blocks of a token stream.

    Args:
        tokens: int64 [N].

    Returns:
        int64 [batch_size, length].
    """
    starts = torch.randint(len(tokens) - length, (batch_size, 1), generator=generator)
    return tokens[starts + torch.arange(length)]


def train_language_model(
    model: Any,
    tokens: torch.Tensor,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    batch_size: int = 8,
    length: int = 256,
    report: Callable[[int, float], None] = lambda step, loss: None,
    loss_of: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> None:
    """Train a model in place: Muon for matrices, AdamW for the rest, warm-up of 3 %, cosine decay.

    Args:
        tokens: int64 [N], the text.
        steps: updates of `batch_size` × `length` tokens.
        report: called every 50 steps with the step and the mean loss since the last call.
        loss_of: batch int64 [B, L] -> scalar loss; by default next-token cross-entropy of `model`.
    """
    loss_of = loss_of or (lambda batch: model(input_ids=batch, labels=batch, use_cache=False).loss)
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizers = _optimizers(model, learning_rate)
    schedules = [_warmup_then_cosine(optimizer, steps) for optimizer in optimizers]
    model.train()
    running: list[float] = []
    for step in range(1, steps + 1):
        batch = sample_blocks(tokens, batch_size, length, generator)
        loss = loss_of(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        running.append(loss.item())
        if step % 50 == 0 or step == steps:
            report(step, sum(running) / len(running))
            running.clear()
    model.eval()


def _optimizers(model: torch.nn.Module, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon learns the hidden matrices of a small model in about half the tokens; the rest is AdamW's."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [
        p for name, p in named if p.ndim == 2 and not any(part in name for part in ("embed", "lm_head"))
    ]
    chosen = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=learning_rate * 2, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def _warmup_then_cosine(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    warmup = max(1, int(0.03 * steps))
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, 0.02, total_iters=warmup)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, max(1, steps - warmup), eta_min=optimizer.param_groups[0]["lr"] * 0.02
    )
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, fall], [warmup])
