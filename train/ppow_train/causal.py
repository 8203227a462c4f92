"""Windows on a Hugging Face causal language model: one prefix pass, then chains or blocks that share its cache.

The target is scored with this and the causal LM drafter is built on it. Left out: sampling, losses, EAGLE heads.
"""

from __future__ import annotations

import re

import torch
from transformers import DynamicCache, PreTrainedModel

from ppow_train.errors import UserError
from ppow_train.last_layer import feed_forward_at
from ppow_train.packing import block_mask, gather_slots, window_tokens
from ppow_train.types import Encoded, Trajectories

_CHECKED_TOKENS = 8
_POSITIONS = re.compile(r"(^|\.)(wpe|\w*position\w*)$")  # names of a table of learned positions


def head_logits(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Hidden states after the final norm, [..., H], -> the model's logits, float32 [..., V].

    Beside the head what some models do to its output: Cohere's `logit_scale`, Granite's `logits_scaling`, Gemma's
    `final_logit_softcapping`. In the model's own dtype, as its own forward does.
    """
    config = model.config.get_text_config()
    logits = model.get_output_embeddings()(hidden)
    if (factor := getattr(config, "logit_scale", None)) is not None:
        logits = logits * factor
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        logits = logits / divisor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits.float()


def _few_tokens(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.arange(_CHECKED_TOKENS, device=model.device)[None]
    return ids % model.get_input_embeddings().weight.shape[0]


@torch.no_grad()
def try_out(model: PreTrainedModel) -> torch.Tensor:
    """The model's own logits of a few tokens, float32 [1, T, V].

    Raises:
        UserError: it does not run, or they are no numbers, as where its config.json or its weights are broken.
    """
    name = f"{model.config.name_or_path} ({type(model).__name__})"
    try:
        logits = model(input_ids=_few_tokens(model), use_cache=False).logits.float()
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300].rstrip(".")
        raise UserError(
            f"{name} is loaded, but does not run ({why}): copy it again, or give another."
        ) from error
    if logits.isnan().any():
        raise UserError(
            f"{name} computes logits that are no numbers, in {str(model.dtype).removeprefix('torch.')}: copy it again, "
            "give another, or load it in float32."
        )
    return logits


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Compare `head_logits` with the model's own logits on a few tokens.

    Raises:
        UserError: it does not run, or does something else between its last hidden states and its logits.
    """
    ids = _few_tokens(model)
    seen: list[torch.Tensor] = []
    hook = model.base_model.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    try:
        own = try_out(model)
    finally:
        hook.remove()
    if not seen:  # OPT's head reads its decoder, past the base model, whose last states are the same
        seen.append(model.base_model(input_ids=ids, use_cache=False)[0])
    if (
        seen[-1].shape[:2] == ids.shape
        and seen[-1].shape[-1] == model.get_output_embeddings().weight.shape[1]
    ):
        # Of the same hidden states: what may differ is rounding in the head.
        tolerance = max(2 * torch.finfo(model.dtype).eps, 1e-5) * own.abs().max()
        if (head_logits(model, seen[-1]) - own).abs().max() <= tolerance:
            return
    raise UserError(
        f"{model.config.name_or_path} ({type(model).__name__}) computes its logits in a way that is not known here, "
        "so training would see other ones than are served: take another model."
    )


@torch.no_grad()
def check_windows(model: PreTrainedModel) -> None:
    """Compare `block_logits` of one window beside another with the model's own logits, on a few tokens.

    Raises:
        UserError: the model does not take windows packed behind a shared prefix: masks of its own, or other positions.
    """
    ids = (
        torch.arange(1, _CHECKED_TOKENS + 1, device=model.device)
        % model.get_input_embeddings().weight.shape[0]
    )
    count = torch.tensor([len(ids)], device=model.device)
    starts = torch.tensor([[_CHECKED_TOKENS // 2, _CHECKED_TOKENS // 2 - 1]], device=model.device)
    try:
        encoded = encode(model, Trajectories(ids[None], torch.ones_like(count), count))
        tokens = window_tokens(ids[None], starts, _CHECKED_TOKENS // 2)
        packed = block_logits(model, encoded, starts, tokens)[0, 0]
        own = model(input_ids=ids[None], use_cache=False).logits[0].float()
        wanted = own[_CHECKED_TOKENS // 2 - 1 : -1]
        # Much more than rounding, in float16 too; a wrong mask or position changes logits as a whole.
        if (packed - wanted).abs().max() <= 0.05 * own.abs().max():
            return
        reason = "their logits come out differently"
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        if isinstance(error, (UserError, torch.cuda.OutOfMemoryError)):
            raise
        reason = " ".join(str(error).split())
    raise UserError(
        f"{model.config.name_or_path} ({type(model).__name__}) does not take windows packed behind a shared prefix "
        f"({reason}), which objective ppow needs: take another objective, or another model."
    )


def encode(
    model: PreTrainedModel,
    trajectories: Trajectories,
    tap_layers: tuple[int, ...] = (),
    read: torch.Tensor | None = None,
) -> Encoded:
    """Run a model over trajectories and keep its cache.

    Args:
        model: a `…ForCausalLM`.
        tap_layers: residual streams to keep for an EAGLE head; i means after i layers, before the final norm.
        read: bool [B, L], slots whose hidden state will be read, or None for all; keys, values and taps are of all.

    Returns:
        `Encoded` with S = L slots; slot n−1 predicts position n.
    """
    check_layers(model)
    # Given the config it would drop what sliding attention has passed, which packed windows still read.
    cache = DynamicCache()
    with feed_forward_at(_last_layer(model), read):
        output = model.base_model(
            input_ids=trajectories.input_ids,
            past_key_values=cache,
            use_cache=True,
            output_hidden_states=bool(tap_layers),
        )
    taps = torch.cat([output.hidden_states[i] for i in tap_layers], dim=-1) if tap_layers else None
    return Encoded(output.last_hidden_state, output.past_key_values, first_slot=1, taps=taps)


def _last_layer(model: PreTrainedModel) -> torch.nn.Module:
    """The last one under the name that most models of transformers give their layers; else the model, as it is."""
    layers = getattr(model.base_model, "layers", None)
    return model.base_model if layers is None else layers[-1]


def check_layers(model: PreTrainedModel) -> None:
    """Refuse a model with layers that are no attention.

    Raises:
        UserError: with their kinds.
    """
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if other := sorted(kinds - {"full_attention", "sliding_attention"}):
        raise UserError(
            f"{model.config.name_or_path} has layers of kind {', '.join(other)}, whose state windows cannot share: "
            "use a model with attention in every layer."
        )


def _sliding_span(model: PreTrainedModel) -> int | None:
    """Tokens that layers with sliding attention attend to; None where every layer attends to all."""
    config = model.config.get_text_config()
    if set(getattr(config, "layer_types", None) or ()) == {"full_attention"}:
        return None
    return getattr(config, "sliding_window", None)


def check_span(model: PreTrainedModel, length: int) -> None:
    """Refuse to run windows behind the cache of so many tokens where sliding attention spans fewer.

    Their mask is that of full attention. A whole pass over a trajectory is right in any case: there the model makes the
    masks.

    Raises:
        UserError: a layer spans fewer.
    """
    span = _sliding_span(model)
    if span is not None and length > span:
        raise UserError(
            f"{model.config.name_or_path} has layers that attend to {span} tokens at a time, the trajectories have "
            f"{length}, and objective ppow drafts behind all of them: take another objective, shorten the prompts or "
            "lower --max-new-tokens."
        )


def check_positions(model: PreTrainedModel, length: int) -> None:
    """Refuse texts of so many tokens where positions are learned, and a table ends before.

    Computed positions go on, however far a model was trained.

    Raises:
        UserError: naming what to change.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None or length <= limit:
        return
    if any(
        isinstance(m, torch.nn.Embedding) and _POSITIONS.search(name) for name, m in model.named_modules()
    ):
        raise UserError(
            f"{model.config.name_or_path} has a table of {limit} positions, the longest prompt and its continuation "
            f"are {length} tokens: shorten the prompts, lower --max-new-tokens, or take a drafter that reads more."
        )


def extend(
    model: PreTrainedModel,
    encoded: Encoded,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    """Append Q tokens to the cache: int64 [B, Q] each, additive mask [B, 1, Q, keys] -> hidden [B, Q, H].

    Raises:
        UserError: as `check_span`.
    """
    if _sliding_span(model) is not None:  # else nobody waits for a GPU to tell its positions
        check_span(model, int(positions.max()) + 1)
    output = model.base_model(
        input_ids=tokens,
        position_ids=positions,
        attention_mask=mask,
        past_key_values=encoded.cache,
        use_cache=True,
    )
    return output.last_hidden_state


def path_logits(
    model: PreTrainedModel, encoded: Encoded, starts: torch.Tensor, num_speculative_tokens: int
) -> torch.Tensor:
    """What the model says of the trajectory's own windows: int64 [B, W] -> logits [B, W, K, V]; only the head runs."""
    offsets = torch.arange(num_speculative_tokens, device=starts.device)
    slots = starts[..., None] - encoded.first_slot + offsets
    return head_logits(model, gather_slots(encoded.hidden, slots))


def block_logits(
    model: PreTrainedModel, encoded: Encoded, starts: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """What the model says along drafted windows, all of them in one forward.

    Args:
        starts: int64 [B, W].
        tokens: int64 [B, W, K], drafted; logits i condition on the prefix and tokens before i.

    Returns:
        logits [B, W, K, V]. The cache is as before.

    Raises:
        UserError: as `check_span`.
    """
    batch, windows, length = tokens.shape
    anchors = starts - encoded.first_slot
    hidden = gather_slots(encoded.hidden, anchors)[:, :, None]
    if length > 1:
        fed = tokens[:, :, :-1].reshape(batch, -1)
        positions = (starts[..., None] + torch.arange(length - 1, device=starts.device)).reshape(batch, -1)
        mask = block_mask(anchors, encoded.num_slots, length - 1, encoded.hidden.dtype)
        rest = extend(model, encoded, fed, positions, mask).view(batch, windows, length - 1, -1)
        encoded.crop()
        hidden = torch.cat([hidden, rest], dim=2)
    return head_logits(model, hidden)
