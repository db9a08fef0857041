"""The gateway's routes, access control and own responses.

Only the routes listed here exist. The engine's routes for loading adapters, replacing weights, sleeping and profiling
are reserved for its operator.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from hashlib import sha256
from hmac import compare_digest
from ipaddress import ip_address
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from icmlora.serving.gateway.engines import Card
from icmlora.serving.gateway.forward import Answer, ClientGone, CutShort, Forwarder, Receive, Scope, Send
from icmlora.serving.gateway.metrics import CONTENT_TYPE
from icmlora.serving.gateway.problems import HttpProblem
from icmlora.serving.gateway.residency import Residency
from registry.errors import IcmError, StoreUnavailable

PASSED_ON = frozenset(
    {
        *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"),
        *("/v1/messages", "/v1/messages/count_tokens"),
        *("/v1/score", "/score", "/v1/rerank", "/v2/rerank", "/rerank"),
        *("/classify", "/v1/classify", "/pooling", "/tokenize", "/v1/tokenize", "/detokenize", "/v1/detokenize"),
    }
)
"""POST routes that are forwarded to the engine for every authorised client."""
_OWN = frozenset({"/healthz", "/readyz", "/metrics", "/v1/models"})
"""Routes that the gateway handles itself, for metrics."""
_RESPONSE = re.compile(r"/v1/responses/[A-Za-z0-9_-]{1,128}(/cancel)?")
_OPEN = frozenset({"/healthz", "/readyz"})
"""Routes without a token, for health checks. They reveal only whether the server works."""
_MODELS_AGE = 5.0  # seconds for which the list of models is cached
_READY_AGE = 1.0  # seconds for which readiness is cached
_COUNTS_TIMEOUT = 1.0  # seconds to wait for the engine's metrics

_log = logging.getLogger(__name__)


class GatewayApp:
    """The gateway as an ASGI application.

    Args:
        forwarder: Forwards requests.
        residency: The adapters in the engine.
    """

    def __init__(self, forwarder: Forwarder, residency: Residency) -> None:
        self._forwarder, self._residency, self._metrics = forwarder, residency, residency.metrics
        self._connection, self._settings = residency.connection, residency.connection.settings
        token = self._settings.token
        self._token = None if token is None else sha256(token.encode()).digest()
        self._requests = 0
        self._names: list[str] | None = None  # last known task names
        self._models: tuple[float, Mapping[str, Card], bytes] | None = None
        self._listing = asyncio.Lock()
        self._started = int(time.time())
        self._own = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
        self._own.get("/healthz")(self._healthz)
        self._own.get("/readyz")(self._readyz)
        self._own.get("/metrics")(self._show_metrics)
        self._own.get("/v1/models")(self._list_models)
        self._own.get("/v1/models/{model:path}")(self._show_model)
        self._own.add_exception_handler(HTTPException, self._unknown_route)
        self._own.add_exception_handler(HttpProblem, self._problem)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return  # websockets are not supported
        answer = Answer(send)
        try:
            await self._answer(scope, receive, answer)
        except HttpProblem as problem:
            self._metrics.problems.labels(problem.code).inc()
            await answer.tell(problem)
        except ClientGone:
            answer.status = 499  # as in nginx, even if the response had begun
        except CutShort as cut:
            self._metrics.problems.labels(str(cut)).inc()
        except asyncio.CancelledError:  # the server is stopping, and the drain timeout has passed
            await answer.tell(HttpProblem(503, "The gateway is stopping.", "stopping"))
        except Exception:
            _log.exception("unexpected error")
            await answer.tell(HttpProblem(500, "The gateway failed; see its log for details.", "gateway_failed"))
        finally:
            path = scope["path"]
            route = path if path in PASSED_ON or path in _OWN else "other"
            self._metrics.requests.labels(route, str(answer.status)).inc()

    async def _answer(self, scope: Scope, receive: Receive, answer: Answer) -> None:
        headers, method, path = dict(scope["headers"]), scope["method"], scope["path"]
        # Two servers may parse ambiguous framing differently.
        if b"content-length" in headers and b"transfer-encoding" in headers:
            message = "The request has both Content-Length and Transfer-Encoding."
            raise HttpProblem(400, message, "ambiguous_length", closes=True)
        if self._settings.local_names is not None:
            host, origin = headers.get(b"host"), headers.get(b"origin")
            hint = "start it with --token-file FILE to allow other clients"
            if host is not None and not self._is_local(b"//" + host):
                raise HttpProblem(421, f"Without a token, this gateway accepts only localhost: {hint}.", "foreign_host")
            if origin is not None and not self._is_local(origin):
                raise HttpProblem(403, f"This gateway refuses requests from other sites: {hint}.", "foreign_origin")
        if self._token is not None and path not in _OPEN:
            kind, _, token = headers.get(b"authorization", b"").partition(b" ")
            given = token if kind.lower() == b"bearer" else headers.get(b"x-api-key", b"")
            # Digests have equal length, so the comparison takes constant time.
            if not compare_digest(sha256(given.strip()).digest(), self._token):
                message = "The request has no valid token (Authorization: Bearer TOKEN)."
                raise HttpProblem(401, message, "invalid_api_key")
        response = _RESPONSE.fullmatch(path)
        is_of_response = response is not None and method == ("POST" if response[1] else "GET")
        if not is_of_response and not (method == "POST" and path in PASSED_ON):
            await self._own(scope, receive, answer)
            return
        if self._requests >= (limit := self._settings.max_requests):
            message = f"The gateway is already handling {limit} requests; try again soon."
            raise HttpProblem(503, message, "too_many_requests", retry_after=1)
        self._requests += 1
        self._metrics.in_flight.set(self._requests)
        try:
            await self._forwarder.answer(scope, receive, answer, path)
        finally:
            self._requests -= 1
            self._metrics.in_flight.set(self._requests)

    def _is_local(self, url: bytes) -> bool:
        """Return whether a URL refers to this machine."""
        try:
            name = urlsplit(url.decode("latin-1")).hostname or ""
            return name == "localhost" or name in (self._settings.local_names or ()) or ip_address(name).is_loopback
        except ValueError:  # neither a URL nor an address
            return False

    async def _healthz(self) -> Response:
        return JSONResponse({"status": "ok"})

    async def _readyz(self) -> Response:
        try:
            await self._connection.check_ready(_READY_AGE)
        except HttpProblem as problem:
            raise HttpProblem(503, problem.message, problem.code) from problem
        return JSONResponse({"status": "ready"})

    async def _show_metrics(self) -> Response:
        with suppress(HttpProblem, TimeoutError):  # the engine is unavailable
            async with asyncio.timeout(_COUNTS_TIMEOUT):
                counts = await (await self._connection.engine()).prefix_tokens()
            for gauge, count in zip((self._metrics.prefix_asked, self._metrics.prefix_found), counts, strict=False):
                gauge.set(count)
        return Response(self._metrics.text(), media_type=CONTENT_TYPE)

    async def _list_models(self) -> Response:
        return Response((await self._all_models())[1], media_type="application/json")

    async def _show_model(self, model: str) -> Response:
        card = (await self._all_models())[0].get(model)
        if card is None:
            raise HttpProblem(404, f"The model {model[:200]!r} does not exist.", "model_not_found")
        return JSONResponse(dict(card))

    async def _all_models(self) -> tuple[Mapping[str, Card], bytes]:
        """Return the engine's own models and all tasks of its base model, by name and as JSON."""
        async with self._listing:
            if self._models is not None and time.monotonic() - self._models[0] <= _MODELS_AGE:
                return self._models[1:]
            listing = await self._connection.listing(_MODELS_AGE)
            try:
                self._names = await self._connection.names()
            except IcmError as error:
                if self._names is None or not isinstance(error, StoreUnavailable):
                    raise HttpProblem(503, f"Cannot read the tasks: {error.message}", "store_unavailable") from error
            cards = {
                str(card["id"]): card
                for card in listing.cards
                if not card.get("parent") or self._residency.is_own(listing, card["id"])
            }
            fields = {"object": "model", "created": self._started, "owned_by": "icm", "parent": listing.base}
            cards |= {name: {"id": name, **fields, "root": name} for name in self._names}
            # A fleet of 20,000 tasks is 2.5 MB of JSON.
            data = await asyncio.to_thread(lambda: json.dumps({"object": "list", "data": [*cards.values()]}))
            self._models = time.monotonic(), cards, data.encode()
            return self._models[1:]

    async def _unknown_route(self, request: Request, error: Exception) -> Response:
        message = f"The gateway has no route {request.method} {request.url.path[:200]}."
        return await self._problem(request, HttpProblem(404, message, "unknown_route"))

    async def _problem(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HttpProblem)
        self._metrics.problems.labels(error.code).inc()
        headers = {name.decode(): value.decode() for name, value in error.headers()}
        return Response(error.body(), error.status, headers)
