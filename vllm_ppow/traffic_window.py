"""Two draft window policies of one engine, and which of them serves a batch: its requests' temperatures decide (ours).

Where a drafter can trim its drafts request by request, greedy requests gain by it: the drafter's top-1 probability
tells well whether its argmax is the target's. Of a token that is drawn it tells less, so that trimming costs sampled
requests more than it gains (measured, examples/benchmarks/windows.md). A step has one kind of drafts for its whole
batch: trimmed ones unless most of its requests sample, else one length for all. Each policy learns from its own drafts
only; the step between two kinds, which verifies one and drafts the other, is timed for neither. Left out: the policies
(window.py) and the trimming (request_window.py). Pure Python.
"""

from __future__ import annotations

from vllm_ppow.change_cost import ChangeCost
from vllm_ppow.window import DraftWindow, WindowCounts

# Share of a batch's requests that must want the other kind of drafts before it is changed: a batch of both kinds in
# equal parts does not go to and fro as requests come and end.
MOSTLY = 0.6


class TrafficWindow:
    """DraftWindow's methods, done by the policy whose drafts they are about.

    Args:
        whole: of drafts of one length per step, for batches that mostly sample.
        trimmed: of drafts trimmed by request, for all others. Both count together, in `whole`'s counts.
    """

    def __init__(self, whole: DraftWindow, trimmed: DraftWindow) -> None:
        self.counts: WindowCounts = whole.counts
        trimmed.counts = whole.counts
        self._whole, self._trimmed = whole, trimmed
        self._drafting = trimmed
        self._verified = trimmed  # whose drafts the step under way verifies
        self._name_layers()

    @property
    def by_request(self) -> bool:
        """Whether the drafts of the step under way are trimmed by request."""
        return self._drafting.by_request

    @property
    def changing(self) -> ChangeCost:
        """What a change of length costs the policy that drafts."""
        return self._drafting.changing

    def choose(self, batch: int, context: int | None = None, decodes: bool = True, sampled: int = 0) -> int:
        """Draft length for the next draft of a step.

        Args:
            batch: requests (>= 1).
            context: tokens of all of them together.
            decodes: whether the step only decodes.
            sampled: of the requests, those that sample (temperature above 0).
        """
        self._verified = self._drafting
        others = sampled if self.by_request else batch - sampled
        if others >= MOSTLY * batch:
            self._drafting = self._whole if self.by_request else self._trimmed
            self._name_layers()
        return self._drafting.choose(batch, context, decodes)

    def observe_draft(
        self, num_draft_tokens: int, num_accepted_tokens: int, num_refused_tokens: int = 0
    ) -> None:
        """One request's draft was verified, or refused as a whole as soon as it was made; as DraftWindow has it."""
        whole_draft_refused = num_refused_tokens == num_draft_tokens
        policy = self._drafting if whole_draft_refused else self._verified
        policy.observe_draft(num_draft_tokens, num_accepted_tokens, num_refused_tokens)

    def observe_step(self, seconds: float, *step: int) -> None:
        """A decode-only step at a steady draft length; arguments as DraftWindow has them, here and below."""
        if self._verified is self._drafting:
            self._drafting.observe_step(seconds, *step)

    def observe_change(self, seconds: float, *change: int) -> None:
        """A decode-only step that verified drafts of one length and drafted another."""
        if self._verified is self._drafting:
            self._drafting.observe_change(seconds, *change)

    def _name_layers(self) -> None:
        self.counts.layers = ("step", "request") if self.by_request else ("step",)
