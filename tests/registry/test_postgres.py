"""Connections to PostgreSQL: one that is lost takes its locks and its transaction with it, and no password is shown."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.exc import TimeoutError

from registry.errors import StoreLocked, StoreUnavailable
from registry.names import DatabaseUrl
from registry.storage.locks import Deadline
from tests.pg_server import new_database

if TYPE_CHECKING:
    from registry.storage.locks.advisory import AdvisoryLock


@pytest.fixture
def url(postgres: str) -> str:
    return new_database(postgres)


def opened(url: str, store: str, command: str = "icm", deadline: float = 0.0) -> AdvisoryLock:
    from registry.storage.locks.advisory import AdvisoryLock
    from registry.storage.postgres import only_connection

    return AdvisoryLock(
        only_connection(DatabaseUrl(url), command), store, url=DatabaseUrl(url), deadline=Deadline(deadline)
    )


def cut_all(url: str) -> None:
    """Make the server end all other connections to a database, as in a restart."""
    import psycopg

    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid != pg_backend_pid()"
        )


def is_alone(lock: AdvisoryLock) -> bool:
    with suppress(StoreLocked), lock.exclusive():
        return True
    return False


def test_a_connection_that_is_lost_gives_its_locks_to_others_and_is_never_opened_again(url: str) -> None:
    with closing(opened(url, "store")) as first:
        first.enter()
        cut_all(url)
        with closing(opened(url, "store")) as second:
            second.enter()
            assert is_alone(second)
        for _ in range(2):
            with pytest.raises(StoreUnavailable):
                is_alone(first)
        with pytest.raises(StoreUnavailable, match="lost the connection to "), first.job("base"):
            pytest.fail("it has no store lock any more")


def test_a_lock_that_is_lost_inside_of_a_block_ends_it_with_an_error(url: str) -> None:
    with closing(opened(url, "store")) as lock:
        lock.enter()
        with pytest.raises(StoreUnavailable), lock.exclusive():
            cut_all(url)


def test_what_is_written_without_the_lock_is_not_committed(url: str) -> None:
    from registry.storage.postgres import connection_errors, only_connection

    def insert() -> None:
        with connection_errors(url), engine.begin() as connection:
            connection.execute(text("INSERT INTO kept VALUES (1)"))
            cut_all(url)

    engine, other = only_connection(DatabaseUrl(url), "icm ingest"), only_connection(DatabaseUrl(url), "icm ls")
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE kept (number int)"))
    with pytest.raises(StoreUnavailable):
        insert()
    with other.begin() as connection:
        assert connection.scalar(text("SELECT count(*) FROM kept")) == 0
    other.dispose()


def test_two_transactions_at_a_time_are_refused(url: str) -> None:
    from registry.storage.postgres import only_connection

    engine = only_connection(DatabaseUrl(url), "icm")
    with engine.begin(), pytest.raises(TimeoutError), engine.begin():
        pytest.fail("a lock and a row share a transaction")
    engine.dispose()


def test_the_message_names_the_command_and_the_machine(url: str) -> None:
    store = uuid4().hex
    with closing(opened(url, store, "icm train\n" + "x" * 200)) as one, closing(opened(url, store)) as two:
        one.enter()
        two.enter()
        with pytest.raises(StoreLocked, match=r"in use by icm train x+ on \S"), two.exclusive():
            pytest.fail("it was not alone")
        with one.job("base"), pytest.raises(StoreLocked, match="'base' is in use by icm train"), two.job("base"):
            pytest.fail("two jobs")


@pytest.mark.parametrize(
    "address",
    [
        "postgresql://user:secret@127.0.0.1:1/fleet",
        "postgresql://127.0.0.1:1/fleet?password=secret&connect_timeout=1",
        "postgresql://user:secret@/fleet?host=/no/such/folder",
    ],
)
def test_a_database_that_cannot_be_reached_is_told_without_its_password(postgres: str, address: str) -> None:
    with closing(opened(address, "store")) as lock, pytest.raises(StoreUnavailable) as caught:
        lock.enter()
    told = f"{caught.value} {caught.value.path} {caught.value.hint}"
    assert "secret" not in told
    assert "fleet" in told


def test_what_the_drivers_log_of_a_lost_connection_is_not_written_to_the_terminal() -> None:
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install 'icm-lora[team]'")
    script = """
import logging, registry.storage.postgres
logging.getLogger("psycopg").warning("error ignored terminating a pipeline")
logging.getLogger("sqlalchemy.pool.impl.QueuePool").error("Exception during reset or similar")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_one_that_waits_to_be_alone_has_its_turn_among_many_who_hold_a_lock_for_longer_than_it_queues_at_first(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from registry.storage.locks import advisory

    monkeypatch.setattr(advisory, "HEAD_START", 0.1)
    done = threading.Event()

    def use(delay: float) -> None:
        time.sleep(delay)
        while not done.is_set():
            with closing(opened(url, "store", deadline=60.0)) as lock:
                lock.enter()
                time.sleep(0.4)

    with ThreadPoolExecutor(3) as pool:
        for number in range(3):
            pool.submit(use, 0.15 * number)
        try:
            with closing(opened(url, "store", deadline=60.0)) as lock:
                lock.enter()
                time.sleep(1)
                with lock.exclusive():
                    done.set()
        finally:
            done.set()
