"""The tests of serving that say something else on a GPU than on a CPU, each group a step of its own.

Left out: what they assert (tests/e2e), and tests that start `vllm serve`, which takes the whole GPU (`make test`).
"""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[3] / "tests" / "e2e"
# Step -> arguments of pytest. The groups are as long as ten minutes hold on a slow host.
GROUPS: dict[str, tuple[str, ...]] = {
    "tests-sampling": ("test_distribution.py",),
    "tests-window": ("test_adaptive_window.py",),
    "tests-hot-swap-eagle3": ("test_hot_swap.py", "-k", "eagle3"),
    "tests-hot-swap-causal-lm": ("test_hot_swap.py", "-k", "not eagle3"),
    "tests-in-process": ("test_in_process.py",),
    "tests-data": ("test_data_engines.py",),
    "tests-features-fixed": ("test_features.py", "-k", "fixed"),
    "tests-features-adaptive": ("test_features.py", "-k", "not fixed"),
}


def run(group: str, output: Path) -> dict[str, Any]:
    """Run a group's tests in a process of their own.

    Returns:
        numbers of tests that passed and were skipped.

    Raises:
        SystemExit: one failed, or none ran; pytest's own report is on stdout.
    """
    file, *selected = GROUPS[group]
    report = output / f"{group}.xml"
    command = [sys.executable, "-m", "pytest", "-q", str(TESTS / file), *selected, f"--junitxml={report}"]
    code = subprocess.run(command, cwd=TESTS.parents[1], check=False).returncode
    counts = counted(report) if report.exists() else {"passed": 0, "skipped": 0, "failed": 0}
    if code or not counts["passed"]:
        raise SystemExit(f"{group}: {counts['failed']} tests failed, {counts['passed']} passed: see above.")
    return {"tests": {"arguments": [file, *selected], **counts}}


def counted(report: Path) -> dict[str, int]:
    """What pytest's XML report says."""
    suite = ET.parse(report).getroot().find("testsuite")
    assert suite is not None
    found = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = found["failures"] + found["errors"]
    return {
        "passed": found["tests"] - failed - found["skipped"],
        "skipped": found["skipped"],
        "failed": failed,
    }
