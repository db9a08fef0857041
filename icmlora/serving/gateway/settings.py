"""Settings of the gateway, which are options of `icm serve`. No heavy imports, because the command line imports it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from icmlora.errors import DataError
from icmlora.fleet.context import HasContext
from icmlora.fleet.params import Param
from icmlora.io.text import parse_bytes

ACCESS, ADAPTERS, LIMITS = "Access", "Adapters", "Limits"  # help panels
MAX_HEADER_SECONDS = 30.0
MAX_BODY = 64 << 20


def _engine_address(url: str) -> str:
    if url and not url.startswith(("http://", "https://")):
        raise DataError(f"{url!r} is not an HTTP address", hint="write it as http://127.0.0.1:8000")
    return url.rstrip("/").removesuffix("/v1")  # OpenAI clients add /v1


def _seconds(option: str, text: str) -> Param:
    return Param(text, f"{option} SECONDS", LIMITS, min=0.01)


@dataclass(frozen=True, kw_only=True)
class GatewaySettings:
    """Address of the engine, access control and limits.

    Attributes:
        local_names: Names of this machine, if only local clients have access: the Host header must be one of them or
            localhost, which keeps foreign web pages from using a local browser. None: any name.
        header_timeout: Seconds for a request's headers to arrive.
    """

    engine_url: Annotated[
        str,
        Param("Address of the engine, such as http://127.0.0.1:8000.", "--engine-url URL", parse=_engine_address),
    ] = ""
    engine: Annotated[
        Literal["auto", "vllm", "sglang"],
        Param("Type of the engine. auto detects it.", "--engine auto|vllm|sglang"),
    ] = "auto"
    base_model: Annotated[
        str | None,
        Param(
            "Base model that the engine runs. Needed if there are several or it cannot be detected.",
            "--base-model NAME",
            completes="base",
        ),
    ] = None
    host: Annotated[str, Param("Address to listen on.", "--host ADDRESS")] = "127.0.0.1"
    port: Annotated[int, Param("Port to listen on. 0 picks a free port.", "--port N", min=0, max=65535)] = 8080
    access_log: Annotated[bool, Param("Log every request.")] = False
    token: Annotated[
        str | None,
        Param(
            "Token that clients must send. Visible in the process list, so prefer --token-file or $ICM_SERVE_TOKEN.",
            "--token TOKEN",
            ACCESS,
        ),
    ] = None
    engine_token: Annotated[
        str | None,
        Param("Token for the engine (its --api-key). (env: ICM_ENGINE_TOKEN)", "--engine-token TOKEN", ACCESS),
    ] = None
    local_names: frozenset[str] | None = None
    max_adapters: Annotated[
        int | None,
        Param("Maximum number of loaded adapters. Default: as many as fit.", "--max-adapters N", ADAPTERS, min=1),
    ] = None
    max_waiting: Annotated[
        int,
        Param(
            "Maximum number of tasks waiting to load. Requests beyond it get status 503.",
            "--max-waiting N",
            ADAPTERS,
            min=1,
        ),
    ] = 64
    max_requests: Annotated[
        int,
        Param(
            "Maximum number of concurrent requests. Further requests get status 503.",
            "--max-requests N",
            LIMITS,
            min=1,
        ),
    ] = 512
    max_connections: Annotated[
        int,
        Param(
            "Maximum number of connections per client address, at most a third of the file descriptors.",
            "--max-connections N",
            LIMITS,
            min=1,
        ),
    ] = 1024
    max_body: Annotated[
        int | None,
        Param("Maximum size of a request body. Default: 64MiB.", "--max-body SIZE", LIMITS, min=1, parse=parse_bytes),
    ] = None
    header_timeout: float = MAX_HEADER_SECONDS
    body_timeout: Annotated[
        float,
        _seconds("--body-timeout", f"Timeout for receiving a request; at most {MAX_HEADER_SECONDS:g} for its headers."),
    ] = 300.0
    first_byte_timeout: Annotated[
        float, _seconds("--first-byte-timeout", "Timeout for the first byte of the engine's response.")
    ] = 600.0
    idle_timeout: Annotated[
        float, _seconds("--idle-timeout", "Timeout for the next part of a body, in either direction.")
    ] = 120.0
    drain_seconds: Annotated[
        float, _seconds("--drain-seconds", "Time for requests in flight to finish after SIGTERM or Ctrl-C.")
    ] = 30.0


def gateway_settings(context: HasContext, /, **values: Any) -> GatewaySettings:
    """Return settings; a use case for `icm serve`, with a parameter for each setting that is an option."""
    return GatewaySettings(**values)


_context, *_ = inspect.signature(gateway_settings).parameters.values()
_options = [
    parameter
    for parameter in inspect.signature(GatewaySettings).parameters.values()
    if parameter.name not in ("local_names", "header_timeout")
]
gateway_settings.__signature__ = inspect.Signature([_context, *_options])  # type: ignore[attr-defined]
