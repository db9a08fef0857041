"""Forward one request to the engine and stream its response to the client.

The body of a request is read completely, because its "model" determines the target, and because it is sent again if the
engine has lost the adapter. The response is not buffered: the next chunk is read from the engine once the client has
taken the previous one. If the client disconnects, the engine's request is cancelled.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager, nullcontext
from typing import Any, NamedTuple

import httpx

from icmlora.serving.gateway.contexts import HEADER, ON, is_wanted, with_context
from icmlora.serving.gateway.engines import Body, Engine, unreachable
from icmlora.serving.gateway.problems import HttpProblem
from icmlora.serving.gateway.residency import Residency
from icmlora.serving.gateway.settings import MAX_BODY
from icmlora.serving.tasks import ServedTask
from registry.errors import IcmError, StoreUnavailable

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

_HOP_BY_HOP = frozenset(
    {
        *(b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection"),
        *(b"te", b"trailer", b"transfer-encoding", b"upgrade"),
    }
)
TOKEN_HEADERS = (b"authorization", b"x-api-key")
"""Headers for the client's token; clients of Anthropic's API (/v1/messages) use the second."""
_REPLACED = frozenset({b"host", b"content-length", b"expect", HEADER})
_REFUSED, _LENGTH_WORD = 400, b"length"  # status, and a word in the body, of an engine's error for overlong requests
_RECENT = 1.0  # seconds
_MAX_ERROR_BYTES = 1 << 20  # in an engine's error response

_log = logging.getLogger(__name__)


class ClientGone(Exception):
    """The client closed the connection, or does not read the response."""


class CutShort(Exception):
    """A response that has begun cannot be completed; the connection must be closed."""


class Answer:
    """Send a response to a client; record its status and whether it is complete."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = 0
        self.is_complete = False

    async def __call__(self, message: Message) -> None:
        """Send a part of the response."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
        self.is_complete = message["type"] == "http.response.body" and not message.get("more_body", False)
        await self._send(message)

    async def tell(self, problem: HttpProblem) -> None:
        """Send a problem as the response, unless one has begun: then the server closes the connection."""
        if not self.status:
            body = problem.body()
            headers = [*problem.headers(), (b"content-length", str(len(body)).encode())]
            await self({"type": "http.response.start", "status": problem.status, "headers": headers})
            await self({"type": "http.response.body", "body": body})


class _Target(NamedTuple):
    base: str  # the engine's name for its base model
    name: str | None = None  # the task, or the engine's own adapter; None to let the engine decide
    task: ServedTask | None = None


class Forwarder:
    """Forward requests to the engine.

    Args:
        client: HTTP client with the engine's base URL.
        residency: The adapters in the engine.
    """

    def __init__(self, client: httpx.AsyncClient, residency: Residency) -> None:
        self._client, self._residency, self._metrics = client, residency, residency.metrics
        self._connection, self._settings = residency.connection, residency.connection.settings

    async def answer(self, scope: Scope, receive: Receive, answer: Answer, path: str) -> None:
        """Answer a request with the engine's response to `path`.

        Raises:
            HttpProblem: The engine did not respond, and nothing was sent yet.
            ClientGone: The client disconnected or stopped reading.
            CutShort: The engine's response broke off.
        """
        body = await self._body(receive)
        base, query = self._client.base_url, scope["query_string"]
        try:  # never built from the client's path
            url = base.copy_with(raw_path=base.raw_path.rstrip(b"/") + path.encode() + (b"?" + query if query else b""))
        except (httpx.InvalidURL, ValueError) as error:
            raise HttpProblem(400, "The URL is not valid.", "invalid_url") from error
        request = httpx.Request(scope["method"], url, headers=self._headers(scope["headers"]), content=body)
        wish = next((value for name, value in scope["headers"] if name.lower() == HEADER), b"")
        if request.method == "GET" or path.endswith("/cancel"):  # Responses API: the request has no model
            work = self._respond_unchanged(request, answer)
        else:
            work = self._respond(request, path, body, wish, answer)
        await _while_connected(receive, answer, work)

    async def _respond_unchanged(self, request: httpx.Request, send: Send) -> None:
        async with self._sent(request) as response:
            await self._relay(response, send)

    async def _respond(self, request: httpx.Request, route: str, body: bytes, wish: bytes, send: Send) -> None:
        """Send a request for its task; repeat it if the engine has lost the adapter, or finds the context too long."""
        asked, may_forget, is_too_long = parse_body(body), True, False
        while True:
            engine = await self._connection.engine()
            target = await self._target(engine, asked)
            using = nullcontext() if target.task is None else self._residency.using(target.task)
            async with using as resident:
                adapter = target.name if resident is None else resident.adapter
                fields, context = asked, None
                task = target.task
                if task is not None and resident is not None and is_wanted(wish, default=task.is_generated):
                    fields, context = with_context(route, asked, resident.context, is_too_long=is_too_long)
                    self._metrics.contexts.labels(context).inc()
                changed = engine.addressed(fields, adapter, target.base) if adapter else None
                if changed is None and fields is not asked:
                    changed = json.dumps(fields).encode()
                async with self._sent(request if changed is None else _with_body(request, changed)) as response:
                    may_be_long = context == ON and response.status_code == _REFUSED
                    has_forgotten = may_forget and response.status_code == engine.forgot_status
                    if resident is None or not (may_be_long or has_forgotten):
                        return await self._relay(response, send, context=context)
                    refusal = await self._read(response)
                    if may_be_long and _LENGTH_WORD in refusal.lower():
                        is_too_long = True
                    elif (
                        has_forgotten
                        and engine.forgot_word in refusal.lower()
                        and await self._residency.forgot(resident)
                    ):
                        may_forget = False
                    else:
                        return await self._relay(response, send, refusal, context)

    async def _target(self, engine: Engine, fields: Body) -> _Target:
        """Return the target that a request's model refers to."""
        listing, model = await self._connection.listing(max_age=float("inf")), fields.get("model")
        if not isinstance(model, str) or not model or model in listing.bases:
            return _Target(listing.base)
        name = engine.task_of(model, listing.base)
        if self._residency.is_own(listing, name):
            return _Target(listing.base, name)
        try:
            task = await self._connection.tasks.latest(name)
        except (IcmError, OSError) as error:
            fact = error.message if isinstance(error, IcmError) else error.strerror
            if not isinstance(error, StoreUnavailable):  # already logged once
                _log.warning("cannot look up a task: %s", fact)
            raise HttpProblem(503, f"Cannot read the tasks: {fact}", "store_unavailable", retry_after=5) from error
        if task is not None:
            return _Target(listing.base, name, task)
        await self._residency.remove(name)
        if engine.takes_unknown(name):
            return _Target(listing.base)
        if self._residency.is_own(await self._connection.listing(_RECENT), name):  # loaded since the last listing
            return _Target(listing.base, name)
        raise HttpProblem(404, f"The model {name[:200]!r} does not exist.", "model_not_found")

    @asynccontextmanager
    async def _sent(self, request: httpx.Request) -> AsyncIterator[httpx.Response]:
        """Send a request; close its response after the block, read or not."""
        try:
            async with asyncio.timeout(self._settings.first_byte_timeout):
                response = await self._client.send(request, stream=True)
        except (httpx.HTTPError, TimeoutError) as error:
            problem = unreachable(error)
            if problem.status == 502:
                self._connection.lost()
            _log.warning("%s (%s)", problem.message, str(error) or type(error).__name__)
            raise problem from error
        try:
            if not 200 <= response.status_code < 600:
                raise HttpProblem(502, f"The engine responded with status {response.status_code}.", "engine_invalid")
            yield response
        finally:
            await response.aclose()

    async def _relay(
        self, response: httpx.Response, send: Send, begin: bytes = b"", context: str | None = None
    ) -> None:
        """Stream a response to the client, with the context result as a header."""
        is_stream = response.headers.get("content-type", "").startswith("text/event-stream")
        dropped = _HOP_BY_HOP | _named_by_connection(response.headers.raw)
        headers = [(name, value) for name, value in response.headers.raw if name.lower() not in dropped]
        if context is not None:
            headers.append((HEADER, context.encode()))
        await self._to_client(send, {"type": "http.response.start", "status": response.status_code, "headers": headers})
        if begin:
            await self._to_client(send, {"type": "http.response.body", "body": begin, "more_body": True})
        if not response.is_stream_consumed:
            pieces, limit, last = response.aiter_raw(), self._settings.first_byte_timeout, b"\n\n"
            while True:
                try:
                    async with asyncio.timeout(limit):
                        piece = await anext(pieces, None)
                except (httpx.HTTPError, TimeoutError) as error:
                    # Mark the response as broken, so that it cannot pass for complete.
                    if isinstance(error, TimeoutError):
                        status, code, fact = 504, "engine_timeout", "stopped responding"
                    else:
                        status, code, fact = 502, "engine_died", "closed the connection"
                        self._connection.lost()
                    problem = HttpProblem(status, f"The engine {fact} before its response was complete.", code)
                    _log.warning("%s", problem.message)
                    if is_stream:
                        event = problem.event() if last == b"\n\n" else b"\n\n" + problem.event()
                        await self._to_client(send, {"type": "http.response.body", "body": event, "more_body": True})
                    raise CutShort(code) from error
                if piece is None:
                    break
                await self._to_client(send, {"type": "http.response.body", "body": piece, "more_body": True})
                limit, last = self._settings.idle_timeout, piece[-2:]
        await self._to_client(send, {"type": "http.response.body", "body": b"", "more_body": False})

    async def _to_client(self, send: Send, message: Message) -> None:
        try:
            async with asyncio.timeout(self._settings.idle_timeout):
                await send(message)
        except TimeoutError as error:
            raise ClientGone("the client does not read the response") from error

    async def _read(self, response: httpx.Response) -> bytes:
        """Read an error response completely."""
        data = b""
        try:
            async with asyncio.timeout(self._settings.idle_timeout):
                async for piece in response.aiter_raw():
                    data += piece
                    if len(data) > _MAX_ERROR_BYTES:
                        raise HttpProblem(502, "The engine's error response is too long.", "engine_invalid")
        except (httpx.HTTPError, TimeoutError) as error:
            raise unreachable(error) from error
        return data

    async def _body(self, receive: Receive) -> bytes:
        data = bytearray()
        try:
            async with asyncio.timeout(self._settings.body_timeout):
                while True:
                    async with asyncio.timeout(self._settings.idle_timeout):
                        message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone("the client closed the connection")
                    data += message.get("body", b"")
                    if len(data) > (limit := self._settings.max_body or MAX_BODY):
                        raise HttpProblem(413, f"The body is larger than {limit:,} bytes.", "body_too_large")
                    if not message.get("more_body", False):
                        return bytes(data)
        except TimeoutError as error:
            fact = "The request's body did not arrive in time."
            raise HttpProblem(408, fact, "request_timeout", closes=True) from error

    def _headers(self, headers: Headers) -> Headers:
        dropped = _HOP_BY_HOP | _REPLACED | _named_by_connection(headers)
        kept = [(name, value) for name, value in headers if name.lower() not in dropped]
        token, is_protected = self._settings.engine_token, self._settings.token is not None
        if token is not None or is_protected:  # do not forward the client's token to the engine
            kept = [(name, value) for name, value in kept if name.lower() not in TOKEN_HEADERS]
        return kept if token is None else [*kept, (b"authorization", f"Bearer {token}".encode())]


def parse_body(body: bytes) -> Body:
    """Parse a request body as a JSON object; raise `HttpProblem` if it is not one."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        reason = error if isinstance(error, json.JSONDecodeError) else "it cannot be parsed"
        raise HttpProblem(400, f"The body is not JSON: {reason}", "invalid_json") from error
    if not isinstance(fields, dict):
        raise HttpProblem(400, "The body is not a JSON object.", "invalid_json")
    return fields


async def _while_connected(receive: Receive, answer: Answer, work: Awaitable[None]) -> None:
    """Run `work`; cancel it if the client disconnects first."""

    async def disconnect() -> None:  # the server also reports one after a complete response
        while (await receive())["type"] != "http.disconnect":
            pass

    job, gone = asyncio.ensure_future(work), asyncio.ensure_future(disconnect())
    try:
        await asyncio.wait({job, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not job.done() and not answer.is_complete:
            raise ClientGone("the client closed the connection")
        await job
    finally:
        job.cancel()
        gone.cancel()
        await asyncio.gather(job, gone, return_exceptions=True)


def _with_body(request: httpx.Request, body: bytes) -> httpx.Request:
    headers = [(name, value) for name, value in request.headers.raw if name.lower() != b"content-length"]
    return httpx.Request(request.method, request.url, headers=headers, content=body)


def _named_by_connection(headers: Headers) -> frozenset[bytes]:
    """Return the headers that a `connection` header lists as hop-by-hop."""
    values = [value for name, value in headers if name.lower() == b"connection"]
    return frozenset(part.strip().lower() for value in values for part in value.split(b","))
