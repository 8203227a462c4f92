"""The report of the window's counts: written whole, seldom, by one user; read back or not at all; never an error."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_ppow.window_report import (
    FORMAT,
    INTERVAL_S,
    ReportWriter,
    begin_report,
    read_report,
    report_path,
)


@dataclasses.dataclass
class Counts:
    chosen: list[int]
    speedup: float = 0.0


def config(instance="ab12c", index=0, api_servers=1):
    parallel = SimpleNamespace(data_parallel_index=index, _api_process_count=api_servers)
    return SimpleNamespace(instance_id=instance, parallel_config=parallel)


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", str(tmp_path))
    return tmp_path


@pytest.fixture
def read(base):
    """The report of `config()`, begun by a reader."""
    path = report_path(config(), 0)
    begin_report(path)
    return path


def test_what_is_written_is_read(base, read):
    writer = ReportWriter(config())
    writer.write(Counts([1, 2], 3.5))
    assert read_report(report_path(config(), 0)) == {"format": FORMAT, "chosen": [1, 2], "speedup": 3.5}
    assert [entry.name for entry in base.iterdir()] == [writer.path.name], "no temporary file stays"
    assert writer.path.stat().st_mode & 0o077 == 0, "of this user alone"
    with writer.path.open() as reader:
        writer.write(Counts([3, 4]), at_once=True)
        assert json.load(reader)["chosen"] == [1, 2], "who reads meanwhile sees the old one whole"
    writer.close()
    writer.close()
    assert read_report(writer.path) is None


def test_nothing_is_written_where_nobody_reads(base):
    """An `LLM` in a script that is killed leaves nothing behind."""
    ReportWriter(config()).write(Counts([1]))
    assert list(base.iterdir()) == []


def test_a_reader_begins_with_what_is_written_after_it(base, read):
    ReportWriter(config()).write(Counts([7]))
    begin_report(read)
    assert read_report(read) is None, "an earlier server's"
    assert read.stat().st_mode & 0o777 == 0o600


def test_a_place_that_cannot_be_had_stops_neither_side(base, caplog):
    path = report_path(config(), 0)
    path.mkdir()
    with caplog.at_level(logging.WARNING, "vllm.ppow.metrics"):
        begin_report(path)
    assert "cannot reach /metrics" in caplog.text
    ReportWriter(config()).close()
    assert path.is_dir()


def test_the_server_finds_every_engines_file(base):
    assert ReportWriter(config(index=3)).path == report_path(config(), 3) != report_path(config(), 0)
    assert ReportWriter(config("ab12c_dp3", 3)).path == report_path(config(), 3), (
        "Ray adds the number to the id"
    )
    assert report_path(config("other"), 0) != report_path(config(), 0)


def test_the_engine_writes_to_memory_where_there_is_some(base, monkeypatch):
    """Replacing a file on a disk that is busy may take long, and every request would wait for it."""
    from vllm_ppow import window_report

    monkeypatch.delenv("VLLM_RPC_BASE_PATH")
    monkeypatch.setattr(window_report, "_MEMORY", str(base))
    assert ReportWriter(config()).path == report_path(config(), 0)
    assert report_path(config(), 0).parent == base
    monkeypatch.setattr(window_report, "_MEMORY", str(base / "none"))
    assert report_path(config(), 0).parent == Path(tempfile.gettempdir())


def test_several_api_servers_find_the_file_by_the_directory_they_share(base, monkeypatch):
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(base / "shared"))
    engine = ReportWriter(config("engine", api_servers=2))
    assert engine.path == report_path(config("server", api_servers=2), 0)
    assert engine.path.parent == base / "shared"
    assert report_path(config(), 0).parent == base, (
        "one API server: what the user set there may be shared by others"
    )


def test_at_most_one_file_a_second(base, read):
    now = [0.0]
    writer = ReportWriter(config(), clock=lambda: now[0])
    for step in range(100):
        now[0] = step * INTERVAL_S / 50
        writer.write(Counts([step]))
    assert read_report(writer.path)["chosen"] == [50]
    writer.write(Counts([99]), at_once=True)
    assert read_report(writer.path)["chosen"] == [99]


def test_memory_that_is_full_is_said_once_and_tried_again(base, read, caplog, monkeypatch):
    now, full = [0.0], True
    writer = ReportWriter(config(), clock=lambda: now[0])
    replace = writer._replace

    def failing(text):
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(text)

    monkeypatch.setattr(writer, "_replace", failing)
    with caplog.at_level(logging.WARNING, "vllm.ppow.metrics"):
        for second in range(200):
            now[0], full = float(second), second < 150
            writer.write(Counts([second]))
    assert [record.getMessage()[:60] for record in caplog.records] == [
        "The draft window's counts cannot reach /metrics; serving goe"
    ]
    assert read_report(writer.path)["chosen"][0] >= 180


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 99}', "\xff"])
def test_what_is_no_report_is_none(base, text):
    path = base / "report.json"
    path.write_text(text, encoding="latin-1")
    assert read_report(path) is None


def test_links_pipes_and_large_files_are_not_read(base):
    good = base / "good.json"
    good.write_text(json.dumps({"format": FORMAT}))
    assert read_report(good) is not None
    link, pipe, large = base / "link", base / "pipe", base / "large"
    link.symlink_to(good)
    os.mkfifo(pipe)
    large.write_text(json.dumps({"format": FORMAT, "x": "y" * (2 << 20)}))
    assert [read_report(path) for path in (link, pipe, large)] == [None, None, None]
