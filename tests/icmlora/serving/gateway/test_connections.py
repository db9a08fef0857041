"""What clients may do with connections, over real sockets: take their time, open many, and say for whom they are."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest

from tests.icmlora.serving.gateway.gateways import Gateway, StartGateway
from tests.icmlora.serving.gateway.stub_engine import StubEngine

BODY = b'{"model": "base"}'
POST = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n"


@contextmanager
def connected(gateway: Gateway) -> Iterator[socket.socket]:
    host, port = gateway.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        yield connection


def all_of(connection: socket.socket) -> bytes:
    """Return what the gateway sends until it closes the connection."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


def drip(connection: socket.socket) -> None:
    """Send one byte after the other as long as the gateway takes them."""
    while True:
        connection.sendall(b" ")
        with suppress(TimeoutError):
            if not connection.recv(65536):
                raise ConnectionResetError


def asked(gateway: Gateway, headers: bytes, body: bytes = BODY) -> bytes:
    with connected(gateway) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nconnection: close\r\n" + headers + b"\r\n" + body)
        return all_of(connection)


@pytest.mark.parametrize("begun", [b"POST /v1/compl", POST + b"x-slow: "])
def test_half_of_the_headers_is_closed_after_a_while(start: StartGateway, begun: bytes) -> None:
    with connected(start(header_timeout=0.3)) as connection:
        connection.sendall(begun)
        assert all_of(connection).startswith(b"HTTP/1.1 408")


def test_a_connection_without_any_request_is_closed_after_a_while(start: StartGateway) -> None:
    with connected(start(header_timeout=0.3)) as connection:
        assert all_of(connection) == b""


def test_half_of_a_second_request_is_closed_too(start: StartGateway) -> None:
    with connected(start(header_timeout=0.3)) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /hea")
        assert b"HTTP/1.1 408" in all_of(connection)


@pytest.mark.parametrize(
    ("path", "settings"),
    [
        (b"/v1/completions", {"idle_timeout": 60, "body_timeout": 0.3}),
        (b"/healthz", {"header_timeout": 0.3}),
        (b"/no", {"header_timeout": 0.3}),
    ],
)
def test_a_body_that_comes_byte_by_byte_ends(start: StartGateway, path: bytes, settings: dict[str, float]) -> None:
    with connected(start(**settings)) as connection:
        connection.sendall(b"POST %s HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100000\r\n\r\n" % path)
        connection.settimeout(0.05)
        with pytest.raises(ConnectionError):
            drip(connection)


def test_an_address_has_so_many_connections_and_more_once_they_are_closed(start: StartGateway) -> None:
    gateway = start(max_connections=5)
    with ExitStack() as open_ones:
        for _ in range(5):
            open_ones.enter_context(connected(gateway)).sendall(b"GET /hea")
        with connected(gateway) as refused:
            assert b"too_many_connections" in all_of(refused)
    assert gateway.client.get("/healthz").status_code == 200


def test_a_request_with_two_lengths_is_refused_and_nothing_after_it_is_read(gateway: Gateway) -> None:
    with connected(gateway) as connection:
        both = b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"
        connection.sendall(POST + both + b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
        answer = all_of(connection)
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"ambiguous_length" in answer
    assert answer.count(b"HTTP/1.1") == 1


LENGTH = b"content-length: %d\r\n" % len(BODY)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (b"host: localhost:8080\r\n", b"200"),
        (b"host: 127.0.0.1\r\norigin: http://localhost:3000\r\n", b"200"),
        (b"host: [::1]:8080\r\n", b"200"),
        (b"host: my-box\r\n", b"200"),
        (b"host: evil.example\r\n", b"421"),
        (b"host: localhost.evil.example\r\n", b"421"),
        (b"host: localhost\r\norigin: http://evil.example\r\n", b"403"),
        (b"host: localhost\r\norigin: null\r\n", b"403"),
        (b"host: localhost\r\norigin: http://[\r\n", b"403"),
    ],
)
def test_only_requests_for_this_machine_pass_where_being_on_it_is_all_it_takes(
    start: StartGateway, engine: StubEngine, headers: bytes, status: bytes
) -> None:
    gateway = start(local_names=frozenset({"my-box"}))
    assert asked(gateway, headers + LENGTH).split(b" ")[1] == status
    assert bool(engine.headers) == (status == b"200")


def test_clients_of_anthropics_api_send_the_token_their_way(start: StartGateway, engine: StubEngine) -> None:
    gateway = start(token="secret")
    assert asked(gateway, b"host: x\r\nx-api-key: secret\r\n" + LENGTH).split(b" ")[1] == b"200"
    assert "x-api-key" not in engine.headers
    assert asked(gateway, b"host: x\r\nx-api-key: secre\r\n" + LENGTH).split(b" ")[1] == b"401"
