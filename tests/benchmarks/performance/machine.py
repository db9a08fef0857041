"""What the figures were measured on, without names of hosts or folders."""

from __future__ import annotations

import os
import platform
import resource
import sys
from importlib.metadata import version
from pathlib import Path

_PACKAGES = ("icm-lora", "torch", "numpy", "safetensors", "sqlalchemy", "typer")


def describe_machine() -> dict[str, object]:
    """Return cores, processor, versions and how busy the machine was."""
    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "processor": processor(),
        "system": f"{platform.system()} {platform.machine()}",
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in _PACKAGES},
    }


def peak_memory() -> int:
    """Return the most memory that this process has held since its program began, in bytes.

    What `getrusage` says begins, on Linux, with the memory of the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def processor() -> str:
    """Return the processor's model as the operating system says it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def describe_fleet(weights: list[Path]) -> str:
    """Return how much a fleet is: "20 tasks, 120 weight files, 115.3 MiB"."""
    size = sum(path.stat().st_size for path in weights)
    return f"{len(weights)} weight files, {size / 2**20:.1f} MiB"


def weight_files(fleet: Path) -> list[Path]:
    """Return the weight files below a folder, checkpoints included."""
    return sorted(fleet.rglob("adapter_model.safetensors"))
