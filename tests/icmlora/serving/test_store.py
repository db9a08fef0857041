"""A store in a database and a bucket, one or both of which go away: what is known goes on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from icm_cli.app import run
from icmlora import Fleet, attach
from icmlora.serving import store
from icmlora.serving.tasks import ServedTask, ServedTasks, open_tasks
from registry.errors import StoreUnavailable
from tests.icmlora.serving.conftest import Served, Team, folder_bytes
from tests.s3_faults import Fault, refuses


@pytest.fixture(autouse=True)
def asks_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no answer of the database count for longer than it takes."""
    monkeypatch.setattr(store, "_COST", 0.0)
    monkeypatch.setattr(store, "_PATIENCE", 60.0)


@pytest.fixture
def tasks(team: Team) -> ServedTasks:
    return open_tasks(team.url, None, command="icm serve")


def found(tasks: ServedTasks, name: str) -> ServedTask:
    task = tasks.find(name)
    assert task is not None
    return task


def goes_away(bucket: bool, database: bool, team: Team) -> None:
    if bucket:
        team.bucket.faults = [Fault("", float("inf"), before=refuses(503))]
    if database:
        team.database.leave()


def wait_for(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_task_of_a_team_is_written_as_that_of_a_folder(tasks: ServedTasks, served: Served, tmp_path: Path) -> None:
    assert tasks.names() == ["poems", "rules", "silent"]
    for name in tasks.names():
        tasks.write(found(tasks, name), tmp_path / "served" / name)
        Fleet(served.store).materialize(name, tmp_path / "materialized" / name)
        assert folder_bytes(tmp_path / "served" / name) == folder_bytes(tmp_path / "materialized" / name)


def test_a_task_is_written_again_without_a_network(tasks: ServedTasks, team: Team, tmp_path: Path) -> None:
    known = [found(tasks, name) for name in ("poems", "rules")]
    for task in known:
        tasks.write(task, tmp_path / "first" / task.name)
    connections, sends = team.database.connections, team.database.sends
    team.bucket.requests.clear()
    for task in known:
        tasks.write(task, tmp_path / "second" / task.name)
        assert folder_bytes(tmp_path / "first" / task.name) == folder_bytes(tmp_path / "second" / task.name)
    assert (team.database.connections, team.database.sends) == (connections, sends)
    assert team.bucket.requests == []


def test_the_database_is_not_asked_again_while_its_answer_counts(
    tasks: ServedTasks, team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_COST", 1e12)
    monkeypatch.setattr(store, "_MAX_PAUSE", 1e9)
    tasks.stamp()
    sends = team.database.sends
    for _ in range(100):
        tasks.stamp()
    assert team.database.sends == sends


def test_the_watch_holds_no_lock(tasks: ServedTasks, team: Team) -> None:
    tasks.stamp()
    found(tasks, "rules")
    assert run(["--store", team.url, "--lock-timeout", "0", "prune", "--yes"]) == 0


def test_a_change_is_seen_with_the_next_look(tasks: ServedTasks, team: Team) -> None:
    before = tasks.stamp()
    assert tasks.stamp() == before
    assert run(["--store", team.url, "edit", "silent", "--note", "quiet"]) == 0
    assert tasks.stamp() != before


@pytest.mark.parametrize(("bucket", "database"), [(True, False), (False, True), (True, True)])
def test_while_it_is_away_what_is_known_is_written_and_all_else_is_one_error(
    tasks: ServedTasks,
    team: Team,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    *,
    bucket: bool,
    database: bool,
) -> None:
    task = found(tasks, "poems")
    tasks.write(task, tmp_path / "before")
    other = found(tasks, "rules")  # its bytes are still in the bucket
    stamp = tasks.stamp()
    goes_away(bucket, database, team)
    tasks.write(task, tmp_path / "meanwhile")
    assert folder_bytes(tmp_path / "before") == folder_bytes(tmp_path / "meanwhile")
    assert tasks.stamp() == stamp
    for _ in range(3):
        if database:
            with pytest.raises(StoreUnavailable, match="postgresql://"):
                tasks.find("silent")
        if bucket:
            with pytest.raises(StoreUnavailable, match="s3://"):
                tasks.write(other, tmp_path / "other")
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == bucket + database
    team.bucket.faults = []
    team.database.come_back()
    wait_for(lambda: _is_back(tasks))
    tasks.write(found(tasks, "rules"), tmp_path / "after")


def _is_back(tasks: ServedTasks) -> bool:
    try:
        return tasks.find("rules") is not None
    except StoreUnavailable:
        return False


def test_nobody_waits_for_a_database_that_was_stopped(
    tasks: ServedTasks, team: Team, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, stamp = found(tasks, "poems"), tasks.stamp()
    tasks.write(task, tmp_path / "before")
    with monkeypatch.context() as patch:
        patch.setattr(store, "_PATIENCE", 0.0)
        patch.setattr(store, "_MAX_WAIT", 0.0)
        team.database.stop()
        assert tasks.stamp() == stamp
        tasks.write(task, tmp_path / "meanwhile")
        with pytest.raises(StoreUnavailable, match="does not respond"):
            wait_for(lambda: tasks.check())
    team.database.come_back()
    wait_for(lambda: _is_back(tasks))


def test_a_task_is_attached_again_while_all_is_away(team: Team, served: Served) -> None:
    fleet = Fleet(team.url)
    model = AutoModelForCausalLM.from_pretrained(served.base)
    model = attach(model, fleet, "poems")
    model = attach(model, fleet, "rules")
    goes_away(True, True, team)
    model = attach(model, fleet, "poems")
    with pytest.raises(StoreUnavailable):
        attach(model, fleet, "silent")


def test_bytes_that_were_pruned_meanwhile_are_looked_for_anew(
    tasks: ServedTasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from registry.errors import MissingBlob

    task = found(tasks, "poems")
    tasks.write(task, tmp_path / "first")
    parts = tasks.get("poems").source.codes
    monkeypatch.setattr(parts, "read", _missing(MissingBlob("gone")))
    tasks.write(task, tmp_path / "second")
    assert folder_bytes(tmp_path / "first") == folder_bytes(tmp_path / "second")


def _missing(error: Exception) -> Callable[[str], bytes]:
    def read(digest: str) -> bytes:
        raise error

    return read


def test_a_fleet_of_a_team_reads_what_one_in_a_folder_reads(team: Team, served: Served) -> None:
    here, there = Fleet(served.store), Fleet(team.url)
    names = [row.name for row in here.tasks()]
    assert [row.name for row in there.tasks()] == names
    assert there.tags() == here.tags()
    assert [task.name for task in there.tasks(sort="size")] == [task.name for task in here.tasks(sort="size")]
    for name in names:
        assert there.read_files(name) == here.read_files(name)
    for (_, one), (_, other) in zip(here.load_many(names), there.load_many(names), strict=True):
        assert all(torch.equal(mine.b, yours.b) for mine, yours in zip(one.modules, other.modules, strict=True))
    assert there.module_errors("rules") == here.module_errors("rules")
    assert [known.base.name for known in there.base_models()] == [known.base.name for known in here.base_models()]
    assert [found.generator.blob for found in there.generators()] == [
        found.generator.blob for found in here.generators()
    ]
