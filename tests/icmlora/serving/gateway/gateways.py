"""Run a gateway in a thread, and ask it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn

from icmlora.serving.folders import AdapterFolders
from icmlora.serving.gateway.server import listen, opened, uvicorn_config
from icmlora.serving.gateway.settings import GatewaySettings
from icmlora.serving.tasks import ServedTasks


@dataclass
class Gateway:
    """A running gateway.

    Attributes:
        url: Its address.
        client: A client of it.
        folders: Where it writes adapters.
    """

    url: str
    client: httpx.Client
    folders: AdapterFolders

    def ask(self, model: object = "rules", path: str = "/v1/chat/completions", **fields: object) -> Any:
        """Send a request for a model."""
        return self.client.post(path, json={"model": model, **fields})

    def metric(self, line: str) -> float:
        """Return the value of one line of the metrics."""
        lines = self.client.get("/metrics").text.splitlines()
        return sum(float(found.rpartition(" ")[2]) for found in lines if found.startswith(line))


@contextmanager
def running_gateway(tasks: ServedTasks, folders: AdapterFolders, settings: GatewaySettings) -> Iterator[str]:
    """Run a gateway in a thread, as `icm serve` does but for signals; yield its URL."""
    listening, ready, stop = listen("127.0.0.1", 0), threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def run() -> None:
        async with opened(tasks, folders, settings) as app:
            server = uvicorn.Server(uvicorn_config(app, settings))
            serving = asyncio.ensure_future(server.serve([listening]))
            ready.set()
            await stop.wait()
            server.should_exit = server.force_exit = True
            await serving

    thread = threading.Thread(target=lambda: loop.run_until_complete(run()))
    thread.start()
    try:
        ready.wait()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()
        listening.close()


def wait_for(condition: Callable[[], Any]) -> None:
    """Wait until something is so; the test fails if it never is."""
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


StartGateway = Callable[..., Gateway]
