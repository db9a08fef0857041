"""A gateway in front of a stub of an engine, both on ports of this machine, and a client of the gateway."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from icmlora.serving.folders import AdapterFolders
from icmlora.serving.tasks import ServedTasks, open_tasks
from tests.icmlora.serving.conftest import Served

if TYPE_CHECKING:
    from tests.icmlora.serving.gateway.gateways import Gateway, StartGateway
    from tests.icmlora.serving.gateway.stub_engine import StubEngine

# Without the extra there is nothing to test; a conftest cannot skip.
if any(find_spec(name) is None for name in ("fastapi", "httpx", "prometheus_client", "uvicorn")):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def engine(served_template: Served) -> StubEngine:
    """A vLLM with the base model of the tasks."""
    from tests.icmlora.serving.gateway.stub_engine import StubEngine

    return StubEngine(model=str(served_template.base))


@pytest.fixture
def engine_url(engine: StubEngine) -> Iterator[str]:
    from tests.icmlora.serving.gateway.stub_engine import running

    with running(engine) as url:
        yield url


@pytest.fixture
def start(engine_url: str, served: Served, tmp_path: Path) -> Iterator[StartGateway]:
    """Return a function that starts a gateway; its arguments are settings, or the bytes for adapters."""
    import httpx

    from icmlora.serving.gateway.settings import GatewaySettings
    from tests.icmlora.serving.gateway.gateways import Gateway, running_gateway

    with ExitStack() as stack:

        def begin(*, room: int = 1 << 30, tasks: ServedTasks | None = None, **changes: Any) -> Gateway:
            settings = replace(GatewaySettings(engine_url=engine_url), **changes)
            folders = AdapterFolders(tmp_path / "adapters", room, alone=True)
            stack.callback(folders.close)
            source = tasks or open_tasks(served.store, None, command="test")
            url = stack.enter_context(running_gateway(source, folders, settings))
            client = stack.enter_context(httpx.Client(base_url=url, timeout=120, trust_env=False))
            return Gateway(url, client, folders)

        yield begin


@pytest.fixture
def gateway(start: StartGateway) -> Gateway:
    return start()


@pytest.fixture(autouse=True)
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What the gateway logs."""
    caplog.set_level(logging.INFO, logger="icmlora")
    return caplog
