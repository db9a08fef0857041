"""How the gateway works. Nothing heavy is imported here: the options of `icm serve` have their defaults from it."""

from __future__ import annotations

from dataclasses import dataclass

from icmlora.serving.requirements import EngineName


@dataclass(frozen=True, kw_only=True)
class GatewaySettings:
    """Where the engine is, who may ask, and what requests may take.

    Attributes:
        engine_url: Where the engine is.
        engine: Which one it is; None to ask it.
        engine_token: What the engine wants to be told.
        base_model: The base model of the tasks, if the user says that it is the engine's.
        token: What clients must know; None for nothing.
        local_names: Names of this machine, if only who is on it may ask: a request has to be addressed to one of them,
            or to localhost. A web page elsewhere could have it sent by a browser here. None: any name.
        max_adapters: How many adapters may be loaded; None for as many as the folders hold.
        max_waiting: How many tasks may wait to be loaded.
        max_requests: How many requests may be in work.
        max_connections: How many connections one address may have open.
        max_body: Bytes of a request's body.
        header_timeout: Seconds until a request's headers have arrived.
        body_timeout: Seconds until its body has.
        first_byte_timeout: Seconds until the engine's answer begins.
        idle_timeout: Seconds between two pieces of a body, in either direction.
        drain: Seconds for requests in flight to end when the gateway is stopped.
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
