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
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import httpx

from icmlora.serving.catalogue import Catalogue
from icmlora.serving.gateway.connection import Connection
from icmlora.serving.gateway.contexts import HEADER, NONE, ON, TOO_LONG, UNFIT, is_wanted, put_before
from icmlora.serving.gateway.engines import Body, Engine, unreachable
from icmlora.serving.gateway.metrics import Metrics
from icmlora.serving.gateway.problems import HttpProblem
from icmlora.serving.gateway.residency import Residency, Resident
from icmlora.serving.gateway.settings import GatewaySettings
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


@dataclass(frozen=True)
class _Target:
    """The target of a request.

    Attributes:
        base: The engine's name for its base model.
        name: The task, or the engine's own adapter; None to let the engine decide.
        task: The task, if it is for one.
    """

    base: str
    name: str | None = None
    task: ServedTask | None = None


@dataclass(frozen=True)
class _Asked:
    """A request to forward, possibly with retries.

    Attributes:
        request: The client's request.
        route: The engine's route.
        fields: Its body.
        wish: Its context header, or empty.
        may_forget: Whether to retry if the engine has lost the adapter.
        is_too_long: Whether the engine rejected it as too long with its task's context.
    """

    request: httpx.Request
    route: str
    fields: Body
    wish: bytes = b""
    may_forget: bool = True
    is_too_long: bool = False


class Forwarder:
    """Forward requests to the engine.

    Args:
        client: HTTP client with the engine's base URL.
        connection: The engine.
        catalogue: The tasks.
        residency: Their adapters in the engine.
        settings: Limits for a request.
        metrics: The metrics.
        own_authorization: The `authorization` header for the engine, replacing the client's. Empty to send none; None
            to send the client's.
    """

    def __init__(
        self,
        client: httpx.AsyncClient,
        connection: Connection,
        catalogue: Catalogue,
        residency: Residency,
        settings: GatewaySettings,
        metrics: Metrics,
        own_authorization: bytes | None,
    ) -> None:
        self._client, self._connection = client, connection
        self._catalogue, self._residency = catalogue, residency
        self._settings, self._metrics, self._own_authorization = settings, metrics, own_authorization

    async def answer(self, scope: Scope, receive: Receive, answer: Answer, path: str) -> None:
        """Answer a request with the engine's response to `path`.

        Raises:
            HttpProblem: The engine did not respond, and nothing was sent yet.
            ClientGone: The client disconnected or stopped reading.
            CutShort: The engine's response broke off.
        """
        body = await self._body(receive)
        url = self._url(path, scope["query_string"])
        request = httpx.Request(scope["method"], url, headers=self._headers(scope["headers"]), content=body)
        wish = next((value for name, value in scope["headers"] if name.lower() == HEADER), b"")
        await _while_connected(receive, answer, self._respond(request, path, body, wish, answer))

    async def _respond(self, request: httpx.Request, route: str, body: bytes, wish: bytes, send: Send) -> None:
        if request.method == "GET" or route.endswith("/cancel"):  # Responses API: the request has no model
            async with self._sent(request) as response:
                return await self._relay(response, send)
        asked: _Asked | None = _Asked(request, route, parse_body(body), wish)
        while asked is not None:
            asked = await self._attempt(asked, send)

    async def _attempt(self, asked: _Asked, send: Send) -> _Asked | None:
        """Send a request for its task; return the request for a retry if the engine rejects it in this form."""
        engine = await self._connection.engine()
        target = await self._target(engine, asked.fields)
        using = nullcontext() if target.task is None else self._residency.using(target.task)
        async with using as resident:
            adapter = target.name if resident is None else resident.adapter
            fields, context = self._with_context(asked, target.task, resident)
            body = engine.addressed(fields, adapter, target.base) if adapter else None
            if body is None and fields is not asked.fields:
                body = json.dumps(fields).encode()
            async with self._sent(_addressed(asked.request, body)) as response:
                may_be_long = context == ON and response.status_code == _REFUSED
                may_forget = asked.may_forget and response.status_code == engine.forgot_status
                if resident is None or not (may_be_long or may_forget):
                    await self._relay(response, send, context=context)
                    return None
                refusal = await self._read(response)
                if may_be_long and _LENGTH_WORD in refusal.lower():
                    return replace(asked, is_too_long=True)
                if may_forget and engine.forgot_word in refusal.lower() and await self._residency.forgot(resident):
                    return replace(asked, may_forget=False)
                await self._relay(response, send, refusal, context)
                return None

    def _with_context(
        self, asked: _Asked, task: ServedTask | None, resident: Resident | None
    ) -> tuple[Body, str | None]:
        """Insert the task's context if the request wants it; also return the result for the response header."""
        if task is None or resident is None or not is_wanted(asked.wish, default=task.is_generated):
            return asked.fields, None
        context, behind = resident.context, None
        if context is not None and not asked.is_too_long:
            behind = put_before(asked.route, asked.fields, context)
        said = NONE if context is None else TOO_LONG if asked.is_too_long else UNFIT if behind is None else ON
        self._metrics.contexts.labels(said).inc()
        return behind or asked.fields, said

    async def _target(self, engine: Engine, fields: Body) -> _Target:
        """Return the target that a request's model refers to."""
        listing, model = await self._connection.listing(max_age=float("inf")), fields.get("model")
        if not isinstance(model, str) or not model or model in listing.bases:
            return _Target(listing.base)
        name = engine.task_of(model, listing.base)
        if self._residency.is_own(listing, name):
            return _Target(listing.base, name)
        if (task := await self._find(name)) is not None:
            return _Target(listing.base, name, task)
        await self._residency.remove(name)
        if engine.takes_unknown(name):
            return _Target(listing.base)
        if self._residency.is_own(await self._connection.listing(_RECENT), name):  # loaded since the last listing
            return _Target(listing.base, name)
        raise HttpProblem(404, f"The model {name[:200]!r} does not exist.", "model_not_found")

    async def _find(self, name: str) -> ServedTask | None:
        try:
            return await self._catalogue.find(name)
        except (IcmError, OSError) as error:
            fact = error.message if isinstance(error, IcmError) else error.strerror
            if not isinstance(error, StoreUnavailable):  # already logged once
                _log.warning("cannot look up a task: %s", fact)
            raise HttpProblem(503, f"Cannot read the tasks: {fact}", "store_unavailable", retry_after=5) from error

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
                    await self._break_off(send, error, is_stream=is_stream, last=last)
                if piece is None:
                    break
                await self._to_client(send, {"type": "http.response.body", "body": piece, "more_body": True})
                limit, last = self._settings.idle_timeout, piece[-2:]
        await self._to_client(send, {"type": "http.response.body", "body": b"", "more_body": False})

    async def _break_off(self, send: Send, error: Exception, *, is_stream: bool, last: bytes) -> NoReturn:
        """Mark a response that the engine did not complete as broken, so that it cannot pass for complete."""
        if isinstance(error, TimeoutError):
            problem = HttpProblem(
                504, "The engine stopped responding before its response was complete.", "engine_timeout"
            )
        else:
            self._connection.lost()
            problem = HttpProblem(
                502, "The engine closed the connection before its response was complete.", "engine_died"
            )
        _log.warning("%s", problem.message)
        if is_stream:
            event = problem.event() if last == b"\n\n" else b"\n\n" + problem.event()
            await self._to_client(send, {"type": "http.response.body", "body": event, "more_body": True})
        raise CutShort(problem.code) from error

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

    def _url(self, path: str, query: bytes) -> httpx.URL:
        """Return the engine's URL for a route, never built from the client's path."""
        base = self._client.base_url
        raw_path = base.raw_path.rstrip(b"/") + path.encode() + (b"?" + query if query else b"")
        try:
            return base.copy_with(raw_path=raw_path)
        except (httpx.InvalidURL, ValueError) as error:
            raise HttpProblem(400, "The URL is not valid.", "invalid_url") from error

    async def _body(self, receive: Receive) -> bytes:
        try:
            async with asyncio.timeout(self._settings.body_timeout):
                return await self._pieces(receive)
        except TimeoutError as error:
            message = "The request's body did not arrive in time."
            raise HttpProblem(408, message, "request_timeout", closes=True) from error

    async def _pieces(self, receive: Receive) -> bytes:
        data = bytearray()
        while True:
            async with asyncio.timeout(self._settings.idle_timeout):
                message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone("the client closed the connection")
            data += message.get("body", b"")
            if len(data) > self._settings.max_body:
                raise HttpProblem(413, f"The body is larger than {self._settings.max_body:,} bytes.", "body_too_large")
            if not message.get("more_body", False):
                return bytes(data)

    def _headers(self, headers: Headers) -> Headers:
        dropped = _HOP_BY_HOP | _REPLACED | _named_by_connection(headers)
        kept = [(name, value) for name, value in headers if name.lower() not in dropped]
        if self._own_authorization is None:
            return kept
        kept = [(name, value) for name, value in kept if name.lower() not in TOKEN_HEADERS]
        return [*kept, (b"authorization", self._own_authorization)] if self._own_authorization else kept


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
    # After a complete response, the server also reports a disconnect.
    job, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({job, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not job.done() and not answer.is_complete:
            raise ClientGone("the client closed the connection")
        await job
    finally:
        job.cancel()
        gone.cancel()
        await asyncio.gather(job, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _addressed(request: httpx.Request, body: bytes | None) -> httpx.Request:
    """Return a request with `body`, or the same request if that is None."""
    if body is None:
        return request
    headers = [(name, value) for name, value in request.headers.raw if name.lower() != b"content-length"]
    return httpx.Request(request.method, request.url, headers=headers, content=body)


def _named_by_connection(headers: Headers) -> frozenset[bytes]:
    """Return the headers that a `connection` header lists as hop-by-hop."""
    values = [value for name, value in headers if name.lower() == b"connection"]
    return frozenset(part.strip().lower() for value in values for part in value.split(b","))
