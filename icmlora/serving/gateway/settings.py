"""Settings of the gateway. This module has no heavy imports, because the command line imports it."""

from __future__ import annotations

from dataclasses import dataclass

from icmlora.serving.requirements import EngineName


@dataclass(frozen=True, kw_only=True)
class GatewaySettings:
    """Address of the engine, access control and limits.

    Attributes:
        engine_url: Address of the engine.
        engine: Type of the engine; None to detect it.
        engine_token: Token for the engine.
        base_model: The base model of the engine, if the user named it.
        token: Token that clients must send; None for open access.
        local_names: Names of this machine, if only local clients have access: the Host header must be one of them or
            localhost, which keeps foreign web pages from using a local browser. None: any name.
        max_adapters: Maximum number of loaded adapters; None for as many as fit into the folders.
        max_waiting: Maximum number of tasks waiting to load.
        max_requests: Maximum number of concurrent requests.
        max_connections: Maximum number of connections per address.
        max_body: Maximum size of a request body in bytes.
        header_timeout: Seconds for a request's headers to arrive.
        body_timeout: Seconds for its body to arrive.
        first_byte_timeout: Seconds for the engine's response to begin.
        idle_timeout: Seconds between two chunks of a body, in either direction.
        drain: Seconds for requests in flight to finish when the gateway stops.
        access_log: Whether to log each request.
    """

    engine_url: str
    engine: EngineName | None = None
    engine_token: str | None = None
    base_model: str | None = None
    token: str | None = None
    local_names: frozenset[str] | None = None
    max_adapters: int | None = None
    max_waiting: int = 64
    max_requests: int = 512
    max_connections: int = 1024
    max_body: int = 64 << 20
    header_timeout: float = 30.0
    body_timeout: float = 300.0
    first_byte_timeout: float = 600.0
    idle_timeout: float = 120.0
    drain: float = 30.0
    access_log: bool = False
