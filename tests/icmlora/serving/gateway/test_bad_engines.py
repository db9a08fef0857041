"""Engines that are slow, dying, lying or not there: a clear answer, and no hang."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from tests.icmlora.serving.gateway.gateways import Gateway, StartGateway, wait_for
from tests.icmlora.serving.gateway.stub_engine import StubEngine, running


@contextmanager
def talking(answer: bytes) -> Iterator[str]:
    """Run a server that sends the same bytes to whoever connects, and closes the connection; yield its URL."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(5)
                connection.recv(65536)
                connection.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()
        thread.join()


def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def error_of(answer: Any) -> tuple[int, str]:
    """Return status and code of an answer, which has the shape of OpenAI's errors."""
    error = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"].endswith(".") or ":" in error["message"]
    return answer.status_code, error["code"]


def test_an_engine_that_is_not_there(start: StartGateway) -> None:
    gateway = start(engine_url=closed_port())
    assert error_of(gateway.ask("rules")) == (502, "engine_unreachable")
    assert error_of(gateway.ask("base")) == (502, "engine_unreachable")
    assert gateway.metric('icm_problems_total{reason="engine_unreachable"}') == 2


def test_an_engine_that_comes_later_is_found(start: StartGateway, engine: StubEngine) -> None:
    url = closed_port()
    gateway = start(engine_url=url)
    assert gateway.ask("rules").status_code == 502
    with running(engine, int(url.rpartition(":")[2])):
        assert gateway.ask("rules").status_code == 200


def test_an_engine_that_goes_and_comes_back(start: StartGateway, engine: StubEngine) -> None:
    url = closed_port()
    port = int(url.rpartition(":")[2])
    with running(engine, port):
        gateway = start(engine_url=url)
        assert gateway.ask("rules").status_code == 200
    assert error_of(gateway.ask("rules")) == (502, "engine_unreachable")
    engine.adapters.clear()
    with running(engine, port):
        assert gateway.ask("rules").status_code == 200
    assert engine.loads == ["rules", "rules"]


def test_an_engine_that_comes_back_with_another_base_model(start: StartGateway, engine: StubEngine) -> None:
    url = closed_port()
    port = int(url.rpartition(":")[2])
    with running(engine, port):
        gateway = start(engine_url=url)
        assert gateway.ask("rules").status_code == 200
    gateway.ask("rules")
    another = StubEngine(model="acme/another")
    with running(another, port):
        assert error_of(gateway.ask("rules")) == (404, "adapter_unsuited")
    assert another.loads == []


def test_an_engine_that_is_slow_to_begin(start: StartGateway, engine: StubEngine) -> None:
    gateway = start(first_byte_timeout=0.3)
    gateway.ask("rules")
    engine.hold = threading.Event()
    assert error_of(gateway.ask("rules")) == (504, "engine_timeout")
    wait_for(lambda: engine.aborted == 1)


def test_an_engine_that_stops_in_the_middle(start: StartGateway, engine: StubEngine) -> None:
    gateway = start(idle_timeout=0.3)
    gateway.ask("rules")
    engine.between = 60
    assert events_of(gateway)[-1] == ("error", "engine_timeout")
    wait_for(lambda: engine.aborted == 1)


def test_an_engine_that_dies_in_the_middle(gateway: Gateway, engine: StubEngine) -> None:
    gateway.ask("rules")
    engine.dies_after = 2
    assert events_of(gateway) == [("message", 0), ("message", 1), ("error", "engine_died")]
    assert gateway.metric('icm_problems_total{reason="engine_died"}') == 1


def events_of(gateway: Gateway) -> list[tuple[str, Any]]:
    """Return the events of a stream that must not end as a complete one does."""
    received: list[bytes] = []
    stream = gateway.client.stream("POST", "/v1/completions", json={"model": "rules", "stream": True})
    with stream as answer, pytest.raises(httpx.RemoteProtocolError, match="incomplete"):
        received.extend(answer.iter_raw())
    events = []
    for text in b"".join(received).decode().strip().split("\n\n"):
        name, _, data = text.rpartition("data: ")
        found = json.loads(data)
        events.append((name.removeprefix("event: ").strip() or "message", found.get("piece", found.get("error"))))
    return [(name, value["code"] if isinstance(value, dict) else value) for name, value in events]


def test_an_answer_of_known_length_that_is_cut_is_not_passed_off_as_whole(start: StartGateway) -> None:
    models = b'{"data": [{"id": "base", "owned_by": "vllm"}]}'
    whole = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
    with talking(whole % (len(models) + 7, models)) as url:
        gateway = start(engine_url=url, engine="vllm")
        assert error_of(gateway.ask("base")) == (502, "engine_died")


@pytest.mark.one_case
@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (b"", "engine_died"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "engine_died"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]", "engine_invalid"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nnot JSON!", "engine_invalid"),
        (b'HTTP/1.1 200 OK\r\ncontent-length: 12\r\n\r\n{"data": []}', "engine_unknown"),
        (b'HTTP/1.1 200 OK\r\ncontent-length: 22\r\n\r\n{"data": [{"x": "y"}]}', "engine_invalid"),
        (b'HTTP/1.1 200 OK\r\ncontent-length: 23\r\n\r\n{"data": [{"id": "y"}]}', "engine_unknown"),
        (b"HTTP/1.1 500 Oh\r\ncontent-length: 0\r\n\r\n", "engine_invalid"),
        (b"HTTP/1.1 401 No\r\ncontent-length: 0\r\n\r\n", "engine_refused_token"),
        (b"HTTP/1.1 302 Go\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n", "engine_invalid"),
    ],
)
def test_what_is_no_engine_is_no_engine(start: StartGateway, answer: bytes, code: str) -> None:
    with talking(answer) as url:
        assert error_of(start(engine_url=url).ask("rules")) == (502, code)


@pytest.mark.one_case
@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((400, {"error": {"message": "rank 64 is above 16", "code": 400}}), "rank 64 is above 16"),
        ((400, {"success": False, "error_message": "rank 64 is above 16"}), "rank 64 is above 16"),
        ((500, {"error": "out of memory"}), "out of memory"),
        ((500, b"<html>"), "status 500"),
        ((422, []), "status 422"),
    ],
)
def test_an_engine_that_refuses_an_adapter_says_why(
    gateway: Gateway, engine: StubEngine, answer: tuple[int, Any], reason: str
) -> None:
    engine.load_answer = answer
    refused = gateway.ask("rules")
    assert error_of(refused) == (502, "engine_refused_adapter")
    assert refused.json()["error"]["message"].endswith(reason)


def test_an_engine_that_was_not_started_for_adapters_says_how(gateway: Gateway, engine: StubEngine) -> None:
    engine.load_answer = 404, {"detail": "Not Found"}
    refused = gateway.ask("rules")
    assert error_of(refused) == (502, "engine_not_prepared")
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in refused.json()["error"]["message"]


def test_an_engine_that_was_not_started_for_adapters_is_not_ready(
    start: StartGateway, engine: StubEngine, log: pytest.LogCaptureFixture
) -> None:
    engine.is_prepared = False
    assert error_of(start().client.get("/readyz")) == (503, "engine_not_prepared")
    wait_for(lambda: "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in log.text)


def test_an_engine_that_lies_about_loading(gateway: Gateway, engine: StubEngine) -> None:
    engine.lies = True
    assert error_of(gateway.ask("rules")) == (502, "engine_lied")


def test_the_folder_of_an_adapter_that_was_refused_does_not_stay(gateway: Gateway, engine: StubEngine) -> None:
    engine.load_answer = 400, {"error": "no"}
    gateway.ask("rules")
    engine.load_answer = None
    gateway.ask("poems")
    assert len(gateway.folders.keys()) == 1


def test_an_engine_that_forgets_at_once_is_asked_again_once(
    gateway: Gateway, engine: StubEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forget(fields: dict[str, Any]) -> tuple[int, Any]:
        engine.adapters.clear()
        return 404, {"error": {"message": "gone"}}

    gateway.ask("rules")
    monkeypatch.setattr(engine, "_missing", forget)
    assert gateway.ask("rules").status_code == 404
    assert engine.loads == ["rules", "rules"]


def test_an_engine_that_cannot_unload_keeps_the_adapter_and_its_folder(
    start: StartGateway, engine: StubEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = start(max_adapters=1)
    gateway.ask("rules")
    unload = StubEngine._unload

    async def refuse(send: Any, asked: dict[str, str]) -> None:
        from tests.icmlora.serving.gateway import stub_engine

        await stub_engine._answer(send, 500, {"error": "busy"})

    monkeypatch.setattr(engine, "_unload", refuse)
    assert error_of(gateway.ask("poems")) == (502, "engine_refused_unload")
    assert gateway.ask("rules").status_code == 200
    monkeypatch.setattr(engine, "_unload", lambda send, asked: unload(engine, send, asked))
    assert gateway.ask("poems").status_code == 200
    assert engine.gone == []
