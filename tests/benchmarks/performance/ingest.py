"""Ingest against hashing: the promise is half the speed of reading and hashing the same files in one thread.

Both work on files that the page cache has. Ingest makes its store anew each time, and every byte and row is synced.
Imports are no work on the fleet's files, so the promise is measured inside one process; whole processes are shown too.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path

from icmlora import Fleet
from tests.benchmarks.performance.commands import icm, process
from tests.benchmarks.performance.figures import Figure, seconds
from tests.benchmarks.performance.machine import weight_files
from tests.benchmarks.performance.runs import alternate, ratio, walls

_HASH = """import hashlib, sys
for path in sys.argv[1:]:
    hashlib.sha256(open(path, "rb").read()).hexdigest()
"""


def measure_ingest(fleet: Path, work: Path, runs: int) -> list[Figure]:
    """Measure ingest and hashing in turn, in this process and as whole processes."""
    files, stores = weight_files(fleet), work / "ingested"
    names = [str(path) for path in files]
    hashing_alone = [sys.executable, "-c", _HASH, *names]
    inside = alternate({"hash": lambda: _hash(files), "ingest": lambda: _ingest(fleet, _new(stores))}, runs)
    shutil.rmtree(stores)

    def whole() -> None:
        process(icm("--quiet", "ingest", str(fleet), "--no-vectors", store=_new(stores)))

    outside = alternate({"hash": lambda: process(hashing_alone), "ingest": whole}, runs)
    shutil.rmtree(stores)
    hashing, ingesting = walls(inside["hash"]), walls(inside["ingest"])
    speeds = tuple(round(first / second, 3) for first, second in zip(hashing, ingesting, strict=True))
    return [
        Figure("speed of ingest, of that of hashing", ratio(hashing, ingesting), "ratio", 0.5, "at least", speeds),
        seconds("hashing the weights", hashing),
        seconds("hashing the weights, processor time", [round(run.cpu, 4) for run in inside["hash"]]),
        seconds("ingest", ingesting),
        seconds("ingest, processor time of all threads", [round(run.cpu, 4) for run in inside["ingest"]]),
        seconds("hashing the weights, whole process", walls(outside["hash"])),
        seconds("icm ingest --no-vectors, whole process", walls(outside["ingest"])),
    ]


def _hash(files: list[Path]) -> None:
    for path in files:
        hashlib.sha256(path.read_bytes()).hexdigest()


def _ingest(fleet: Path, store: Path) -> None:
    Fleet(store).ingest([fleet])


def _new(stores: Path) -> Path:
    """Return a folder for one more store; the others stay for now, because removing them is no part of an ingest."""
    stores.mkdir(exist_ok=True)
    return stores / str(len(list(stores.iterdir())))
