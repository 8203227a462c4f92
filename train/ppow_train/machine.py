"""What the machine has: free memory, and how much of it was in use at most. Left out: what a run takes (memory.py)."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import torch

from ppow_train.errors import UserError


def choose_device(wanted: str | None) -> str:
    """`cpu` or `cuda`, as wanted; without a wish CUDA where there is a device.

    Raises:
        UserError: CUDA is wanted and torch sees no device.
    """
    if wanted is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda needs a CUDA device, and torch sees none: give --device cpu, or a torch that fits."
        )
    return wanted


def available_bytes(device: torch.device, root: Path = Path("/")) -> int:
    """Memory that this process can still take: free memory of a CUDA device, or of the machine and its cgroup (Linux).

    Args:
        device: where models run.
        root: of the file system that the kernel's figures are read from.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    fields = dict(line.split(":") for line in (root / "proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    return min([available, *_cgroup_room(root)])


def processes_here(device: torch.device) -> int:
    """Processes of a run that share the memory of `device`: on a CPU all that the launcher started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1


def _cgroup_room(root: Path) -> list[int]:
    """Room under every limit (cgroup v2) that holds for this process; file cache that can be dropped counts as room."""
    own = [line.removeprefix("0::/") for line in _lines(root / "proc/self/cgroup") if line.startswith("0::/")]
    mounted = root / "sys/fs/cgroup"
    groups = [
        mounted,
        *(
            mounted.joinpath(*Path(name).parts[:n])
            for name in own
            for n in range(1, len(Path(name).parts) + 1)
        ),
    ]
    rooms = []
    for group in groups:
        limit = "".join(_lines(group / "memory.max"))
        if limit.isdigit():
            used = int("".join(_lines(group / "memory.current")))
            stat = dict(line.split() for line in _lines(group / "memory.stat"))
            rooms.append(int(limit) - used + int(stat.get("inactive_file", 0)))
    return rooms


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.is_file() else []


def peak_bytes(device: torch.device) -> int:
    """The most memory that was in use: allocated on a CUDA device, or resident in this process since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux


def gib(count: float) -> str:
    """Bytes for a reader."""
    return f"{count / 2**30:.2f} GiB"
