"""The tiny drafters, supervised on the known domain only: an EAGLE-3 head and a small causal LM.

Both learn the target's distribution along real text with speculators' KL loss; the head on whole windows, because that
is how it will draft. Left out: reinforcement learning; the point of the tiny pair is to leave it something to do.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ppow_train.drafters import Drafter, load_drafter
from ppow_train.objectives.path_windows import PathWindows
from ppow_train.objectives.supervised import continued_supervised
from ppow_train.packing import window_tokens
from ppow_train.target import Target
from ppow_train.tiny.recipe import Say, TinyRecipe
from ppow_train.tiny.target import target_config, train_language_model
from ppow_train.tiny.text import SourceFile
from ppow_train.types import Trajectories

_WINDOW, _WINDOWS_PER_BLOCK = 5, 48
TAP_LAYERS = (2, 4, 5)  # vLLM's default for 8 layers: 2, n // 2, n − 3


def build_eagle3(
    out: Path, target_dir: Path, known: Sequence[SourceFile], recipe: TinyRecipe, say: Say
) -> None:
    """Train the EAGLE-3 head and save it in speculators format."""
    from speculators.models.eagle3 import Eagle3DraftModel

    torch.manual_seed(recipe.seed + 1)
    config = target_config(recipe.vocab_size, num_layers=1)
    model = Eagle3DraftModel.from_training_args(
        config,
        draft_vocab_size=recipe.vocab_size,
        norm_before_residual=True,
        ttt_steps=_WINDOW,
        target_layer_ids=list(TAP_LAYERS),
        verifier_name_or_path=str(target_dir),
        draft_attn_impl="eager",
    )
    # A path of the building machine means nothing elsewhere; vLLM and ppow are told the target by their user.
    model.config.speculators_config.verifier.name_or_path = None
    _train(model, out, target_dir, known, recipe, recipe.eagle_steps, say)


def build_causal_lm(
    out: Path, target_dir: Path, known: Sequence[SourceFile], recipe: TinyRecipe, say: Say
) -> None:
    """Train the causal LM drafter, two narrow layers with the target's tokenizer."""
    import shutil

    from transformers import Qwen3ForCausalLM

    torch.manual_seed(recipe.seed + 2)
    model = Qwen3ForCausalLM(
        target_config(recipe.vocab_size, num_layers=2, hidden_size=128, intermediate_size=384)
    )
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(target_dir / file, out / file)
    _train(model, out, target_dir, known, recipe, recipe.causal_lm_steps, say)


def _train(
    model: PreTrainedModel,
    out: Path,
    target_dir: Path,
    known: Sequence[SourceFile],
    recipe: TinyRecipe,
    steps: int,
    say: Say,
) -> None:
    from transformers import AutoTokenizer

    from ppow_train.tiny.build import token_stream, write_log

    tokens = token_stream(known, AutoTokenizer.from_pretrained(target_dir))
    _save(model, out)  # untrained: `load_drafter` is the one way in
    log: list[tuple[int, float]] = []
    for cycle in range(recipe.drafter_cycles):
        log += _train_cycle(out, target_dir, tokens, recipe, cycle, steps, say)
    write_log(out, log, num_tokens=len(tokens), domain=known[0].domain)


def _train_cycle(
    out: Path, target_dir: Path, tokens: torch.Tensor, recipe: TinyRecipe, cycle: int, steps: int, say: Say
) -> list[tuple[int, float]]:
    """One cosine cycle from the weights on disk and back; returns its loss curve."""
    drafter = load_drafter(out)
    for name, parameter in drafter.model.named_parameters():
        frozen = "verifier_" in name or (drafter.drafter_type == "eagle3" and "embed" in name)
        parameter.requires_grad_(not frozen)
    target = Target(target_dir, drafter.tap_layers)
    generator = torch.Generator().manual_seed(recipe.seed + cycle)
    log: list[tuple[int, float]] = []

    def report(step: int, loss: float) -> None:
        log.append((cycle * steps + step, round(loss, 4)))
        say(
            f"{drafter.drafter_type}: cycle {cycle + 1} of {recipe.drafter_cycles}, step {step} of {steps}, "
            f"KL {loss:.3f} nats per token"
        )

    train_language_model(
        drafter.model,
        tokens,
        steps=steps,
        learning_rate=recipe.drafter_lr,
        seed=recipe.seed + cycle,
        report=report,
        loss_of=lambda batch: _window_loss(target, drafter, batch, generator),
    )
    _save(drafter.model, out)
    return log


def _save(model: Any, out: Path) -> None:
    model.to(torch.bfloat16).save_pretrained(out)
    _drop_code(out)


def _drop_code(out: Path) -> None:
    """speculators puts its config class beside the weights; data directories hold no code."""
    (out / "config.py").unlink(missing_ok=True)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    config.pop("auto_map", None)
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _window_loss(
    target: Target, drafter: Drafter, batch: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """KL of drafter from target over random windows of the text, int64 [B, L] -> scalar."""
    size, length = batch.shape
    trajectories = Trajectories(batch, torch.full((size,), 2), torch.full((size,), length))
    starts = torch.randint(3, length - _WINDOW + 1, (size, _WINDOWS_PER_BLOCK), generator=generator)
    encoded = target.encode(trajectories)
    draft = drafter.encode(trajectories, encoded)
    windows = PathWindows(
        window_tokens(batch, starts, _WINDOW).flatten(0, 1),
        target.path_logits(encoded, starts, _WINDOW).flatten(0, 1),
        drafter.path_logits(draft, trajectories, starts, _WINDOW).flatten(0, 1),
    )
    return continued_supervised(windows, "kl_div", position_decay=0.8)
