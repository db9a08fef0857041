"""Ask 50 tasks at a steady rate through `icm serve`, and the engine itself beside it.

    python -m tests.benchmarks.serving.gateway [--minutes 10] [--rate 20] [--tasks 50] [--out FILE.json]

Engine, gateway and client are three processes on loopback. The engine is a stand-in that answers at once, so what is
measured is the gateway. The loop is open: requests start by the clock, whether earlier ones have ended or not. Each is
sent twice, to the gateway and to the engine, in alternating order; every other one is streamed.

    overhead   seconds to the end of the answer through the gateway, less those of the same request without it;
               warm tasks only. Percentiles of the pairs, and those of both sides
    cold       seconds of the first request for a task, whose adapter is decoded and loaded
    memory     of the gateway's process, at the start (all tasks loaded) and after each minute
    lost       requests without a complete answer of status 200
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from tests.benchmarks.performance.machine import describe_machine

RESULT = Path(__file__).parents[1] / "results" / "gateway.json"
ROUTE = "/v1/chat/completions"


@dataclass
class Run:
    """What was measured."""

    pairs: list[tuple[float, float]] = field(default_factory=list)  # through the gateway, and without it
    cold: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)  # bytes
    lost: list[str] = field(default_factory=list)
    sent: int = 0


def main() -> None:
    """Measure, print, write JSON."""
    options = _options()
    if options.engine is not None:
        _run_engine(options.engine)
        return
    with tempfile.TemporaryDirectory(prefix="gateway-") as folder:
        store, base = build(Path(folder), options.tasks)
        with _started(_engine_command(base)) as engine:
            command = ["serve", "--engine-url", engine.url, "--adapters", f"{folder}/adapters", "--port", "0"]
            with _started([sys.executable, "-c", _ICM, "--store", str(store), *command]) as gateway:
                run = asyncio.run(measure(options, gateway, engine.url))
    document = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe_machine(),
        "minutes": options.minutes,
        "rate": options.rate,
        "tasks": options.tasks,
        **summary(run),
    }
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=1))


_ICM = "from icm_cli.app import main; main()"


def build(folder: Path, tasks: int) -> tuple[Path, Path]:
    """Make a store of tasks that exist only as codes, and their base model."""
    from tests.cli.tiny_fleet import icm_quietly, train_store, write_lora
    from tests.icmlora.tiny_base import LABEL, write_tiny_base

    store, base = folder / "store", write_tiny_base(folder / "base")
    for number in range(tasks):
        write_lora(folder / "loras" / f"task-{number:03d}", seed=number, rank=4)
    icm_quietly(store, "base", "add", LABEL, base)
    icm_quietly(store, "ingest", folder / "loras", "--no-vectors")
    train_store(store)
    icm_quietly(store, "evict", "--max-error", "0.9")
    return store, base


async def measure(options: argparse.Namespace, gateway: Process, engine_url: str) -> Run:
    """Send the requests, and watch the gateway's memory."""
    run = Run()
    limits = httpx.Limits(max_connections=None, keepalive_expiry=3)
    async with (
        httpx.AsyncClient(base_url=gateway.url, limits=limits, timeout=60, trust_env=False) as through,
        httpx.AsyncClient(base_url=engine_url, limits=limits, timeout=60, trust_env=False) as direct,
    ):
        for number in range(options.tasks):
            run.cold.append(await _ask(run, through, number, options.tasks))
        begun, jobs = time.perf_counter(), set[asyncio.Task[None]]()
        total = round(options.minutes * 60 * options.rate)
        run.memory.append(gateway.memory())
        for number in range(total):
            await asyncio.sleep(max(0.0, begun + number / options.rate - time.perf_counter()))
            job = asyncio.create_task(_pair(run, through, direct, number, options.tasks))
            jobs.add(job)
            job.add_done_callback(jobs.discard)
            if (number + 1) % round(60 * options.rate) == 0:
                run.memory.append(gateway.memory())
        await asyncio.gather(*jobs)
        run.memory.append(gateway.memory())
    return run


async def _pair(run: Run, through: httpx.AsyncClient, direct: httpx.AsyncClient, number: int, tasks: int) -> None:
    ways = [through, direct] if number % 4 < 2 else [direct, through]
    seconds = {way: await _ask(run, way, number, tasks) for way in ways}
    run.pairs.append((seconds[through], seconds[direct]))


async def _ask(run: Run, client: httpx.AsyncClient, number: int, tasks: int) -> float:
    run.sent += 1
    body = {"model": f"task-{number % tasks:03d}", "stream": bool(number % 2), "messages": [{"role": "user"}]}
    begun = time.perf_counter()
    try:
        answer = await client.post(ROUTE, json=body)
        if answer.status_code != 200:
            run.lost.append(f"{answer.status_code}: {answer.text[:200]}")
        elif body["stream"] and not answer.text.endswith("data: [DONE]\n\n"):
            run.lost.append("a stream that was cut short")
    except httpx.HTTPError as error:
        run.lost.append(f"{type(error).__name__}: {error}")
    return time.perf_counter() - begun


def summary(run: Run) -> dict[str, Any]:
    """Return the figures, in milliseconds and bytes."""
    through, direct = zip(*run.pairs, strict=True)
    return {
        "requests": run.sent,
        "lost": len(run.lost),
        "reasons": sorted(set(run.lost))[:10],
        "overhead_ms": _percentiles([one - other for one, other in run.pairs]),
        "through_ms": _percentiles(through),
        "direct_ms": _percentiles(direct),
        "cold_ms": _percentiles(run.cold),
        "memory": run.memory,
    }


def _percentiles(seconds: Any) -> dict[str, float]:
    ordered = sorted(seconds)
    places = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {
        name: round(1000 * ordered[min(len(ordered) - 1, int(place * len(ordered)))], 2)
        for name, place in places.items()
    }


class Process:
    """A server in a process of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self._number = process.pid
        self.url = process.stdout.readline().strip()

    def memory(self) -> int:
        """Return the bytes that it holds in memory."""
        pages = int(Path(f"/proc/{self._number}/statm").read_text(encoding="utf-8").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def _started(command: list[str]) -> Iterator[Process]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield Process(process)
    finally:
        process.terminate()
        process.wait()


def _engine_command(base: Path) -> list[str]:
    return [sys.executable, "-m", "tests.benchmarks.serving.gateway", "--engine", str(base)]


def _run_engine(base: Path) -> None:
    from tests.icmlora.serving.gateway.stub_engine import StubEngine, running

    with running(StubEngine(model=str(base))) as url, contextlib.suppress(KeyboardInterrupt):
        print(url, flush=True)
        time.sleep(1e6)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="how long to ask")
    parser.add_argument("--rate", type=float, default=20, help="requests a second")
    parser.add_argument("--tasks", type=int, default=50, help="how many tasks to ask")
    parser.add_argument("--engine", type=Path, help=argparse.SUPPRESS)  # run the stand-in, with this base model
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file to write")
    return parser.parse_args()


if __name__ == "__main__":
    main()
