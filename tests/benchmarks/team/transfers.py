"""What a place far away costs: ingest on each pair, and an 84 MB adapter from its code in S3 beside its own file there.

    python -m tests.benchmarks.team.transfers --fleet DIR [--runs 3] [--parts ingest materialize] [--out FILE.json]

DIR is the fleet of 20. The pairs take turns and the least of the runs counts; ratios are to SQLite + folder. "1 ms
away" has a link with so much delay for each round trip before both servers. The adapter has random factors in the
shapes of Llama 3 8B, rank 16. Fetching is `obstore.get` to a file that is synced; `materialize` is the library's call,
cold with an empty cache folder, in a process that has decoded another adapter before. The slow link waits 20 ms for
each request and sends 50 MB/s.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.benchmarks.performance.machine import describe_machine
from tests.benchmarks.team.commands import ROOT, Run, icm, least
from tests.benchmarks.team.slow_link import SlowLink, to_port, to_unix_socket
from tests.benchmarks.team.stores import PAIRS, Servers, new_store, servers

RESULT = Path(__file__).parents[1] / "results" / "team-transfers.json"
_BUILD = """import sys
from pathlib import Path
from tests.benchmarks.sizes.adapters import build
build("8B", 2, Path(sys.argv[1]), Path(sys.argv[2]))
"""
_MEASURE = """import json, os, shutil, sys, time
from pathlib import Path
import obstore
from icmlora import Fleet
from registry.store import Store
address, work = sys.argv[1], Path(sys.argv[2])
cache, target = work / "cache", work / "fetched"
fleet = Fleet(address, cache=cache)
with Store.open(address, read_only=True) as store:
    digest = store.task("large-00").final.weights
    objects = store.blobs._backend._store
def fetch():
    with target.open("wb") as file:
        for chunk in obstore.get(objects, f"blobs/{digest[0]}/{digest}").stream(min_chunk_size=1 << 20):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
def write():
    fleet.materialize("large-00", work / "adapter", source="code", force=True)
def seconds(function):
    started, processor = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - started, time.process_time() - processor
fleet.materialize("large-01", work / "other", source="code", force=True)
shutil.rmtree(cache)
print(json.dumps({"fetch": seconds(fetch), "cold": seconds(write), "warm": seconds(write)}))
"""


def measure_ingest(at: Servers, fleet: Path, work: Path, runs: int) -> dict[str, Any]:
    """Return pair -> what an ingest of the fleet takes, as figures and as ratios, and the turns of the slow link."""
    taken: dict[str, list[Run]] = {}
    turns: dict[str, int] = {}
    names = (*PAIRS, f"{PAIRS[-1]}, 1 ms away")
    for run in range(runs):
        for name in names if run % 2 else names[::-1]:
            folder = work / f"ingest-{run}-{names.index(name)}"
            folder.mkdir()
            store = new_store(name.partition(",")[0], folder, at)
            with ExitStack() as links:
                environment = {}
                if name not in PAIRS:
                    database, objects = _links(links, at, delay=0.001)
                    store = _through(store, database)
                    environment["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{objects.port}"
                arguments = ("ingest", str(fleet), "--no-vectors")
                took = icm(store, *arguments, cache=folder / "cache", environment=environment)
                if name not in PAIRS:
                    turns = {"database": database.turns, "objects": objects.turns}
            taken.setdefault(name, []).append(took)
            print(run, name, took, turns, flush=True)
            shutil.rmtree(folder)
    found = {name: least(some) for name, some in taken.items()}
    first = found[PAIRS[0]]
    for figures in found.values():
        figures |= {f"{key}_ratio": round(figures[key] / first[key], 2) for key in ("seconds", "processor_seconds")}
    return {"pairs": found, "turns of the last": turns}


def measure_materialize(at: Servers, fleet: Path, work: Path, runs: int) -> dict[str, Any]:
    """Return link -> seconds to fetch an adapter, and to write it from its code, cold and warm."""
    adapters = work / "adapters"
    subprocess.run([sys.executable, "-c", _BUILD, str(adapters), str(fleet)], check=True, cwd=ROOT)
    store = new_store(PAIRS[-1], work, at)
    icm(store, "ingest", str(adapters), "--no-vectors", cache=work / "cache")
    icm(store, "train", "--no-eval", "--refine", "0", "--steps", "2", cache=work / "cache")
    found: dict[str, Any] = {}
    for link, options in {"direct": {}, "20 ms, 50 MB/s": {"delay": 0.02, "rate": 50e6}}.items():
        some = []
        for _ in range(runs):
            with SlowLink(to_port(urlsplit(at.objects.endpoint).netloc), **options).running() as objects:
                own = {} if link == "direct" else {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{objects.port}"}
                environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **own}
                command = [sys.executable, "-c", _MEASURE, store, str(work)]
                done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
            some.append(json.loads(done.stdout))
            print(link, some[-1], flush=True)
        # Each run's own ratio: what else the machine does slows all three of it.
        ratios = {what: min(one[what][0] / one["fetch"][0] for one in some) for what in ("cold", "warm")}
        found[link] = {
            "seconds": {what: round(min(one[what][0] for one in some), 3) for what in some[0]},
            "processor_seconds": {what: round(min(one[what][1] for one in some), 3) for what in some[0]},
            "of fetching": {what: round(value, 2) for what, value in ratios.items()},
        }
    return found


def _links(links: ExitStack, at: Servers, *, delay: float) -> tuple[SlowLink, SlowLink]:
    (folder,) = parse_qs(urlsplit(at.database).query)["host"]
    database = SlowLink(to_unix_socket(f"{folder}/.s.PGSQL.5432"), delay=delay)
    objects = SlowLink(to_port(urlsplit(at.objects.endpoint).netloc), delay=delay)
    return links.enter_context(database.running()), links.enter_context(objects.running())


def _through(address: str, link: SlowLink) -> str:
    return f"postgresql://postgres@127.0.0.1:{link.port}{urlsplit(address).path}"


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fleet", type=Path, required=True, help="folder with the fleet of 20")
    parser.add_argument("--runs", type=int, default=3, help="how often each is measured (default 3)")
    parser.add_argument("--parts", nargs="+", choices=("ingest", "materialize"), default=["ingest", "materialize"])
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file to write; other parts in it stay")
    options = parser.parse_args()
    document = json.loads(options.out.read_text("utf-8")) if options.out.exists() else {}
    with tempfile.TemporaryDirectory(prefix="team-") as folder, servers(Path(folder) / "servers") as at:
        for part in options.parts:
            measured = measure_ingest if part == "ingest" else measure_materialize
            document[part] = measured(at, options.fleet, Path(folder), options.runs)
    document |= {"date": datetime.now(UTC).date().isoformat(), "machine": describe_machine(), "runs": options.runs}
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
