"""Client connections under uvicorn: a deadline for requests to arrive, and a limit on connections per address.

uvicorn itself waits for the rest of a request indefinitely, and accepts as many connections as there are file
descriptors: a few hundred partial request lines, sent without a token, would lock out all other clients.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import sys
from collections import Counter
from typing import Any, Literal

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from icmlora.serving.gateway.problems import HttpProblem
from icmlora.serving.gateway.settings import GatewaySettings

_DESCRIPTORS = 65_536
_ADDRESS_SHARE = 3
"""One address gets 1/3 of the file descriptors, because each request needs a second one for the engine."""
_AT_ONCE = 16
"""1/16 of them may be accepted at once: an excess connection is closed only two event loop iterations later."""
_LOG_INTERVAL = 60.0  # seconds between log lines about a lack of descriptors
_GRACE = 1.0  # extra seconds for the application to answer that the body is late, before the connection is closed

_log = logging.getLogger(__name__)

_Part = Literal["header", "body", "rest"]
"""The part that a client still has to send; `rest` is the remaining body of a request that was already answered."""


def allowed(connections: int) -> tuple[int, int]:
    """Raise this process's limit on file descriptors.

    Returns:
        The possible number of connections per address, at most `connections`, and the number to accept at once.
    """
    if sys.platform == "win32":  # no limit on sockets
        return connections, connections
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    descriptors = min(most, _DESCRIPTORS) if most != resource.RLIM_INFINITY else _DESCRIPTORS
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, most))
    return min(connections, descriptors // _ADDRESS_SHARE), min(connections, descriptors // _AT_ONCE)


class NoDescriptors:
    """Exception handler for the event loop that logs a lack of file descriptors in one line.

    asyncio itself waits a second, continues to accept connections and logs a traceback each time.
    """

    def __init__(self) -> None:
        self._logged = -math.inf

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Handle an error, for `loop.set_exception_handler`."""
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in (errno.EMFILE, errno.ENFILE):
            loop.default_exception_handler(context)
        elif loop.time() - self._logged >= _LOG_INTERVAL:
            self._logged = loop.time()
            _log.warning("out of file descriptors for new connections; raise `ulimit -n` of the gateway")


class GuardedProtocol(H11Protocol):
    """One connection.

    Args:
        settings: Timeouts for requests to arrive.
        limit: Maximum number of open connections per address.
        counts: Number of open connections by address, shared by all connections of a server.
        args: Arguments of uvicorn's protocol.
        options: More of them.
    """

    def __init__(self, settings: GatewaySettings, limit: int, counts: Counter[str], *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._settings, self._limit, self._counts = settings, limit, counts
        self._arriving: tuple[_Part, object] | None = None
        self._deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._counts[self._address] += 1
        if self._counts[self._address] <= self._limit:
            self._watch()
        else:
            message = "Too many connections from your address to the gateway."
            self._refuse(HttpProblem(503, message, "too_many_connections", retry_after=1))

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._counts[self._address] -= 1
        if not self._counts[self._address]:
            del self._counts[self._address]
        self._forget_deadline()

    def handle_events(self) -> None:
        super().handle_events()
        self._watch()

    def on_response_complete(self) -> None:
        """Continue with the next request. The rest of this request's body gets a shorter timeout."""
        super().on_response_complete()
        self._watch()

    @property
    def _address(self) -> str:
        return "" if self.client is None else self.client[0]

    def _watch(self) -> None:
        """Set a deadline for the part that is arriving; further data does not extend it."""
        arriving = self._part()
        if arriving == self._arriving:
            return
        self._forget_deadline()
        self._arriving = arriving
        if arriving is not None:
            is_body, settings = arriving[0] == "body", self._settings
            seconds = settings.body_timeout + _GRACE if is_body else settings.header_timeout
            self._deadline = self.loop.call_later(seconds, self._late)

    def _part(self) -> tuple[_Part, object] | None:
        """Return the part that the client still has to send, and its request; None between two requests."""
        if self.transport.is_closing():
            return None
        if self.conn.their_state is h11.IDLE and (self.cycle is None or self._has_begun):
            return "header", self.cycle
        if self.conn.their_state is not h11.SEND_BODY:
            return None
        return "rest" if self.cycle.response_complete else "body", self.cycle

    @property
    def _has_begun(self) -> bool:
        """Whether a part of the next request has arrived."""
        return bool(self.conn.trailing_data[0])

    def _forget_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _late(self) -> None:
        if self._arriving is not None and self._arriving[0] == "header" and self._has_begun:
            self._refuse(HttpProblem(408, "The request's headers did not arrive in time.", "request_timeout"))
        else:
            self.transport.close()

    def _refuse(self, problem: HttpProblem) -> None:
        """Answer without calling the application, and close the connection."""
        body = problem.body()
        headers = [*problem.headers(), (b"content-length", str(len(body)).encode()), (b"connection", b"close")]
        response = h11.Response(status_code=problem.status, headers=headers)
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
