"""Our Prometheus metrics, `ppow:…` beside `vllm:…`, with the labels of these: counts, divided by whoever reads them.

What vLLM counts already (acceptance, tokens, preemptions) keeps vLLM's names and is not counted again. Left out: how
vLLM calls it (metrics_logger.py), and where the window's counts come from (window_report.py).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge

PREFIX = "ppow:"
LAYERS = ("step", "request", "verification")  # who may decide draft lengths; scheduler.py says which do
GAUGE_INTERVAL_S = 10.0  # what the gauges are means over, at least
_LABELS = ("model_name", "engine")


@dataclasses.dataclass(frozen=True)
class Metric:
    """One name, as registered (Prometheus adds `_total` to counters), its kind, its labels beyond vLLM's, its help."""

    name: str
    kind: type
    labels: tuple[str, ...]
    help: str


METRICS = (
    Metric(
        "spec_decode_drafts",
        Counter,
        ("num_draft_tokens",),
        "Verified drafts by their length in tokens; 0: a grammar refused the whole draft.",
    ),
    Metric(
        "window_steps", Counter, ("num_draft_tokens",), "Engine steps by the draft length chosen; 0: none."
    ),
    Metric("window_probes", Counter, (), "Engine steps of them that tried another length to learn from it."),
    Metric(
        "predicted_accepted_tokens",
        Counter,
        (),
        "Tokens that the window expected to be accepted of the drafts verified so far.",
    ),
    Metric(
        "prediction_error_tokens",
        Counter,
        (),
        "Sum over engine steps of |expected - accepted| tokens.",
    ),
    Metric(
        "estimated_speedup",
        Gauge,
        (),
        "Output rate over that of drafting nothing, as the window estimates it; mean over the last 10 s.",
    ),
    Metric(
        "calibration_error",
        Gauge,
        (),
        "Expected minus accepted tokens per verified draft; mean over the last 10 s.",
    ),
    Metric(
        "window_layer_active",
        Gauge,
        ("layer",),
        "1 where a layer decides draft lengths in this server, else 0.",
    ),
)


class PrometheusMetrics:
    """The metrics of one API server, for every engine it drives.

    Args:
        model_name: as vLLM labels it.
        engine_indexes: engines of this server.
        num_speculative_tokens: longest draft.
        registry: where to register; vLLM's by default.
        clock: seconds, for the gauges' interval.
    """

    def __init__(
        self,
        model_name: str,
        engine_indexes: Sequence[int],
        num_speculative_tokens: int,
        registry: CollectorRegistry = REGISTRY,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._engines = {index: (model_name, str(index)) for index in engine_indexes}
        _unregister(registry)
        self._metrics = {metric.name: _register(metric, registry) for metric in METRICS}
        for index in self._engines:
            for length in range(num_speculative_tokens + 1):
                self._of("spec_decode_drafts", index, length)
            for layer in LAYERS:
                self._of("window_layer_active", index, layer).set(0)
        self._reports: dict[int, dict[str, Any]] = {}
        self._marks: dict[int, tuple[float, dict[str, Any]]] = {}

    def observe_drafts(self, engine_index: int, stats: Any) -> None:
        """Count the drafts that one engine step verified.

        Args:
            stats: vLLM's SpecDecodingStats of that step; its num_draft_tokens_per_pos[i] is the number of drafts longer
                than i, so that neighbours differ by the drafts of one length.
        """
        longer = [stats.num_drafts, *stats.num_draft_tokens_per_pos, 0]
        for length in range(len(longer) - 1):
            if count := longer[length] - longer[length + 1]:
                self._of("spec_decode_drafts", engine_index, length).inc(count)

    def observe_report(self, engine_index: int, report: dict[str, Any]) -> None:
        """Add what an engine's window counted since its last report (counts that fell: the engine is a new one)."""
        before = self._reports.get(engine_index)
        if before is None or report["requests"] < before["requests"]:
            before = {}
        self._reports[engine_index] = report
        for length, count in enumerate(_added(report, before, "chosen")):
            self._of("window_steps", engine_index, length).inc(count)
        for name, key in (
            ("window_probes", "probes"),
            ("predicted_accepted_tokens", "predicted"),
            ("prediction_error_tokens", "absolute_error"),
        ):
            self._of(name, engine_index).inc(report[key] - before.get(key, 0))
        for layer in {*LAYERS, *report["layers"]}:
            self._of("window_layer_active", engine_index, layer).set(layer in report["layers"])
        self._set_gauges(engine_index, report)

    def _set_gauges(self, engine_index: int, report: dict[str, Any]) -> None:
        now = self._clock()
        since, before = self._marks.setdefault(engine_index, (now, report))
        if report["requests"] < before["requests"]:
            self._marks[engine_index] = (now, report)
            return
        if now - since < GAUGE_INTERVAL_S:
            return
        self._marks[engine_index] = (now, report)
        if steps := sum(_added(report, before, "chosen")):
            speedup = (report["speedup"] - before["speedup"]) / steps
            self._of("estimated_speedup", engine_index).set(speedup)
        if drafts := report["drafts"] - before["drafts"]:
            error = (report["predicted"] - before["predicted"]) - (report["accepted"] - before["accepted"])
            self._of("calibration_error", engine_index).set(error / drafts)

    def _of(self, name: str, engine_index: int, *labels: object) -> Any:
        return self._metrics[name].labels(*self._engines[engine_index], *map(str, labels))


def exported_names() -> set[str]:
    """Names as they stand in /metrics."""
    return {f"{PREFIX}{metric.name}{'_total' if metric.kind is Counter else ''}" for metric in METRICS}


def _added(report: dict[str, Any], before: dict[str, Any], key: str) -> list[int]:
    earlier = before.get(key) or [0] * len(report[key])
    return [now - then for now, then in zip(report[key], earlier, strict=True)]


def _register(metric: Metric, registry: CollectorRegistry) -> Any:
    # As vLLM's: with several API servers, the value set last is the one shown.
    options = {"multiprocess_mode": "mostrecent"} if metric.kind is Gauge else {}
    labels = (*_LABELS, *metric.labels)
    return metric.kind(f"{PREFIX}{metric.name}", metric.help, labels, registry=registry, **options)


def _unregister(registry: CollectorRegistry) -> None:
    """Forget the metrics of an engine that was in this process before, as vLLM does with its own."""
    for collector, names in list(registry._collector_to_names.items()):
        if any(name.startswith(PREFIX) for name in names):
            registry.unregister(collector)
