"""What reaches the engine, and what comes back."""

from __future__ import annotations

import json
import socket
import threading
import time
from typing import Any

import pytest

from icmlora.serving.gateway import forward
from tests.icmlora.serving.gateway.gateways import Gateway, StartGateway, wait_for
from tests.icmlora.serving.gateway.stub_engine import PIECES, StubEngine


def test_the_first_request_for_a_task_loads_its_adapter(gateway: Gateway, engine: StubEngine) -> None:
    answer = gateway.ask("rules")
    assert answer.status_code == 200
    assert answer.json()["asked"]["model"] == "rules"
    assert engine.loads == ["rules"]


def test_the_second_request_finds_it_loaded(gateway: Gateway, engine: StubEngine) -> None:
    for _ in range(3):
        assert gateway.ask("rules").status_code == 200
    assert engine.loads == ["rules"]
    assert (gateway.metric("icm_adapter_hits_total"), gateway.metric("icm_adapter_misses_total")) == (2, 1)


@pytest.mark.one_case
@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages", "/v1/score", "/tokenize", "/pooling"]
)
def test_every_listed_route_is_passed_on(gateway: Gateway, path: str) -> None:
    assert gateway.ask("rules", path, input="x").json() == {
        "path": path,
        "method": "POST",
        "asked": {"model": "rules", "input": "x"},
    }


def test_a_stored_response_is_fetched_and_cancelled(gateway: Gateway) -> None:
    assert gateway.client.get("/v1/responses/resp_1?stream=false").json()["path"] == "/v1/responses/resp_1"
    assert gateway.client.post("/v1/responses/resp_1/cancel").json()["path"] == "/v1/responses/resp_1/cancel"


def test_a_body_arrives_byte_for_byte(gateway: Gateway, engine: StubEngine) -> None:
    body = b'{ "seed":1e0, "model" : "rules",\n "text": "\\u00e9 \xc3\xa9" }'
    gateway.client.post("/v1/completions", content=body)
    assert engine.asked[-1] == ("POST", "/v1/completions", body)


def test_headers_arrive_but_those_of_one_hop(gateway: Gateway, engine: StubEngine) -> None:
    sent = {"x-request-id": "7", "accept": "text/x", "te": "trailers", "x-hop": "1", "connection": "x-hop, close"}
    gateway.client.post("/v1/completions", json={"model": "rules"}, headers=sent)
    assert (engine.headers["x-request-id"], engine.headers["accept"]) == ("7", "text/x")
    assert not {"te", "x-hop"} & set(engine.headers)


def test_a_header_that_the_client_did_not_send_is_not_made_up(gateway: Gateway, engine: StubEngine) -> None:
    body = b'{"model": "base"}'
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
    host, port = gateway.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head + body)
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
    assert set(engine.headers) == {"host", "content-length"}


def test_the_headers_of_the_answer_come_back(gateway: Gateway) -> None:
    assert gateway.ask("rules").headers["x-engine"] == "stub"


@pytest.mark.slow
def test_a_stream_comes_piece_by_piece(gateway: Gateway, engine: StubEngine) -> None:
    engine.between = 0.2
    with gateway.client.stream("POST", "/v1/completions", json={"model": "rules", "stream": True}) as answer:
        pieces = list(answer.iter_raw())
        assert answer.headers["content-type"].startswith("text/event-stream")
    assert len(pieces) > PIECES, "each event came by itself"
    assert b"".join(pieces) == b'data: {"piece": 0}\n\ndata: {"piece": 1}\n\ndata: {"piece": 2}\n\ndata: [DONE]\n\n'


def test_a_client_that_leaves_takes_its_request_with_it(gateway: Gateway, engine: StubEngine) -> None:
    engine.between = 0.1
    with gateway.client.stream("POST", "/v1/completions", json={"model": "rules", "stream": True}) as answer:
        next(answer.iter_raw())
    wait_for(lambda: engine.aborted == 1)
    wait_for(lambda: gateway.metric('icm_requests_total{route="/v1/completions",status="499"}') == 1)


def test_a_client_that_leaves_before_the_answer_begins_takes_its_request_with_it(
    gateway: Gateway, engine: StubEngine
) -> None:
    gateway.ask("rules")
    engine.hold = threading.Event()
    with pytest.raises(Exception, match="timed out"):
        gateway.client.post("/v1/completions", json={"model": "rules"}, timeout=0.3)
    wait_for(lambda: engine.aborted == 1)
    wait_for(lambda: gateway.metric('icm_requests_total{route="/v1/completions",status="499"}') == 1)


@pytest.mark.slow
def test_a_slow_reader_slows_the_engine_down(gateway: Gateway, engine: StubEngine) -> None:
    sent = 0

    async def flood(scope: Any, receive: Any, send: Any) -> None:
        nonlocal sent
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(2000):
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
            sent += 65536
        await send({"type": "http.response.body"})

    engine._complete = lambda receive, send, *_: flood(None, receive, send)  # type: ignore[method-assign]
    with gateway.client.stream("POST", "/v1/completions", json={"model": "base"}) as answer:
        reading = answer.iter_raw(65536)
        next(reading)
        before = -1
        while before != sent:  # until nothing moves any more
            before = sent
            time.sleep(0.3)
        assert sent < 40 << 20, "most of the 125 MiB wait in the engine"
        assert sum(map(len, reading)) == 1999 * 65536


def test_the_base_model_is_asked_without_an_adapter(gateway: Gateway, engine: StubEngine) -> None:
    assert gateway.ask("base").status_code == 200
    assert engine.loads == []


def test_an_unknown_model_gets_the_engines_own_answer(gateway: Gateway) -> None:
    answer = gateway.ask("nobody")
    assert answer.status_code == 404
    assert answer.json()["error"]["message"] == "The model `nobody` does not exist."


def test_a_body_without_a_model_is_passed_on(gateway: Gateway) -> None:
    assert gateway.client.post("/v1/completions", json={"prompt": "x"}).status_code == 200


def test_an_adapter_that_the_engine_has_itself_is_left_to_it(gateway: Gateway, engine: StubEngine) -> None:
    engine.adapters["rules"] = "/somewhere/else"
    assert gateway.ask("rules").status_code == 200
    assert (engine.loads, engine.gone) == ([], ["rules"]), "of its own folder, which is not there"


def test_sglang_is_told_base_and_adapter(start: StartGateway, engine: StubEngine) -> None:
    engine.kind = "sglang"
    gateway = start()
    for model in ("poems", "base:poems"):
        answer = gateway.ask(model, temperature=0)
        assert answer.status_code == 200
        asked = answer.json()["asked"]
        base, _, adapter = asked.pop("model").partition(":")
        assert (base, adapter.split("@")[0]) == ("base", "poems")
        assert asked == {"temperature": 0}
    assert len(engine.loads) == 1


def test_sglang_would_answer_for_any_name_so_the_gateway_refuses_it(start: StartGateway, engine: StubEngine) -> None:
    engine.kind = "sglang"
    gateway = start()
    answer = gateway.ask("nobody")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert gateway.ask("default").status_code == 200
    assert json.loads(engine.asked[-1][2]) == {"model": "default"}


def test_sglang_serves_an_adapter_that_somebody_else_loaded_later(
    start: StartGateway, engine: StubEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "_RECENT", 0.0)
    engine.kind = "sglang"
    gateway = start()
    assert gateway.ask("static").status_code == 404
    engine.adapters["static"] = "/somewhere"
    assert gateway.ask("static").json()["asked"]["model"] == "base:static"
