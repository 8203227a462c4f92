"""Entry point `ppow` of group `vllm.stat_logger_plugins`: hands what vLLM reports to our Prometheus metrics.

vLLM makes one in every API server (of `vllm serve` and `AsyncLLM`; `LLM` loads no such plugins) and calls it for every
message of an engine. It does nothing where method ppow is not served. An error in it would stop vLLM: at the first one
it says so in the log, once, and takes no further part. Left out: the metrics (metrics_prometheus.py).
"""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable
from typing import Any

from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from vllm_ppow.compat.engine_args import serves_ppow
from vllm_ppow.metrics_prometheus import PrometheusMetrics
from vllm_ppow.window_report import (
    INTERVAL_S,
    begin_report,
    logger,
    read_report,
    remove_report,
    report_path,
)


class PPOWStatLogger(AggregateStatLoggerBase):
    """vLLM's stat logger for our metrics."""

    def __init__(self, vllm_config: Any, engine_indexes: list[int]) -> None:
        self.metrics: PrometheusMetrics | None = None
        self._next_look = -float("inf")
        self._guarded(self._start, vllm_config, engine_indexes)

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
        **_later_additions: Any,
    ) -> None:
        """vLLM's hook for every message of an engine."""
        if self.metrics is not None:
            self._guarded(self._record, scheduler_stats, engine_idx)

    def log(self) -> None:
        """vLLM's hook for every log interval (10 s)."""
        if self.metrics is not None:
            self._guarded(self._look)

    def log_engine_initialized(self) -> None:
        """vLLM's hook for a started engine; nothing to say that its log does not say."""

    def _start(self, vllm_config: Any, engine_indexes: list[int]) -> None:
        if not serves_ppow(vllm_config.speculative_config):
            return
        self.metrics = PrometheusMetrics(
            vllm_config.model_config.served_model_name,
            engine_indexes,
            vllm_config.speculative_config.num_speculative_tokens,
        )
        # Statistics of a step reach one of several API servers; a file can be read by all, so that one must be named.
        is_first = vllm_config.parallel_config._api_process_rank <= 0
        self._paths = {i: report_path(vllm_config, i) for i in engine_indexes if is_first}
        for path in self._paths.values():  # an engine that was killed leaves its report behind; we outlive it
            begin_report(path)
            atexit.register(remove_report, path)

    def _record(self, scheduler_stats: Any, engine_index: int) -> None:
        assert self.metrics is not None
        if scheduler_stats is not None and scheduler_stats.spec_decoding_stats is not None:
            self.metrics.observe_drafts(engine_index, scheduler_stats.spec_decoding_stats)
        if time.monotonic() >= self._next_look:
            self._look()

    def _look(self) -> None:
        assert self.metrics is not None
        self._next_look = time.monotonic() + INTERVAL_S
        for engine_index, path in self._paths.items():
            if (report := read_report(path)) is not None:
                self.metrics.observe_report(engine_index, report)

    def _guarded(self, act: Callable[..., None], *arguments: Any) -> None:
        try:
            act(*arguments)
        except Exception:
            self.metrics = None
            logger.exception(
                "The ppow:* metrics stop here after an error; serving and vLLM's own metrics go on."
            )
