"""Two machines on one team's store: one ingests and trains while the other materializes and serves; then a crowd.

    python -m tests.benchmarks.team.two_machines [--seconds 300] [--writers 8] [--readers 8] [--out FILE.json]

A machine is a group of processes with a home and a cache of its own; the store is PostgreSQL + S3. First, machine A
takes in 20 tasks and trains, and machine B asks for every task that it sees, as a folder and as an engine would, until
A is done; then both write all tasks and must write the same bytes. After that, 8 processes of A write (ingest, edit,
encode, evict, remove, prune) and 8 of B read (list, show, materialize, serve, stats, verify) for five minutes. An error
is anything but an answer; a wait is what one call took.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tests.benchmarks.performance.machine import describe_machine
from tests.benchmarks.team.stores import PAIRS, new_store, servers

RESULT = Path(__file__).parents[1] / "results" / "two-machines.json"
_TASKS = 20
_PATIENCE = 300.0  # seconds, for `--lock-timeout`
_STEPS = 20


def _be(machine: Path) -> None:
    """Let this process be one of a machine."""
    for name, folder in {"HOME": "home", "XDG_CACHE_HOME": "cache"}.items():
        (machine / folder).mkdir(parents=True, exist_ok=True)
        os.environ[name] = str(machine / folder)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def _fleet(machine: Path, store: str) -> Any:
    _be(machine)
    import torch

    from icmlora import Fleet

    torch.set_num_threads(1)
    return Fleet(store, cache=machine / "cache", lock_timeout=_PATIENCE)


def grow(machine: Path, store: str, adapters: Path, told: Any) -> None:
    """Ingest one task after the other, then train."""
    fleet = _fleet(machine, store)
    for folder in sorted(adapters.iterdir()):
        fleet.ingest([folder], vectors=False)
    fleet.train(steps=_STEPS, refine=0, evaluate=False)
    told.put("done")


def use(machine: Path, store: str, told: Any, done: Any) -> None:
    """Ask for every task there is, again and again, until the other machine is done."""
    fleet, asked, errors, longest = _fleet(machine, store), 0, list[str](), 0.0
    from icmlora.serving.tasks import open_tasks

    served = open_tasks(store, None, command="engine", lock_timeout=_PATIENCE)
    while not done.is_set():
        for name in (row.name for row in fleet.tasks()):
            began = time.monotonic()
            try:
                fleet.materialize(name, machine / "out", force=True)
                task = served.find(name)
                assert task is not None
                served.write(task, machine / "served")
                shutil.rmtree(machine / "served")
            except Exception as error:
                errors.append(f"{type(error).__name__}: {error}"[:300])
            asked, longest = asked + 1, max(longest, time.monotonic() - began)
    told.put({"asked": asked, "errors": errors, "longest_seconds": round(longest, 2)})


def write_all(machine: Path, store: str, told: Any) -> None:
    """Write every task from its code, and tell the digests."""
    import hashlib

    fleet, found = _fleet(machine, store), {}
    for name in (row.name for row in fleet.tasks()):
        files = fleet.read_files(name, source="code")
        found[name] = hashlib.sha256(b"".join(files[key] for key in sorted(files))).hexdigest()
    told.put(found)


def work(machine: Path, store: str, kind: str, number: int, seconds: float, ready: Any, told: Any) -> None:
    """Make one call after the other once all are ready, and tell what each took."""
    fleet, draw = _fleet(machine, store), random.Random(f"{kind} {number}")
    own = machine / f"{kind}-{number}"
    own.mkdir(exist_ok=True)
    calls = _writes(fleet, own, number, draw) if kind == "writer" else _reads(fleet, store, own, draw)
    took: dict[str, list[float]] = {name: [] for name in calls}
    errors: list[str] = []
    ready.wait()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        name = draw.choice([*calls])
        began = time.monotonic()
        try:
            calls[name]()
        except Exception as error:
            errors.append(f"{name}: {type(error).__name__}: {error}"[:300])
        took[name].append(time.monotonic() - began)
    told.put((took, errors))


def _writes(fleet: Any, own: Path, number: int, draw: random.Random) -> dict[str, Callable[[], object]]:
    """Return what a writer does: with tasks of its own, and with those of all."""
    from tests.benchmarks.many_tasks import build

    mine: list[str] = []
    numbers = count(100_000 * (number + 1))

    def ingest() -> None:
        name = f"task-{next(numbers):06d}"
        build(own, int(name[5:]), 1)
        fleet.ingest([own / name], vectors=False)
        mine.append(name)

    def remove() -> None:
        if mine:
            fleet.remove([mine[0]])
            del mine[0]

    return {
        "ingest": ingest,
        "edit": lambda: fleet.edit([f"task-{draw.randrange(_TASKS):06d}"], add_tags=[f"w{number}"]),
        "encode": lambda: fleet.encode(mine[-1:] or None, max_error=0.9),
        "evict": lambda: fleet.evict([f"task-{draw.randrange(_TASKS):06d}"], max_error=10.0),
        "remove": remove,
        "prune": fleet.prune,
    }


def _reads(fleet: Any, store: str, own: Path, draw: random.Random) -> dict[str, Callable[[], object]]:
    """Return what a reader does."""
    from icmlora.serving.tasks import open_tasks

    served = open_tasks(store, None, command="engine", lock_timeout=_PATIENCE)

    def one() -> str:
        return f"task-{draw.randrange(_TASKS):06d}"

    def serve() -> None:
        task = served.find(one())
        assert task is not None
        served.write(task, own / "served")
        shutil.rmtree(own / "served")

    return {
        "ls": fleet.tasks,
        "show": lambda: fleet.show(one()),
        "materialize": lambda: fleet.materialize(one(), own / "out", source="code", force=True),
        "serve": serve,
        "stats": fleet.stats,
        "verify": lambda: list(fleet.verify()),
    }


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0, help="how long the crowd works (default 300)")
    parser.add_argument("--writers", type=int, default=8)
    parser.add_argument("--readers", type=int, default=8)
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="team-") as folder, servers(Path(folder) / "servers") as at:
        store = new_store(PAIRS[-1], Path(folder), at)
        document = {
            "one grows, the other uses": _two(Path(folder), store),
            "crowd": _crowd(Path(folder), store, options.seconds, options.writers, options.readers),
        }
    document |= {"date": datetime.now(UTC).date().isoformat(), "machine": describe_machine()}
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=1))


def _two(folder: Path, store: str) -> dict[str, Any]:
    spawn = get_context("spawn")
    building = spawn.Process(target=_build, args=(folder / "adapters", _TASKS))
    building.start()
    building.join()
    done, grown, used = spawn.Event(), spawn.Queue(), spawn.Queue()
    a, b = folder / "a", folder / "b"
    growing = spawn.Process(target=grow, args=(a, store, folder / "adapters", grown))
    using = spawn.Process(target=use, args=(b, store, used, done))
    growing.start()
    using.start()
    growing.join()
    done.set()
    found = dict(used.get())
    using.join()
    found["grown"] = growing.exitcode == 0 and grown.get() == "done"
    digests = []
    for machine in (a, b):
        telling = spawn.Queue()
        writing = spawn.Process(target=write_all, args=(machine, store, telling))
        writing.start()
        digests.append(telling.get())
        writing.join()
    found |= {"tasks": len(digests[0]), "same_bytes_on_both": len(digests[0]) == _TASKS and digests[0] == digests[1]}
    print(json.dumps(found), flush=True)
    return found


def _build(folder: Path, count: int) -> None:
    from tests.benchmarks.many_tasks import build

    build(folder, 0, count)


def _crowd(folder: Path, store: str, seconds: float, writers: int, readers: int) -> dict[str, Any]:
    from registry.store import Store

    spawn = get_context("spawn")
    ready, told = spawn.Barrier(writers + readers), spawn.Queue()
    crowd = [
        spawn.Process(target=work, args=(folder / machine, store, kind, number, seconds, ready, told))
        for machine, kind, count in (("a", "writer", writers), ("b", "reader", readers))
        for number in range(count)
    ]
    for process in crowd:
        process.start()
    took: dict[str, list[float]] = {}
    errors: list[str] = []
    for _ in crowd:
        more, wrong = told.get(timeout=seconds + 600)
        errors += wrong
        for name, some in more.items():
            took.setdefault(name, []).extend(some)
    for process in crowd:
        process.join()
    with Store.open(store, read_only=True) as opened:
        # Bytes that no row needs any more stay in a bucket for a day.
        findings = [str(finding) for finding in opened.verify(read_data=True) if finding.kind != "orphan"]
    calls = {
        name: {"calls": len(some), "median": round(statistics.median(some), 2), "longest": round(max(some), 2)}
        for name, some in took.items()
        if some
    }
    longest = max(calls, key=lambda name: calls[name]["longest"])
    return {
        "writers": writers,
        "readers": readers,
        "seconds": seconds,
        "errors": errors,
        "calls": sum(len(some) for some in took.values()),
        "longest_wait": {"call": longest, "seconds": calls[longest]["longest"]},
        "sound_in_the_end": not findings,
        "findings": findings[:20],
        "each": calls,
    }


if __name__ == "__main__":
    main()
