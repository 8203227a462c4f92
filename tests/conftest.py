"""Settings that tests need before vLLM is imported, and the fixtures shared by serving tests."""

from __future__ import annotations

import dataclasses
import os
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "compatibility"))
import records


def _keep_to_own_cores() -> None:
    """Each of several workers (pytest-xdist) has its share of the cores: torch and vLLM would use all that they see."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1 and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        number = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
        os.sched_setaffinity(0, cores[number::workers] or cores)


_keep_to_own_cores()  # before torch is imported

# Engines of tests run inside the test process, on the CPU, with little memory, and never ask the network.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault(
    "VLLM_LOGGING_LEVEL", "INFO"
)  # importing TRL sets ERROR, and log lines are part of what is tested
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    """A small target with an EAGLE-3 head and a causal LM drafter (serving_pair.Pair)."""
    from serving_pair import build_pair

    return build_pair(tmp_path_factory.mktemp("pair"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where torch sees no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch  # here, not above: it takes seconds, and most runs choose no GPU test

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


# ---------------------------------------------------------------- what is run on which vLLM (compatibility/records.py)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record-compatibility", action="store_true", help="add this run to tests/compatibility/*.json"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("record_compatibility"):
        if config.getoption("numprocesses", None):
            raise pytest.UsageError("--record-compatibility takes one process: leave -n out.")
        if config.option.keyword or config.option.markexpr or any("::" in one for one in config.args):
            raise pytest.UsageError(
                "--record-compatibility takes whole files or folders only, without -k, -m and ::."
            )
        config.pluginmanager.register(CompatibilityRecorder(), "compatibility-recorder")


class CompatibilityRecorder:
    """Collects the outcome of each test and writes them when all have run."""

    def __init__(self) -> None:
        self.subjects: dict[str, records.Subject] = {}
        self.outcomes: dict[str, str] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        installed = _installed_vllm()
        for item in items:
            # Tests of recorded wheels have their version as a parameter.
            version = getattr(item, "callspec", None) and item.callspec.params.get("version")
            recorded = version and _recorded_vllm(version)
            is_installed = not recorded or dataclasses.replace(recorded, how=installed.how) == installed
            self.subjects[item.nodeid] = installed if is_installed else recorded

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        says_something = report.when == "call" or report.outcome != "passed"
        if says_something and self.outcomes.get(report.nodeid) != "failed":
            self.outcomes[report.nodeid] = report.outcome

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            return  # interrupted: this was not the whole
        packages = ("torch", "transformers", "trl", "speculators")
        environment = {
            "python": ".".join(map(str, sys.version_info[:3])),
            **{n: metadata.version(n) for n in packages},
        }
        found = [(self.subjects[n], a, o) for n, o in self.outcomes.items() if (a := records.area(n))]
        records.record(records.FOLDER, found, datetime.now(UTC).date().isoformat(), environment)


def _installed_vllm() -> records.Subject:
    names = {dist.name for dist in metadata.distributions()}
    distribution = "vllm-cpu" if "vllm-cpu" in names else "vllm"
    return records.Subject(distribution, metadata.version(distribution).partition("+")[0], "installed")


def _recorded_vllm(version: str) -> records.Subject:
    from test_recorded_versions import recording

    return records.Subject(recording(version)["distribution"], version, "signatures")
