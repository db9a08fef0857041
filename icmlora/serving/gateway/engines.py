"""The HTTP APIs of both engines for listing, loading and unloading adapters.

vLLM      POST /v1/load_lora_adapter, /v1/unload_lora_adapter; a request's model is the adapter's name
SGLang    POST /load_lora_adapter, /unload_lora_adapter; a request's model is BASE:ADAPTER
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import httpx
from prometheus_client.parser import text_string_to_metric_families

from icmlora.serving.gateway.problems import HttpProblem
from icmlora.serving.requirements import EngineName

Body = dict[str, Any]
Card = Mapping[str, Any]

_MAX_REASON_LENGTH = 500  # characters of an engine's error to pass on
_LOAD_TIMEOUT = 120.0  # seconds for an engine to load or unload an adapter


@dataclass(frozen=True)
class Listing:
    """The models that an engine lists.

    Attributes:
        base: The base model's name for clients.
        model: The model that the engine was started with: a name on a hub, or a folder.
        cards: All entries of the list, unchanged.
        adapters: Name of each loaded adapter -> its folder.
    """

    base: str
    model: str
    cards: tuple[Card, ...]
    adapters: Mapping[str, str]

    @cached_property
    def bases(self) -> frozenset[str]:
        """All names of the base model."""
        return frozenset(str(card["id"]) for card in self.cards if not card.get("parent"))


class Engine:
    """vLLM, or a subclass for another API. Methods raise `HttpProblem` if it rejects a request or does not respond.

    Args:
        client: A client with the engine's base URL and token, and with timeouts.
    """

    name: ClassVar[EngineName] = "vllm"
    forgot_status: ClassVar[int] = 404
    """The engine's status for an unknown adapter."""
    forgot_word: ClassVar[bytes] = b""
    """A lower-case word in that response."""
    unloads_at_once: ClassVar[bool] = True
    """Whether it can unload an adapter with running requests. vLLM keeps it in memory until they finish."""
    _prefix_counts: ClassVar[tuple[str, ...]] = (
        "vllm:prefix_cache_queries_total",
        "vllm:prefix_cache_hits_total",
    )
    _load_route: ClassVar[str] = "/v1/load_lora_adapter"
    _unload_route: ClassVar[str] = "/v1/unload_lora_adapter"
    _hint: ClassVar[str] = "start vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self._is_prepared = False

    def adapter_name(self, task: str, key: str) -> str:
        """Return the adapter name for a version of a task: the task's name, so that requests need no change."""
        return task

    def task_of(self, model: str, base: str) -> str:
        """Return the task that a request's model names."""
        return model

    def addressed(self, body: Body, adapter: str, base: str) -> bytes | None:
        """Return the request body for a loaded adapter; None if the client's body needs no change."""
        return None

    def takes_unknown(self, model: str) -> bool:
        """Return whether to forward a request for an unknown model, which the engine answers with 404."""
        return True

    async def listing(self) -> Listing:
        """Request the engine's list of models."""
        cards = await list_models(self._client)
        bases = [card for card in cards if not card.get("parent")]
        if not bases:
            raise HttpProblem(502, "The engine lists no base model.", "engine_invalid")
        base = str(bases[0]["id"])
        adapters = {str(card["id"]): str(card.get("root") or "") for card in cards if card.get("parent")}
        return Listing(base, await self._model(bases[0]), tuple(cards), adapters)

    async def check_prepared(self) -> None:
        """Check, without side effects, that the engine can load adapters at runtime."""
        if not self._is_prepared:
            # A GET request to an existing POST route returns 405.
            answer = await ask(self._client, "GET", self._load_route)
            if answer.status_code == 404:
                raise self._not_prepared()
            self._is_prepared = True

    async def load(self, adapter: str, folder: Path) -> None:
        """Load an adapter into the engine."""
        answer = await self._post(self._load_route, {"lora_name": adapter, "lora_path": str(folder)})
        if answer.status_code == 404 and not _reason(answer, ""):
            raise self._not_prepared()
        if answer.status_code != 200:
            reason = _reason(answer, f"status {answer.status_code}")
            raise HttpProblem(502, f"The engine refused to load the adapter: {reason}", "engine_refused_adapter")

    async def unload(self, adapter: str) -> None:
        """Unload an adapter, if the engine has it."""
        answer = await self._post(self._unload_route, {"lora_name": adapter})
        if answer.status_code == 200:
            return
        if adapter in (await self.listing()).adapters:
            reason = _reason(answer, f"status {answer.status_code}")
            raise HttpProblem(502, f"The engine refused to unload an adapter: {reason}", "engine_refused_unload")

    async def prefix_tokens(self) -> Sequence[float]:
        """Return the prompt tokens that the engine looked up in its prefix cache, and found there; empty if unknown."""
        answer = await ask(self._client, "GET", "/metrics")
        counts: defaultdict[str, float] = defaultdict(float)  # summed over all labels
        try:
            for family in text_string_to_metric_families(answer.text if answer.status_code == 200 else ""):
                for sample in family.samples:
                    counts[sample.name] += sample.value
        except ValueError:
            return ()
        return [counts[name] for name in self._prefix_counts] if counts.keys() >= set(self._prefix_counts) else ()

    async def _model(self, card: Card) -> str:
        return str(card.get("root") or card["id"])

    def _not_prepared(self) -> HttpProblem:
        return HttpProblem(502, f"The engine has no route {self._load_route}: {self._hint}.", "engine_not_prepared")

    async def _post(self, route: str, fields: Mapping[str, object]) -> httpx.Response:
        timeout = httpx.Timeout(_LOAD_TIMEOUT, connect=self._client.timeout.connect)
        return await ask(self._client, "POST", route, json=fields, timeout=timeout)


class SglangEngine(Engine):
    """SGLang. It unloads an adapter only after its running requests, so each version needs its own name."""

    name = "sglang"
    forgot_status, forgot_word = 400, b"lora"
    unloads_at_once = False
    _prefix_counts = ()
    _load_route, _unload_route = "/load_lora_adapter", "/unload_lora_adapter"
    _hint = "start SGLang with --enable-lora"

    def adapter_name(self, task: str, key: str) -> str:
        """Return the task's name with the beginning of its key."""
        return f"{task}@{key[:12]}"

    def task_of(self, model: str, base: str) -> str:
        """Return the task in BASE:TASK, else the model."""
        return model.removeprefix(f"{base}:")

    def addressed(self, body: Body, adapter: str, base: str) -> bytes | None:
        """Return the body with BASE:ADAPTER as its model."""
        return json.dumps(body | {"model": f"{base}:{adapter}"}).encode()

    def takes_unknown(self, model: str) -> bool:
        """Return whether it is SGLang's name for the base model. SGLang serves the base model for other names too."""
        return model == "default"

    async def _model(self, card: Card) -> str:
        answer = await ask(self._client, "GET", "/model_info")
        found = _json(answer) if answer.status_code == 200 else None
        path = found.get("model_path") if isinstance(found, dict) else None
        return path if isinstance(path, str) else await super()._model(card)


_ENGINES: Mapping[EngineName, type[Engine]] = {"vllm": Engine, "sglang": SglangEngine}


async def connect(client: httpx.AsyncClient, name: EngineName | Literal["auto"]) -> Engine:
    """Return the engine at the client's URL, of a type or `auto`.

    Raises:
        HttpProblem: It does not respond, or is not a supported engine.
    """
    if name == "auto":
        owners = {card.get("owned_by") for card in await list_models(client) if not card.get("parent")}
        detected = next((known for known in _ENGINES if known in owners), None)
        if detected is None:
            raise HttpProblem(502, "The engine is neither vLLM nor SGLang.", "engine_unknown")
        name = detected
    return _ENGINES[name](client)


async def list_models(client: httpx.AsyncClient) -> list[Card]:
    """Request an engine's list of models; raise `HttpProblem` if there is no valid list."""
    answer = await ask(client, "GET", "/v1/models")
    if answer.status_code in (401, 403):
        raise HttpProblem(502, "The engine refused the gateway's token.", "engine_refused_token")
    found = _json(answer) if answer.status_code == 200 else None
    cards = found.get("data") if isinstance(found, dict) else None
    if not isinstance(cards, list) or not all(isinstance(card, dict) and "id" in card for card in cards):
        message = f"The engine returned no list of models (status {answer.status_code})."
        raise HttpProblem(502, message, "engine_invalid")
    return cards


async def ask(client: httpx.AsyncClient, method: str, path: str, **options: Any) -> httpx.Response:
    """Send one of the gateway's own requests to the engine; raise `HttpProblem` if there is no response."""
    try:
        return await client.request(method, path, **options)
    except httpx.HTTPError as error:
        raise unreachable(error) from error


def unreachable(error: Exception) -> HttpProblem:
    """Return the problem for a request without a response from the engine."""
    if isinstance(error, TimeoutError | httpx.TimeoutException):
        return HttpProblem(504, "The engine did not respond in time.", "engine_timeout")
    if isinstance(error, httpx.ConnectError):
        return HttpProblem(502, "The engine cannot be reached.", "engine_unreachable", retry_after=5)
    return HttpProblem(502, "The engine closed the connection without a response.", "engine_died", retry_after=5)


def _json(answer: httpx.Response) -> Any:
    try:
        return answer.json()
    except (ValueError, RecursionError):
        return None


def _reason(answer: httpx.Response, otherwise: str) -> str:
    """Return the message of an engine's error response, in any of the engines' formats."""
    found = _json(answer)
    fields = found if isinstance(found, dict) else {}
    inner = fields.get("error")
    places = [
        inner.get("message") if isinstance(inner, dict) else inner,
        fields.get("message"),
        fields.get("error_message"),
    ]
    return next(
        (text.strip()[:_MAX_REASON_LENGTH] for text in places if isinstance(text, str) and text.strip()), otherwise
    )
