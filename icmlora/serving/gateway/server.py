"""Run the gateway: listen, serve and finish the requests in flight before stopping."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager

import httpx
import uvicorn

from icmlora.io.text import counted
from icmlora.serving.catalogue import Catalogue
from icmlora.serving.folders import AdapterFolders
from icmlora.serving.gateway.app import GatewayApp
from icmlora.serving.gateway.connection import Connection
from icmlora.serving.gateway.forward import Forwarder
from icmlora.serving.gateway.metrics import Metrics
from icmlora.serving.gateway.problems import HttpProblem
from icmlora.serving.gateway.protocol import NoDescriptors, allowed, guarded
from icmlora.serving.gateway.residency import Residency
from icmlora.serving.gateway.settings import GatewaySettings
from icmlora.serving.tasks import ServedTasks

_QUEUE = 2048
"""Connections that the system queues until they are accepted."""
_THREADS = 4  # for looking into the store, and as many for writing adapters
_KEPT_ALIVE = 3.0
"""Seconds for which an idle connection to the engine is used again: both engines close theirs after 5."""
_CONNECT_TIMEOUT = 5.0  # seconds for a connection to the engine
_LIST_TIMEOUT = 10.0  # seconds for an engine to list its models
_CLIENT_KEPT_ALIVE = 75  # seconds, more than load balancers keep theirs

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
    """Return a listening socket, so that its address accepts connections at once. Raises `OSError` naming it."""
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
    """Yield the application with everything that it needs."""
    token = settings.engine_token
    authorization = None if token is None else f"Bearer {token}".encode()
    control = _client(settings, httpx.Timeout(_LIST_TIMEOUT, connect=_CONNECT_TIMEOUT), authorization)
    timeout = httpx.Timeout(None, connect=_CONNECT_TIMEOUT, write=settings.idle_timeout)
    passing = _client(settings, timeout, None)
    # A look may hang while a database is stopped; what is known is written meanwhile.
    threads, looking = (ThreadPoolExecutor(_THREADS, thread_name_prefix=name) for name in ("icm", "icm-look"))
    async with control, passing:
        metrics = Metrics()
        connection = Connection(control, tasks, threads, settings.engine, settings.base_model)
        catalogue = Catalogue(tasks, looking)
        residency = Residency(connection, tasks, catalogue, folders, threads, metrics, settings)
        if settings.token is not None:
            authorization = authorization or b""  # the client's token is not the engine's business
        forwarder = Forwarder(passing, connection, catalogue, residency, settings, metrics, authorization)
        preparing = asyncio.create_task(_prepare(residency, settings.engine_url))
        try:
            yield GatewayApp(forwarder, connection, residency, metrics, settings)
        finally:
            preparing.cancel()
            await residency.close()
            threads.shutdown(cancel_futures=True)
            looking.shutdown(wait=False, cancel_futures=True)


def _client(settings: GatewaySettings, timeout: httpx.Timeout, authorization: bytes | None) -> httpx.AsyncClient:
    client = httpx.AsyncClient(
        base_url=settings.engine_url,
        timeout=timeout,
        # How many requests there may be is decided before they come here.
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=100, keepalive_expiry=_KEPT_ALIVE),
        trust_env=False,  # no proxy, and no passwords from ~/.netrc
    )
    client.headers = httpx.Headers([] if authorization is None else [(b"authorization", authorization)])
    return client


async def _prepare(residency: Residency, url: str) -> None:
    """Do before the first request what it would wait for."""
    try:
        await residency.prepare()
    except HttpProblem as problem:
        _log.warning("%s: %s Until this is fixed, requests get status %d.", url, problem.message, problem.status)
    except Exception as error:
        _log.warning("cannot prepare the engine: %s", error)


def uvicorn_config(app: GatewayApp, settings: GatewaySettings) -> uvicorn.Config:
    """Return how uvicorn is to serve the application."""
    connections, at_once = allowed(settings.max_connections)
    return uvicorn.Config(
        app,
        http=guarded(settings, connections),  # type: ignore[arg-type]  # it is only called
        backlog=at_once,  # asyncio takes so many before it closes those that are too many
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=settings.access_log,
        proxy_headers=False,
        # The engine's own are passed on.
        server_header=False,
        date_header=False,
        timeout_keep_alive=_CLIENT_KEPT_ALIVE,
        timeout_graceful_shutdown=max(1, round(settings.drain)),
    )


def _is_news(record: logging.LogRecord) -> bool:
    """Leave out what uvicorn says about answers broken off on purpose, and say in our words that some were cut off."""
    if record.getMessage().startswith("Cancel ") and isinstance(record.args, tuple):
        count = counted(int(str(record.args[0])), "request")
        record.msg, record.args = f"cancelled {count} that did not finish within --drain-seconds", ()
    return not record.getMessage().startswith("ASGI callable returned without")


class _Server(uvicorn.Server):
    """A server whose signals are handled by the loop: uvicorn would raise them again once it has stopped."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen; asyncio would have the system keep no more connections than it takes at once."""
        await super().startup(sockets)
        for listening in sockets or ():
            listening.listen(_QUEUE)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone."""
        yield

    def stop(self) -> None:
        """Stop accepting and let requests end; called again, cut them off."""
        if self.should_exit:
            self.force_exit = True
        else:
            _log.info("stopping after the requests in flight")
        self.should_exit = True
