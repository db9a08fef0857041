"""Run the gateway: listen, serve and finish the requests in flight before stopping."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from functools import partial

import httpx
import uvicorn

from icmlora.io.text import counted
from icmlora.serving.folders import AdapterFolders
from icmlora.serving.gateway.app import GatewayApp
from icmlora.serving.gateway.connection import Connection
from icmlora.serving.gateway.forward import Forwarder
from icmlora.serving.gateway.metrics import Metrics
from icmlora.serving.gateway.problems import HttpProblem
from icmlora.serving.gateway.protocol import GuardedProtocol, NoDescriptors, allowed
from icmlora.serving.gateway.residency import Residency
from icmlora.serving.gateway.settings import GatewaySettings
from icmlora.serving.tasks import ServedTasks

_QUEUE = 2048
"""Length of the system's queue of connections to accept."""
_THREADS = 4  # for writing adapters
_KEPT_ALIVE = 3.0
"""Seconds for which an idle connection to the engine is reused: both engines close theirs after 5."""
_CONNECT_TIMEOUT = 5.0  # seconds for a connection to the engine
_LIST_TIMEOUT = 10.0  # seconds for an engine to list its models
_CLIENT_KEPT_ALIVE = 75  # seconds, longer than load balancers keep their connections

_log = logging.getLogger(__name__)


def serve(listening: socket.socket, tasks: ServedTasks, folders: AdapterFolders, settings: GatewaySettings) -> None:
    """Serve on a socket until SIGTERM or SIGINT. A second signal cancels requests in flight."""
    logging.getLogger("uvicorn.error").addFilter(_is_news)

    async def run() -> None:
        async with opened(tasks, folders, settings) as app:
            server = _Server(uvicorn_config(app, settings))
            loop = asyncio.get_running_loop()
            loop.set_exception_handler(NoDescriptors())
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, server.stop)
            await server.serve([listening])

    asyncio.run(run())


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that already listens; raise `OSError` with its address if that fails."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    found = socket.socket(family, kind, protocol)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(_QUEUE)
    except OSError as error:
        found.close()
        raise OSError(error.errno, error.strerror or os.strerror(error.errno or 0), f"{host}:{port}") from error
    return found


@asynccontextmanager
async def opened(tasks: ServedTasks, folders: AdapterFolders, settings: GatewaySettings) -> AsyncIterator[GatewayApp]:
    """Yield the application with all of its components."""
    token = settings.engine_token
    headers = {} if token is None else {b"authorization": f"Bearer {token}".encode()}
    control = _client(settings, httpx.Timeout(_LIST_TIMEOUT, connect=_CONNECT_TIMEOUT), headers)
    timeout = httpx.Timeout(None, connect=_CONNECT_TIMEOUT, write=settings.idle_timeout)
    passing = _client(settings, timeout, {})
    threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="icm")
    async with control, passing:
        residency = Residency(Connection(control, tasks, threads, settings), folders, Metrics())
        preparing = asyncio.create_task(_prepare(residency, settings.engine_url))
        try:
            yield GatewayApp(Forwarder(passing, residency), residency)
        finally:
            preparing.cancel()
            await residency.close()
            threads.shutdown(cancel_futures=True)


def _client(settings: GatewaySettings, timeout: httpx.Timeout, headers: Mapping[bytes, bytes]) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=settings.engine_url,
        headers=headers,
        timeout=timeout,
        # The number of requests is already limited by the application.
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=100, keepalive_expiry=_KEPT_ALIVE),
        trust_env=False,  # no proxy, no passwords from ~/.netrc
    )


async def _prepare(residency: Residency, url: str) -> None:
    """Prepare the engine in advance, so that the first request need not wait."""
    try:
        await residency.prepare()
    except HttpProblem as problem:
        _log.warning("%s: %s Until this is fixed, requests get status %d.", url, problem.message, problem.status)
    except Exception as error:
        _log.warning("cannot prepare the engine: %s", error)


def uvicorn_config(app: GatewayApp, settings: GatewaySettings) -> uvicorn.Config:
    """Return the uvicorn configuration for the application."""
    connections, at_once = allowed(settings.max_connections)
    return uvicorn.Config(
        app,
        http=partial(GuardedProtocol, settings, connections, Counter()),  # type: ignore[arg-type]  # a factory, which uvicorn only calls
        backlog=at_once,  # asyncio accepts this many connections before it closes excess ones
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=settings.access_log,
        proxy_headers=False,
        # The engine's headers are passed on.
        server_header=False,
        date_header=False,
        timeout_keep_alive=_CLIENT_KEPT_ALIVE,
        timeout_graceful_shutdown=max(1, round(settings.drain_seconds)),
    )


def _is_news(record: logging.LogRecord) -> bool:
    """Drop uvicorn's messages about responses broken off on purpose, and reword the one about cancelled requests."""
    if record.getMessage().startswith("Cancel ") and isinstance(record.args, tuple):
        count = counted(int(str(record.args[0])), "request")
        record.msg, record.args = f"cancelled {count} that did not finish within --drain-seconds", ()
    return not record.getMessage().startswith("ASGI callable returned without")


class _Server(uvicorn.Server):
    """A server that leaves signals to the event loop: uvicorn would raise them again after stopping."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start listening with the full queue: asyncio would limit it to the connections accepted at once."""
        await super().startup(sockets)
        for listening in sockets or ():
            listening.listen(_QUEUE)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone."""
        yield

    def stop(self) -> None:
        """Stop accepting and let requests finish; a second call cancels them."""
        if self.should_exit:
            self.force_exit = True
        else:
            _log.info("stopping after the requests in flight")
        self.should_exit = True
