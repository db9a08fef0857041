"""Run `icm` as a process of its own, and say what it took. Imports nothing large: a child's peak has its parent's."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[3]
_ICM = "from icm_cli.app import main; main()"


class Run(NamedTuple):
    """What a command took."""

    seconds: float
    processor: float
    memory: int


def icm(store: str, *arguments: str, cache: Path, environment: Mapping[str, str] | None = None) -> Run:
    """Run a command on a store; ends this process if it fails."""
    command = [sys.executable, "-c", _ICM, "--store", store, *arguments]
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cache), "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(
            command, env={**os.environ, **own, **(environment or {})}, stdout=subprocess.DEVNULL, stderr=said
        ) as running,
    ):
        _, status, usage = os.wait4(running.pid, 0)
        seconds = time.perf_counter() - started
        running.returncode = os.waitstatus_to_exitcode(status)
        if running.returncode:
            said.seek(0)
            sys.exit(f"icm {' '.join(arguments[:2])}: exit {running.returncode}\n{said.read()[-2000:]}")
    return Run(round(seconds, 3), round(usage.ru_utime + usage.ru_stime, 3), usage.ru_maxrss * 1024)


def least(runs: list[Run]) -> dict[str, float]:
    """Return the least of each figure."""
    seconds, processor, memory = map(min, zip(*runs, strict=True))
    return {"seconds": seconds, "processor_seconds": processor, "peak_memory": memory}
