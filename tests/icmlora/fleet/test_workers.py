"""How tasks are given to workers, with a stand-in for Ray; and what is refused before any worker starts."""

from __future__ import annotations

import pickle
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from icmlora import Fleet
from icmlora.errors import InvalidWorkers, WorkersUnavailable
from icmlora.fleet.context import Context
from icmlora.fleet.failures import Failed
from icmlora.fleet.resources.loading import ModelCache
from icmlora.fleet.resources.workers import ATTEMPTS, OnProgress, _Pool, _Worker, worker_pool
from registry.errors import RegistryError, StoreUnavailable
from registry.manifests import Task
from registry.names import DatabaseUrl
from registry.store import Store
from tests.icmlora.fleet.stores import TASKS

Work = Callable[[str], str]


class FakeRay:
    """Runs a call when its result is asked for, the earliest first."""

    class exceptions:
        class RayError(Exception):
            pass

        class RayTaskError(RayError):
            def __init__(self, cause: Exception) -> None:
                self.cause = cause

    def __init__(self) -> None:
        self.killed: list[object] = []

    def wait(self, references: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        return references[:1], references[1:]

    def get(self, reference: Any) -> Any:
        return [one() for one in reference] if isinstance(reference, list) else reference()

    def put(self, value: object) -> object:
        return value

    def kill(self, worker: object) -> None:
        self.killed.append(worker)


class FakeActor:
    """A worker; `work` raises what Ray would."""

    def __init__(self, work: Work) -> None:
        self.run, self.close, self.work = self, FakeClose(), work

    def remote(self, task: Task, call: object) -> Callable[[], tuple[str, list[object]]]:
        return lambda: (self.work(task.name), [])


class FakeClose:
    """The method of a worker that closes its store."""

    def remote(self) -> Callable[[], None]:
        return lambda: None


@pytest.fixture
def store(ingested: Fleet) -> Iterator[Store]:
    with Store.open(ingested.path) as opened:
        yield opened


def unused(models: ModelCache, tasks: Sequence[Task], on_progress: OnProgress) -> Iterator[tuple[Task, str]]:
    """Stand for what a worker calls."""
    raise AssertionError


def results(store: Store, work: Work, ray: FakeRay | None = None, workers: int = 1) -> list[tuple[str, object]]:
    """Return what comes of every task, in order."""
    pool = _Pool(ray or FakeRay(), lambda: FakeActor(work), workers, store)
    return [(task.name, made) for task, made in pool.each(unused, list(store.tasks()), lambda note: None)]


def test_large_tasks_go_first(store: Store) -> None:
    sizes = {row.name: row.parameters for row in store.rows()}
    assert [sizes[name] for name, _ in results(store, str.upper)] == sorted(sizes.values(), reverse=True)


def test_every_task_is_done_once_by_any_number_of_workers(store: Store) -> None:
    for workers in (1, 2, 5):
        assert sorted(results(store, str.upper, workers=workers)) == [(name, name.upper()) for name in TASKS]


def test_a_task_whose_worker_dies_is_done_by_another_one(store: Store) -> None:
    died, ray = list[str](), FakeRay()

    def work(name: str) -> str:
        if name == "poems" and not died:
            died.append(name)
            raise ray.exceptions.RayError
        return name.upper()

    assert sorted(results(store, work, ray)) == [(name, name.upper()) for name in TASKS]
    assert (died, len(ray.killed)) == (["poems"], 1)


def test_a_task_that_always_kills_its_worker_fails_and_the_others_are_done(store: Store) -> None:
    tried, ray = list[str](), FakeRay()

    def work(name: str) -> str:
        tried.append(name)
        if name == "poems":
            raise ray.exceptions.RayError
        return name.upper()

    found = dict(results(store, work, ray))
    failed = found.pop("poems")
    assert isinstance(failed, Failed)
    assert "its worker died" in failed.error.message
    assert tried.count("poems") == ATTEMPTS
    assert found == {name: name.upper() for name in TASKS if name != "poems"}


def test_an_error_on_a_worker_is_raised_here_as_it_was_there(store: Store) -> None:
    ray = FakeRay()

    def work(name: str) -> str:
        raise ray.exceptions.RayTaskError(LookupError(name))

    with pytest.raises(LookupError):
        results(store, work, ray)


@pytest.mark.parametrize("workers", ["0", "-1", "many", "http://host:1", ""])
def test_workers_that_mean_nothing_are_refused(fleet: Fleet, workers: str) -> None:
    with pytest.raises(InvalidWorkers, match="neither a number of workers nor an address"):
        fleet.encode(max_error=0.5, workers=workers)


def test_one_card_for_all_workers_is_refused(fleet: Fleet) -> None:
    with pytest.raises(InvalidWorkers, match="cuda:1"):
        fleet.encode(max_error=0.5, workers="2", device="cuda:1")


def test_without_ray_the_error_says_how_to_install_it(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(WorkersUnavailable, match="not installed") as caught:
        fleet.encode(max_error=0.5, workers="2")
    assert "pip install 'icm-lora[ray]'" in (caught.value.hint or "")
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.slow
def test_without_workers_ray_is_not_imported(fleet: Fleet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert len(fleet.encode(max_error=0.5).done) == len(TASKS)


@pytest.mark.parametrize(
    "address",
    [
        "postgresql://ann:secret@host/fleet",
        "postgresql://:secret@host/fleet",
        "postgresql://host/fleet?user=ann&password=secret",
        "postgresql://host/fleet?sslpassword=secret",
    ],
)
def test_a_password_is_sent_to_no_other_process(store: Store, address: str) -> None:
    context = Context(DatabaseUrl(address))
    with (
        pytest.raises(RegistryError, match="contains a password, which icm does not pass to other processes") as caught,
        worker_pool(context, store, device="cpu", workers="2"),
    ):
        pytest.fail("it started workers")
    with pytest.raises(RegistryError, match="contains a password, which icm does not pass to other processes"):
        pickle.dumps(context)
    assert "secret" not in f"{caught.value} {caught.value.hint}"
    assert "PGPASSWORD" in (caught.value.hint or "")


@pytest.mark.parametrize("address", ["postgresql://ann@host/fleet", "postgresql:///fleet?host=/run/a:b@c"])
def test_an_address_without_a_password_goes_to_workers_as_it_is(address: str) -> None:
    context = Context(DatabaseUrl(address))
    assert pickle.loads(pickle.dumps(context)) == context


def test_a_worker_that_does_not_reach_the_database_says_which_machine_it_is_on() -> None:
    pytest.importorskip("psycopg")
    worker = _Worker(Context(DatabaseUrl("postgresql://127.0.0.1:1/fleet")), "cpu", 1)
    with pytest.raises(
        StoreUnavailable, match=f"a worker on {socket.gethostname()}: postgresql://127.0.0.1:1/fleet"
    ) as caught:
        worker.run(None, (read_tasks, (), {}))  # type: ignore[arg-type]
    assert "in its own environment" in (caught.value.hint or "")


def read_tasks(models: ModelCache, tasks: Sequence[Task], on_progress: OnProgress) -> Iterator[tuple[Task, str]]:
    """Read tasks of the store."""
    yield from ((task, task.name) for task in models.store.tasks())
