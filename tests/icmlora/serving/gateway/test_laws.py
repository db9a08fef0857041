"""Whatever a client sends, the gateway does not fail."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from urllib.parse import quote

import httpx
import pytest
from hypothesis import given, strategies as st

from icmlora.serving.folders import AdapterFolders
from icmlora.serving.gateway.settings import GatewaySettings
from icmlora.serving.tasks import open_tasks
from tests.icmlora.serving.conftest import Served
from tests.icmlora.serving.gateway.gateways import running_gateway
from tests.icmlora.serving.gateway.stub_engine import StubEngine, running

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
NAMES = (
    st.text() | st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", fullmatch=True) | st.sampled_from(["rules", "base:"])
)
PATHS = st.sampled_from(["/v1/chat/completions", "/v1/completions", "/v1/messages", "/tokenize"])


@pytest.fixture(scope="module", params=["vllm", "sglang"])
def client(
    request: pytest.FixtureRequest, served_template: Served, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    engine = StubEngine(kind=request.param, model=str(served_template.base))
    tasks = open_tasks(served_template.store, None, command="test")
    folders = AdapterFolders(tmp_path_factory.mktemp("adapters") / "root", 1 << 30, alone=True)
    with (
        running(engine) as engine_url,
        running_gateway(
            tasks, folders, GatewaySettings(engine_url=engine_url, base_model=served_template.label)
        ) as url,
        httpx.Client(base_url=url, trust_env=False, timeout=120) as client,
    ):
        yield client
    folders.close()


@pytest.mark.one_case
@given(path=PATHS, model=NAMES | JSON, rest=st.dictionaries(st.text(), JSON, max_size=3))
def test_any_model_gets_an_answer(client: httpx.Client, path: str, model: object, rest: dict[str, object]) -> None:
    body = json.dumps({**rest, "stream": False, "model": model}).encode("utf-8", "surrogatepass")
    assert client.post(path, content=body).status_code < 500


@given(path=PATHS, body=st.binary())
def test_any_body_gets_an_answer(client: httpx.Client, path: str, body: bytes) -> None:
    assert client.post(path, content=body).status_code < 500


@given(path=st.text(), query=st.text(max_size=20))
def test_any_path_gets_an_answer(client: httpx.Client, path: str, query: str) -> None:
    target = f"/v1/models/{quote(path, errors='replace')}?{quote(query, errors='replace')}"
    assert client.get(target).status_code < 500


@pytest.mark.one_case
@given(query=st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=20))
def test_any_query_gets_an_answer(client: httpx.Client, query: str) -> None:
    body = b'{"model": "poems"}'
    head = (
        f"POST /v1/completions?{query} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection((client.base_url.host, client.base_url.port or 0)) as connection:
        connection.sendall(head.encode() + body)
        assert connection.recv(65536)[9:12] in (b"200", b"400")
