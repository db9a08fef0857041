"""Ask a real vLLM for tasks of a team's store while its database and its bucket are away.

    python -m tests.benchmarks.serving.outage STORE BASE --fleet DIR --vllm PYTHON [--out FILE.json]

The tasks of STORE, a folder, are copied to a store in PostgreSQL and a bucket, which are reached by way
of servers that can be away. Once vLLM has the plug-in, and once it is behind `icm serve` with room for four adapters,
each time with an empty cache:

    before   half of the tasks are asked for
    away     both servers refuse: the same tasks again, then the others, which nobody knows yet
    back     the others are asked for until each has answered; seconds from the end of the outage

Texts are greedy and have to be those from before; the others' are compared with those of the other way.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

from icmlora import Fleet
from tests.benchmarks.performance.machine import describe_machine
from tests.benchmarks.serving.vllm import Server, engine, gateway, parser_of, prompts_of, started, version
from tests.benchmarks.team.stores import PAIRS, new_store, servers
from tests.pg_proxy import MovingServer
from tests.s3_faults import Fault, FaultyServer, refuses

RESULT = Path(__file__).parents[1] / "results" / "outage.json"
_LOADED = 4  # adapters that the gateway lets the engine have
_PATIENCE = 60.0  # seconds


@dataclass(frozen=True)
class Team:
    """A store whose servers can be away."""

    url: str
    database: MovingServer
    bucket: FaultyServer

    @contextmanager
    def away(self) -> Iterator[None]:
        """Let both servers be away for a block."""
        self.bucket.faults = [Fault("", float("inf"), before=refuses(503))]
        self.database.leave()
        yield
        self.bucket.faults = []
        self.database.come_back()


def main() -> None:
    """Measure, print, write JSON."""
    options = parser_of(__doc__, RESULT).parse_args()
    with tempfile.TemporaryDirectory(prefix="outage-") as folder, team(options, Path(folder)) as store:
        work = Path(folder) / "work"
        (work / "folders").mkdir(parents=True)  # vLLM's own resolver insists on it
        options.store = store.url
        prompts = prompts_of(Fleet(store.url), options.fleet)
        with engine(options, work) as server:
            plug_in = measure(store, server, prompts)
        with (
            started(options, work, plug_in=False) as alone,
            gateway(options, work, alone, "--max-adapters", str(_LOADED)) as server,
        ):
            behind = measure(store, server, prompts)
    texts = [found.pop("texts") for found in (plug_in, behind)]
    document = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe_machine(),
        "vllm": version(options.vllm),
        "tasks": len(prompts),
        "equal_both_ways": sum(text == texts[1][task] for task, text in texts[0].items()),
        "plug-in": plug_in,
        "gateway": behind,
    }
    options.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=1))


@contextmanager
def team(options: argparse.Namespace, folder: Path) -> Iterator[Team]:
    """Copy the store to one whose servers can be away."""
    with servers(folder / "servers") as at, tempfile.TemporaryDirectory() as socket:
        url = new_store(PAIRS[-1], folder, at)
        Fleet(options.store).copy(url)
        database, bucket = MovingServer(at.database, Path(socket)), FaultyServer(at.objects.endpoint)
        home = {"HOME": str(folder / "home"), "XDG_CACHE_HOME": str(folder / "cache")}
        with (
            database.running(),
            bucket.running(),
            mock.patch.dict(os.environ, {"AWS_ENDPOINT_URL": bucket.endpoint, **home}),
        ):
            yield Team(database.address(url), database, bucket)


def measure(store: Team, server: Server, prompts: dict[str, str]) -> dict[str, Any]:
    """Ask before, during and after an outage."""
    known, others = list(prompts)[::2], list(prompts)[1::2]
    texts = {task: server.complete(task, prompts[task]) for task in known}
    with store.away():
        again = [answer(server, task, prompts[task]) for task in known]
        refused = [answer(server, task, prompts[task]) for task in others]
    begun = time.monotonic()
    back = {task: wait_for(server, task, prompts[task]) for task in others}
    return {
        "known": len(known),
        "equal_while_away": sum(found["text"] == texts[task] for task, found in zip(known, again, strict=True)),
        "longest_while_away": max(found["seconds"] for found in again),
        "others": len(others),
        "statuses_while_away": sorted({found["status"] for found in refused}),
        "messages_while_away": sorted({found["message"] for found in refused}),
        "longest_refusal": max(found["seconds"] for found in refused),
        "answered_after": sum(bool(text) for text in back.values()),
        "seconds_until_all_answered": round(time.monotonic() - begun, 2),
        "texts": texts | back,
    }


def answer(server: Server, task: str, prompt: str) -> dict[str, Any]:
    """Return what became of a request."""
    started = time.monotonic()
    try:
        found: dict[str, Any] = {"status": 200, "text": server.complete(task, prompt), "message": ""}
    except urllib.error.HTTPError as error:
        message = json.loads(error.read())["error"]["message"]
        found = {"status": error.code, "text": None, "message": message.partition(": ")[0]}  # the rest has addresses
    return found | {"seconds": round(time.monotonic() - started, 2)}


def wait_for(server: Server, task: str, prompt: str) -> str:
    """Ask until there is an answer, as a client does that is told to try again."""
    until = time.monotonic() + _PATIENCE
    while (found := answer(server, task, prompt))["status"] == 503 and time.monotonic() < until:
        time.sleep(0.5)
    return found["text"] or ""


if __name__ == "__main__":
    main()
