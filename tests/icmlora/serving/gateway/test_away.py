"""The gateway in front of a store in a database and a bucket that go away and come back."""

from __future__ import annotations

import logging
import time

import pytest

from icmlora.serving import store
from icmlora.serving.gateway import residency
from icmlora.serving.tasks import open_tasks
from tests.icmlora.serving.conftest import Team
from tests.icmlora.serving.gateway.gateways import Gateway, StartGateway, wait_for
from tests.s3_faults import Fault, refuses


@pytest.fixture
def gateway(start: StartGateway, team: Team, monkeypatch: pytest.MonkeyPatch) -> Gateway:
    monkeypatch.setattr(store, "_MAX_PAUSE", 0.01)
    monkeypatch.setattr(residency, "_REMEMBERED", 0.01)
    return start(tasks=open_tasks(team.url, None, command="icm serve"), max_adapters=1)


def wait_until_quiet(team: Team) -> None:
    """Wait until nobody asks the database any more, as the gateway does on its own when it begins."""
    sent: list[int] = []

    def is_quiet() -> bool:
        sent.append(team.database.sends)
        time.sleep(0.2)
        return sent[-5:] == [team.database.sends] * 5

    wait_for(is_quiet)


def test_a_request_for_a_known_task_touches_no_network(
    gateway: Gateway, team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [gateway.ask(name).status_code for name in ("rules", "poems")] == [200, 200]
    monkeypatch.setattr(store, "_COST", 1e12)
    monkeypatch.setattr(store, "_MAX_PAUSE", 1e9)
    gateway.ask("poems")
    wait_until_quiet(team)
    before = team.database.connections, team.database.sends
    team.bucket.requests.clear()
    # One adapter is loaded at a time, so each is written again.
    assert [gateway.ask(name).status_code for name in ("rules", "poems", "rules")] == [200, 200, 200]
    assert (team.database.connections, team.database.sends) == before
    assert team.bucket.requests == []


@pytest.mark.parametrize("how", ["leave", "stop"])
def test_known_tasks_are_served_without_a_database_and_others_get_503(
    gateway: Gateway, team: Team, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    assert gateway.ask("rules").status_code == 200
    monkeypatch.setattr(store, "_MAX_WAIT", 0.2)
    assert gateway.ask("poems").status_code == 200
    wait_until_quiet(team)
    getattr(team.database, how)()
    wait_for(lambda: gateway.ask("silent").status_code == 503)
    for _ in range(3):
        assert [gateway.ask(name).status_code for name in ("rules", "poems")] == [200, 200]
        refused = gateway.ask("silent")
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "store_unavailable"
        assert "postgresql://" in refused.json()["error"]["message"]
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    team.database.come_back()
    wait_for(lambda: gateway.ask("silent").status_code == 200)


def test_known_tasks_are_served_without_a_bucket_and_others_get_503(
    gateway: Gateway, team: Team, caplog: pytest.LogCaptureFixture
) -> None:
    assert gateway.ask("rules").status_code == 200
    assert gateway.ask("poems").status_code == 200
    wait_until_quiet(team)
    team.bucket.faults = [Fault("", float("inf"), before=refuses(503))]
    refused = gateway.ask("silent")
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "store_unavailable"
    assert "s3://" in refused.json()["error"]["message"]
    assert [gateway.ask(name).status_code for name in ("rules", "poems")] == [200, 200]
    assert gateway.ask("silent").status_code == 503
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1
    team.bucket.faults = []
    wait_for(lambda: gateway.ask("silent").status_code == 200)
