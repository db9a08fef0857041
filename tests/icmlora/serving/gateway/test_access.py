"""Who may ask for what: tokens, routes, limits; and what the gateway answers itself."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.icmlora.serving.gateway.gateways import Gateway, StartGateway, wait_for
from tests.icmlora.serving.gateway.stub_engine import StubEngine

ADMINISTRATION = [
    *("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/load_lora_adapter", "/unload_lora_adapter"),
    *("/load_lora_adapter_from_tensors", "/sleep", "/wake_up", "/update_weights", "/update_weights_from_disk"),
    *("/flush_cache", "/reset_prefix_cache", "/collective_rpc", "/start_profile", "/abort_request", "/invocations"),
    *("/v1/responses/..%2f..%2fsleep", "/v1/responses/%2e%2e/cancel", "/v1/%6coad_lora_adapter", "//sleep"),
    *("/v1/chat/completions/../../../sleep", "/v1/completions/", "/V1/completions", "/"),
]


@pytest.mark.slow
def test_a_client_needs_the_token(start: StartGateway, engine: StubEngine) -> None:
    gateway = start(token="secret")
    for given in (
        {},
        {"authorization": "Bearer secre"},
        {"authorization": "secret"},
        {"authorization": "Basic secret"},
    ):
        answer = gateway.client.post("/v1/completions", json={"model": "rules"}, headers=given)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
    assert engine.headers == {}
    answer = gateway.client.post("/v1/completions", json={"model": "rules"}, headers={"authorization": "bearer secret"})
    assert answer.status_code == 200


@pytest.mark.one_case
@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/rules", "/metrics", "/sleep"])
def test_nothing_but_the_probes_is_open_without_the_token(start: StartGateway, path: str) -> None:
    assert start(token="secret").client.get(path).status_code == 401


def test_the_probes_need_no_token(start: StartGateway) -> None:
    client = start(token="secret").client
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json() == {"status": "ready"}


def test_the_clients_token_stays_here(start: StartGateway, engine: StubEngine) -> None:
    gateway = start(token="secret")
    gateway.client.post("/v1/completions", json={"model": "base"}, headers={"authorization": "Bearer secret"})
    assert "authorization" not in engine.headers


def test_the_engine_gets_its_own_token(start: StartGateway, engine: StubEngine) -> None:
    engine.token = "engine's"
    gateway = start(token="secret", engine_token="engine's")
    answer = gateway.client.post("/v1/completions", json={"model": "rules"}, headers={"authorization": "Bearer secret"})
    assert answer.status_code == 200
    assert engine.headers["authorization"] == "Bearer engine's"


def test_without_tokens_the_clients_own_goes_to_the_engine(gateway: Gateway, engine: StubEngine) -> None:
    gateway.client.post("/v1/completions", json={"model": "base"}, headers={"authorization": "Bearer mine"})
    assert engine.headers["authorization"] == "Bearer mine"


@pytest.mark.one_case
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE"])
def test_the_engines_administration_is_out_of_reach(gateway: Gateway, engine: StubEngine, method: str) -> None:
    host, port = gateway.url.removeprefix("http://").split(":")
    for path in ADMINISTRATION:
        with socket.create_connection((host, int(port))) as connection:  # a client would tidy the path up
            connection.sendall(f"{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
            assert connection.recv(65536).startswith((b"HTTP/1.1 404", b"HTTP/1.1 405")), path
    assert {path for _, path, _ in engine.asked} <= {"/v1/models"}


def test_a_route_that_is_not_there_is_said_in_openais_shape(gateway: Gateway) -> None:
    answer = gateway.client.post("/v1/images/generations", json={})
    assert answer.json()["error"]["message"] == "The gateway has no route POST /v1/images/generations."


def test_a_large_body_is_refused(start: StartGateway, engine: StubEngine) -> None:
    gateway = start(max_body=1000)
    answer = gateway.ask("base", text="x" * 2000)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    assert engine.headers == {}
    assert gateway.ask("base", text="x" * 500).status_code == 200


def test_a_body_that_never_arrives_ends(start: StartGateway) -> None:
    gateway = start(idle_timeout=0.3)
    host, port = gateway.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n{")
        assert connection.recv(65536).startswith(b"HTTP/1.1 408")


@pytest.mark.one_case
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"rules"', b"\xff", b"[" * 100_000, b'{"model": NaNs}'])
def test_a_body_that_is_no_json_object_is_refused(gateway: Gateway, body: bytes) -> None:
    answer = gateway.client.post("/v1/completions", content=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")


def test_only_so_many_requests_are_in_work(start: StartGateway, engine: StubEngine) -> None:
    gateway = start(max_requests=2)
    engine.hold = threading.Event()
    with ThreadPoolExecutor(2) as threads:
        answers = [threads.submit(gateway.ask, "base") for _ in range(2)]
        wait_for(lambda: gateway.metric("icm_requests_in_flight") == 2)
        refused = gateway.ask("base")
        engine.hold.set()
        assert [answer.result().status_code for answer in answers] == [200, 200]
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "too_many_requests")
    assert refused.headers["retry-after"] == "1"


def test_the_list_of_models_has_the_base_model_and_all_tasks(gateway: Gateway, engine: StubEngine) -> None:
    engine.adapters["static"] = "/somewhere"
    gateway.ask("rules")
    listed = gateway.client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [card["id"] for card in listed["data"]] == ["base", "static", "poems", "rules", "silent"]
    assert {card["parent"] for card in listed["data"][1:]} == {"base"}
    assert gateway.client.get("/v1/models/rules").json() == listed["data"][3]
    assert gateway.client.get("/v1/models/org/unknown").status_code == 404


def test_tasks_of_another_base_model_are_not_listed(start: StartGateway, engine: StubEngine) -> None:
    engine.model = "acme/another"
    assert [card["id"] for card in start().client.get("/v1/models").json()["data"]] == ["base"]


def test_it_is_ready_as_long_as_the_engine_is(start: StartGateway) -> None:
    client = start(engine_url="http://127.0.0.1:9").client
    assert client.get("/healthz").status_code == 200
    answer = client.get("/readyz")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unreachable")


def test_metrics_count_requests_by_route_and_status(gateway: Gateway) -> None:
    gateway.ask("rules")
    gateway.ask("nobody")
    gateway.client.get("/secret/of/a/client")
    wait_for(lambda: gateway.metric("icm_requests_total") >= 3)
    text = gateway.client.get("/metrics").text
    for line in (
        'icm_requests_total{route="/v1/chat/completions",status="200"} 1.0',
        'icm_requests_total{route="/v1/chat/completions",status="404"} 1.0',
        'icm_requests_total{route="other",status="404"} 1.0',
        "icm_loaded_adapters 1.0",
        "icm_materialize_seconds_count 1.0",
    ):
        assert line in text.splitlines()
    assert gateway.metric("icm_adapter_bytes") == gateway.folders.size > 0


def test_no_label_is_a_clients_text(gateway: Gateway) -> None:
    before = len(gateway.client.get("/metrics").text.splitlines())
    for number in range(30):
        gateway.ask(f"model-{number}")
        gateway.client.get(f"/path-{number}")
    after = gateway.client.get("/metrics").text
    assert "model-" not in after
    assert "path-" not in after
    assert len(after.splitlines()) < before + 15


@pytest.mark.slow
def test_the_gateway_closes_the_connection_of_a_client_that_does_not_read(
    start: StartGateway, engine: StubEngine
) -> None:
    async def flood(receive: object, send: object, *_: object) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})  # type: ignore[operator]
        for _ in range(4000):
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})  # type: ignore[operator]

    engine._complete = flood  # type: ignore[assignment, method-assign]
    gateway = start(idle_timeout=0.5)
    with gateway.client.stream("POST", "/v1/completions", json={"model": "base"}) as answer:
        wait_for(lambda: httpx.get(f"{gateway.url}/metrics", trust_env=False).text.find("in_flight 0.0") > 0)
        with pytest.raises(httpx.RemoteProtocolError):
            list(answer.iter_raw())
