"""Our Prometheus metrics: counts that agree with vLLM's, gauges, and a logger that can never stop serving."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from vllm.v1.metrics.loggers import load_stat_logger_plugin_factories
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from vllm_ppow import metrics_logger, metrics_prometheus
from vllm_ppow.metrics_logger import PPOWStatLogger
from vllm_ppow.metrics_prometheus import GAUGE_INTERVAL_S, PrometheusMetrics, exported_names
from vllm_ppow.window_report import FORMAT, report_path

K = 4
DASHBOARD = Path(__file__).parents[2] / "examples" / "grafana" / "ppow.json"


def samples(registry) -> dict[str, float]:
    found = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            rest = {k: v for k, v in sample.labels.items() if k not in ("engine", "model_name")}
            found[sample.name, sample.labels.get("engine"), *rest.values()] = sample.value
    return found


@pytest.fixture
def clock():
    return [0.0]


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def metrics(registry, clock):
    return PrometheusMetrics("tiny", [0, 1], K, registry, clock=lambda: clock[0])


def verified(*drafts) -> SpecDecodingStats:
    """vLLM's own statistics of a step that verified drafts of (drafted, accepted) tokens."""
    stats = SpecDecodingStats.new(K)
    for drafted, accepted in drafts:
        stats.observe_draft(drafted, accepted)
    return stats


def report(**changes):
    counts = {
        "chosen": [5, 0, 0, 5, 0],
        "probes": 1,
        "requests": 40,
        "speedup": 12.0,
        "drafts": 20,
        "drafted": 60,
    }
    counts |= {"accepted": 30, "predicted": 33.0, "absolute_error": 9.0, "layers": ["step"], "format": FORMAT}
    return counts | changes


def test_drafts_are_counted_by_length(metrics, registry):
    metrics.observe_drafts(0, verified((4, 4), (4, 0), (1, 1), (2, 1), (0, 0)))
    metrics.observe_drafts(0, verified((4, 1)))
    metrics.observe_drafts(1, verified((3, 1)))
    found = samples(registry)
    by_length = [found["ppow:spec_decode_drafts_total", "0", str(k)] for k in range(K + 1)]
    assert by_length == [1, 1, 1, 0, 3]
    assert found["ppow:spec_decode_drafts_total", "1", "3"] == 1


def test_reports_are_added_and_a_restarted_engine_begins_anew(metrics, registry):
    metrics.observe_report(0, report())
    metrics.observe_report(0, report(chosen=[5, 1, 0, 9, 0], requests=60, predicted=40.5, probes=2))
    found = samples(registry)
    assert [found["ppow:window_steps_total", "0", str(k)] for k in range(K + 1)] == [5, 1, 0, 9, 0]
    assert found["ppow:predicted_accepted_tokens_total", "0"] == 40.5
    assert found["ppow:window_probes_total", "0"] == 2
    metrics.observe_report(0, report(requests=4, chosen=[1, 0, 0, 0, 0], predicted=1.0, probes=0))
    found = samples(registry)
    assert found["ppow:window_steps_total", "0", "0"] == 6
    assert found["ppow:predicted_accepted_tokens_total", "0"] == 41.5


def test_gauges_are_means_over_an_interval(metrics, registry, clock):
    metrics.observe_report(0, report())
    clock[0] = GAUGE_INTERVAL_S - 1
    later = report(
        chosen=[5, 0, 0, 9, 0],
        requests=80,
        speedup=18.0,
        drafts=36,
        accepted=50,
        predicted=57.0,
        absolute_error=11.0,
    )
    metrics.observe_report(0, later)
    assert samples(registry).get(("ppow:estimated_speedup", "0")) is None, "the interval is not over"
    clock[0] = GAUGE_INTERVAL_S
    metrics.observe_report(0, later)
    found = samples(registry)
    assert found["ppow:estimated_speedup", "0"] == pytest.approx((18 - 12) / 4)
    assert found["ppow:calibration_error", "0"] == pytest.approx(((57 - 33) - (50 - 30)) / 16)


def test_layers(metrics, registry):
    assert samples(registry)["ppow:window_layer_active", "0", "step"] == 0
    metrics.observe_report(0, report(layers=["step", "request"]))
    found = samples(registry)
    assert [found["ppow:window_layer_active", "0", layer] for layer in metrics_prometheus.LAYERS] == [1, 1, 0]


def test_a_second_engine_in_the_process_registers_again(registry):
    for _ in range(2):
        PrometheusMetrics("tiny", [0], K, registry).observe_drafts(0, verified((2, 1)))
    assert samples(registry)["ppow:spec_decode_drafts_total", "0", "2"] == 1


# ---------------------------------------------------------------- the logger


def config(load_format="ppow"):
    return SimpleNamespace(
        instance_id="ab12c",
        speculative_config=SimpleNamespace(
            num_speculative_tokens=K, draft_load_config=SimpleNamespace(load_format=load_format)
        ),
        model_config=SimpleNamespace(served_model_name="tiny"),
        parallel_config=SimpleNamespace(data_parallel_index=0, _api_process_rank=0, _api_process_count=1),
    )


@pytest.fixture
def ours(tmp_path, monkeypatch):
    """A logger in vLLM's registry, which is cleared afterwards."""
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", str(tmp_path))
    yield lambda **options: PPOWStatLogger(config(**options), [0])
    metrics_prometheus._unregister(REGISTRY)


def test_messages_and_reports_become_metrics(ours):
    stat_logger = ours()
    report_path(config(), 0).write_text(json.dumps(report()))
    stat_logger.record(SchedulerStats(spec_decoding_stats=verified((3, 2))), None, None, engine_idx=0)
    stat_logger.record(None, None)
    stat_logger.log()
    found = samples(REGISTRY)
    assert found["ppow:spec_decode_drafts_total", "0", "3"] == 1
    assert found["ppow:window_steps_total", "0", "3"] == 5, "read once, not once per look"


def test_reports_of_killed_engines_are_removed_at_the_end(ours, monkeypatch):
    left = []
    monkeypatch.setattr("vllm_ppow.metrics_logger.atexit.register", lambda f, *given: left.append((f, given)))
    ours()
    path = report_path(config(), 0)
    path.write_text("{}")
    for _ in range(2):
        for function, given in left:
            function(*given)
    assert len(left) == 1
    assert not path.exists()


def test_other_api_servers_leave_the_report_to_the_first(ours, monkeypatch):
    written = report_path(config(), 0)
    written.write_text(json.dumps(report()))
    second = config()
    second.parallel_config._api_process_rank = 1
    stat_logger = PPOWStatLogger(second, [0])
    assert json.loads(written.read_text()) == report(), "and do not begin it anew"
    stat_logger.record(SchedulerStats(spec_decoding_stats=verified((3, 2))), None)
    found = samples(REGISTRY)
    assert found["ppow:spec_decode_drafts_total", "0", "3"] == 1
    assert ("ppow:window_steps_total", "0", "3") not in found


def test_nothing_is_registered_without_method_ppow(ours):
    stat_logger = ours(load_format="auto")
    stat_logger.record(SchedulerStats(spec_decoding_stats=verified((3, 2))), None)
    PPOWStatLogger(SimpleNamespace(speculative_config=None), [0]).log()
    assert not any(
        name.startswith("ppow:") for names in REGISTRY._collector_to_names.values() for name in names
    )


@pytest.mark.parametrize("where", ["start", "record", "report"])
def test_an_error_is_logged_once_and_stops_our_metrics_only(ours, where, caplog, monkeypatch):
    broken = config()
    if where == "start":
        broken.model_config = None
    with caplog.at_level(logging.ERROR, "vllm.ppow.metrics"):
        stat_logger = PPOWStatLogger(broken, [0])
        if where == "report":
            report_path(config(), 0).write_text(json.dumps({"format": FORMAT}))
        stats = SimpleNamespace(spec_decoding_stats=SimpleNamespace() if where == "record" else None)
        for _ in range(3):
            stat_logger.record(stats, None)
            stat_logger.log()
    assert [r.getMessage()[:35] for r in caplog.records] == ["The ppow:* metrics stop here after "]
    assert caplog.records[0].exc_info is not None, "with its traceback"


# ---------------------------------------------------------------- the entry point


def install(directory: Path, monkeypatch, value: str) -> None:
    """A distribution that declares our entry point, as an installation would."""
    info = directory / "ppow_scratch-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ppow-scratch\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[vllm.stat_logger_plugins]\nppow = {value}\n")
    monkeypatch.syspath_prepend(str(directory))


def declared() -> str:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    return project["entry-points"]["vllm.stat_logger_plugins"]["ppow"]


@pytest.mark.parametrize(
    ("plugins", "loaded"), [(None, True), ("ppow", True), ("another", False), ("", False)]
)
def test_vllm_loads_it_and_VLLM_PLUGINS_decides(tmp_path, monkeypatch, plugins, loaded):
    install(tmp_path, monkeypatch, declared())
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if plugins is not None:
        monkeypatch.setenv("VLLM_PLUGINS", plugins)
    assert (PPOWStatLogger in load_stat_logger_plugin_factories()) == loaded


def test_a_plugin_that_cannot_be_imported_is_said_and_skipped(tmp_path, monkeypatch, caplog):
    install(tmp_path, monkeypatch, "vllm_ppow.metrics_logger:Missing")
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    with caplog.at_level(logging.ERROR, "vllm.plugins"):
        load_stat_logger_plugin_factories()
    assert any("Failed to load plugin ppow" in record.getMessage() for record in caplog.records)


# ---------------------------------------------------------------- the dashboard


def vllm_names() -> set[str]:
    """Names of vLLM's own metrics, read from its source: registering them needs a whole engine."""
    import inspect
    import re

    from vllm.v1.metrics import loggers
    from vllm.v1.spec_decode import metrics as spec_decode

    source = inspect.getsource(loggers) + inspect.getsource(spec_decode)
    return set(re.findall(r'"(vllm:\w+)"', source))


def test_every_metric_of_the_dashboard_exists():
    import re

    text = DASHBOARD.read_text()
    dashboard = json.loads(text)
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    used = {name for expression in expressions for name in re.findall(r"(?:ppow|vllm):\w+", expression)}
    ours = {name for name in used if name.startswith("ppow:")}
    assert ours == exported_names(), "the dashboard shows all of ours and no other"
    bare = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in used - ours}
    assert bare
    assert bare <= vllm_names()


def test_dashboard_panels_have_titles_places_and_sources():
    dashboard = json.loads(DASHBOARD.read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["title"]
        assert set(panel["gridPos"]) == {"h", "w", "x", "y"}
        if panel["type"] != "row":
            assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    boxes = [tuple(panel["gridPos"][key] for key in "xywh") for panel in panels]
    for i, (x, y, w, h) in enumerate(boxes):
        assert x + w <= 24
        for other_x, other_y, other_w, other_h in boxes[i + 1 :]:
            apart = x + w <= other_x or other_x + other_w <= x or y + h <= other_y or other_y + other_h <= y
            assert apart, "panels overlap"
    names = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert {"datasource", "model_name"} <= names


def test_the_logger_is_the_declared_one():
    module, _, attribute = declared().partition(":")
    assert module == metrics_logger.__name__
    assert getattr(metrics_logger, attribute) is PPOWStatLogger
