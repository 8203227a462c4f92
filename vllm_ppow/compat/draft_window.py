"""The V1 drafter that ends its draft loop early and returns drafts of unequal length, as request_window.py decides.

`propose` of vLLM's V1 drafters may return lists of unequal length under synchronous scheduling, and the scheduler
verifies exactly those. Its loop calls `_sample_draft_tokens` after each pass of the drafter: if nothing more is worth
drafting we leave the loop by an exception that our own `propose` catches: no line of theirs is copied. Only
with synchronous scheduling and one rank: reading probabilities each pass would stall a GPU, placeholders of
asynchronous scheduling are of one length, and ranks would have to agree. Left out: the decision (request_window.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from vllm_ppow.compat import seams
from vllm_ppow.request_window import RequestWindow

_BASE = ("vllm.v1.spec_decode.llm_base_proposer", "SpecDecodeBaseProposer")
SEAMS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("propose", ("self", "num_speculative_tokens", "target_token_ids", "sampling_metadata")),
    ("_sample_draft_tokens", ("self", "hidden_states", "sampling_metadata")),
    ("_greedy_sample", ("self", "hidden_states")),
    ("_sample_from_logits", ("self", "logits", "sampling_metadata")),
    (
        "prepare_next_token_ids_padded",
        ("self", "sampled_token_ids", "requests", "gpu_input_batch", "discard_request_mask"),
    ),
    ("prepare_inputs_padded", ("self", "common_attn_metadata", "spec_decode_metadata")),
)
GREEDY_BELOW = 1e-5  # a temperature; vLLM's _SAMPLING_EPS


class TrimmedLength(int):
    """The length of a step whose drafts are trimmed request by request: the most that each may have.

    vLLM hands the scheduler's number through to the drafter as it is, to another process as well: this kind of number
    is how a step says that its drafts are to be trimmed. Any other is drafted whole, and nothing is learned of it.
    """


class _EnoughError(Exception):
    """Leaves the draft loop."""


def require() -> None:
    """Fail if the V1 drafter's loop cannot be left early.

    Raises:
        SeamMissingError: names what is missing.
    """
    for method, parameters in SEAMS:
        seams.find(*_BASE, method, parameters)


def adopt(drafter: Any, policy: RequestWindow) -> None:
    """Make a freshly built V1 drafter end its drafts early, as a policy that knows nothing yet decides."""
    cls = type(drafter)
    drafter.__class__ = type(f"Adaptive{cls.__name__}", (RequestDraftWindow, cls), {})
    drafter.start_window(policy)


class RequestDraftWindow:
    """Mixed in before a V1 drafter's own class."""

    def start_window(self, policy: RequestWindow) -> None:
        """Begin with nothing drafted."""
        self.ppow_window = policy
        self._ppow_pending: dict[str, tuple[bool, list[float]]] = {}  # what was drafted and is being verified
        self._ppow_ids: list[str] = []
        self._ppow_produced: list[int] = []
        self._ppow_active: list[bool] = []
        self._ppow_verified: list[int] = []
        self._ppow_tokens: list[torch.Tensor] = []
        self._ppow_probs: list[torch.Tensor | None] = []
        self._ppow_confidence: list[float] = []
        self._ppow_began = self._ppow_ended = self._ppow_passed = 0.0
        self._ppow_drafting = self._ppow_failed = False

    # ---- what vLLM tells a drafter of the step before

    def prepare_next_token_ids_padded(
        self, sampled_token_ids: Any, requests: Any, gpu_input_batch: Any, discard_request_mask: Any
    ) -> Any:
        prepared = super().prepare_next_token_ids_padded(  # type: ignore[misc]
            sampled_token_ids, requests, gpu_input_batch, discard_request_mask
        )
        batch = prepared[0].shape[0]
        self._ppow_ids = list(gpu_input_batch.req_ids[:batch])
        self._ppow_produced = prepared[1].tolist()
        self._ppow_active = [not dropped for dropped in discard_request_mask[:batch].tolist()]
        self._ppow_verified = [0] * batch
        return prepared

    def prepare_inputs_padded(self, common_attn_metadata: Any, spec_decode_metadata: Any, *args: Any) -> Any:
        self._ppow_verified = list(spec_decode_metadata.num_draft_tokens)
        return super().prepare_inputs_padded(common_attn_metadata, spec_decode_metadata, *args)  # type: ignore[misc]

    # ---- drafting

    def propose(self, num_speculative_tokens: int, *args: Any, **kwargs: Any) -> Any:
        if self._ppow_failed or not isinstance(num_speculative_tokens, TrimmedLength):
            self._ppow_pending, self._ppow_ended = {}, 0.0
            return super().propose(num_speculative_tokens, *args, **kwargs)  # type: ignore[misc]
        num_speculative_tokens = int(num_speculative_tokens)
        sampling_metadata = kwargs["sampling_metadata"]
        batch = len(self._ppow_ids)
        now = time.perf_counter()
        self._guarded(self._observe_verification, kwargs["target_token_ids"].shape[0], now)
        self._ppow_began = self._ppow_passed = now
        self._ppow_pending = {}
        if num_speculative_tokens == 0:
            self.ppow_window.pause()
            draft = super().propose(num_speculative_tokens, *args, **kwargs)  # type: ignore[misc]
            self._ppow_ended = time.perf_counter()
            return draft
        sampled = _sampled(sampling_metadata, batch)
        self._guarded(self.ppow_window.begin, num_speculative_tokens, sampled, self._ppow_active)
        self._ppow_tokens, self._ppow_probs, self._ppow_drafting = [], [], True
        try:
            super().propose(num_speculative_tokens, *args, **kwargs)  # type: ignore[misc]
        except _EnoughError:
            if self._ppow_probs[0] is not None:
                self._last_draft_probs = torch.stack(self._ppow_probs, dim=1).contiguous()  # type: ignore[arg-type]
        finally:
            self._ppow_drafting = False
        draft = torch.stack(self._ppow_tokens, dim=1).tolist()
        if self._ppow_failed:
            return draft
        lengths = self.ppow_window.lengths()
        confidences = self.ppow_window.confidences
        for row, length in enumerate(lengths):
            if length:
                self._ppow_pending[self._ppow_ids[row]] = (sampled[row], confidences[row][:length])
        self._ppow_ended = time.perf_counter()
        return [tokens[:length] for tokens, length in zip(draft, lengths, strict=True)]

    def _guarded(self, act: Callable[..., Any], *arguments: Any) -> Any:
        """What the policy answers; None after an error in it, of which no engine should die: output needs no policy."""
        if self._ppow_failed:
            return None
        try:
            return act(*arguments)
        except Exception:
            self._ppow_failed = True
            seams.logger.exception(
                "Trimming drafts by request failed: they are drafted whole from now on, serving goes on."
            )
            return None

    def _sample_draft_tokens(self, hidden_states: torch.Tensor, sampling_metadata: Any) -> Any:
        if not self._ppow_drafting:
            return super()._sample_draft_tokens(hidden_states, sampling_metadata)  # type: ignore[misc]
        tokens, probs = super()._sample_draft_tokens(hidden_states, sampling_metadata)  # type: ignore[misc]
        self._ppow_tokens.append(tokens)
        self._ppow_probs.append(probs)
        if self._guarded(self._goes_on) is False:
            raise _EnoughError
        return tokens, probs

    def _goes_on(self) -> bool:
        """Whether another position is worth a pass."""
        now = time.perf_counter()
        if len(self._ppow_tokens) > 1:  # the first pass is over all tokens just verified
            self.ppow_window.pass_price.observe(len(self._ppow_confidence), now - self._ppow_passed)
        self._ppow_passed = now
        return self.ppow_window.add(self._ppow_confidence)

    def _greedy_sample(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self._ppow_drafting:
            return super()._greedy_sample(hidden_states)  # type: ignore[misc]
        logits = self.model.compute_logits(hidden_states)  # type: ignore[attr-defined]
        self._ppow_confidence = _top_probability(logits)
        return logits.argmax(dim=-1)

    def _sample_from_logits(self, logits: torch.Tensor, sampling_metadata: Any) -> Any:
        if self._ppow_drafting:  # before anything is drawn from them
            self._ppow_confidence = _top_probability(logits)
        return super()._sample_from_logits(logits, sampling_metadata)  # type: ignore[misc]

    def _observe_verification(self, num_tokens: int, now: float) -> None:
        """Tell the policy what became of the last draft, and what the step took if it only decoded."""
        window, batch = self.ppow_window, len(self._ppow_ids)
        for row, req_id in enumerate(self._ppow_ids):
            pending = self._ppow_pending.get(req_id)
            verified = self._ppow_verified[row]
            if pending is not None and verified and self._ppow_produced[row]:
                window.observe(pending[0], pending[1][:verified], self._ppow_produced[row] - 1)
        if self._ppow_ended and num_tokens == batch + sum(self._ppow_verified):
            window.verify_price.observe(batch, num_tokens, now - self._ppow_ended)
            window.observe_step(batch, sum(self._ppow_produced), now - self._ppow_began)


def _top_probability(logits: torch.Tensor) -> list[float]:
    """max softmax(logits) of each row, [batch]."""
    return logits.float().softmax(dim=-1).amax(dim=-1).tolist()


def _sampled(sampling_metadata: Any, batch: int) -> list[bool]:
    """Whether each request samples, [batch]."""
    if sampling_metadata.all_greedy or sampling_metadata.temperature is None:
        return [False] * batch
    return [temperature >= GREEDY_BELOW for temperature in sampling_metadata.temperature[:batch].tolist()]
