"""Locks of a store in PostgreSQL: advisory locks of a session, held by the connection that also writes.

The server drops them when the connection ends for any reason; then nothing that they protected can be committed.
A session may hold a lock both shared and exclusive, so to turn one into the other needs no gate, as flocks do. The
server lets those that ask later wait behind one that waits to be alone. That one leaves the queue now and then, so that
others get in while a process holds the lock for hours, and comes back for twice as long, so that it has its turn among
many who hold it for seconds.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain, repeat

from sqlalchemy import Engine, text
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from registry.errors import RegistryError
from registry.names import DatabaseUrl
from registry.storage.locks import HEAD_START, Deadline, in_use
from registry.storage.postgres import connection_errors

_TURN = 0.5  # seconds that a session waits in the queue of a lock at a time
_MAX_TURN = 16.0  # seconds for which those that come later may have to wait behind one that waits to be alone
_TIMED_OUT = "55P03"
_NAMED = 3  # holders that a message names
_HOLDERS = text("""
SELECT coalesce(nullif(application_name, ''), 'another program') FROM pg_locks JOIN pg_stat_activity USING (pid)
WHERE locktype = 'advisory' AND granted AND objsubid = 1 AND classid::bigint = :high AND objid::bigint = :low
AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) AND pid != pg_backend_pid()
ORDER BY pid""")


class AdvisoryLock:
    """The locks of a store in a database: see `registry.storage.locks.StoreLock`.

    Args:
        engine: Owner of the one connection that writes; see `registry.storage.postgres.only_connection`.
        store: The number of the store, which others in this database do not have.
        url: The address of the database, for messages.
        deadline: How long a command waits in all.
    """

    def __init__(self, engine: Engine, store: str, *, url: DatabaseUrl, deadline: Deadline) -> None:
        self._engine, self._url, self._patience = engine, url, deadline
        self._store, self._subject = store, f"the store {url}"
        self._key = _key_of(store, "store")
        self._has_asked = False

    def enter(self) -> None:
        """Acquire the shared lock for the first time."""
        self._wait(self._key, self._subject, shared=True)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Wait for the exclusive lock, hold it for a block, then go back to the shared one."""
        with self._given_up():  # two that wait for each other's shared lock would wait for ever
            self._wait(self._key, self._subject, shared=False)
        try:
            yield
        finally:
            self._release(self._key, shared=False)

    @contextmanager
    def job(self, base_model: str, *, shared: bool = False) -> Iterator[None]:
        """Hold the job lock of a base model for a block."""
        key = _key_of(self._store, f"job {base_model}")
        with ExitStack() as held:
            if self._take(key, shared=shared):
                held.callback(self._release, key, shared=shared)
            else:
                with self._given_up():
                    self._wait(key, f"base model {base_model!r}", shared=shared)
                    held.callback(self._release, key, shared=shared)
            yield

    def close(self) -> None:
        """Release all locks, then the connection: a server takes a moment to notice that one is gone."""
        if self._has_asked:
            with suppress(RegistryError, SQLAlchemyError), self._engine.begin() as connection:
                connection.execute(text("SELECT pg_advisory_unlock_all()"))
        self._engine.dispose()

    @contextmanager
    def _given_up(self) -> Iterator[None]:
        """Release the shared lock for a block, then acquire it again."""
        self._release(self._key, shared=True)
        try:
            yield
        except BaseException:
            self._take(self._key, shared=True, seconds=_TURN)  # report the first error, without a second wait
            raise
        self._wait(self._key, self._subject, shared=True)

    def _wait(self, key: int, subject: str, *, shared: bool) -> None:
        in_queue = chain([0.0], repeat(_TURN) if shared else _turns())
        until = time.monotonic() + self._patience.left

        def attempt() -> bool:
            return self._take(key, shared=shared, seconds=max(0.0, min(next(in_queue), until - time.monotonic())))

        if not self._patience.wait(attempt, lambda: f"{subject}{self._held(key, ', held by ')}"):
            raise in_use(f"{subject} is in use{self._held(key, ' by ')}", self._patience, str(self._url))

    def _take(self, key: int, *, shared: bool, seconds: float = 0.0) -> bool:
        """Acquire a lock; return False if that needs a longer wait."""
        kind, self._has_asked = "_shared" if shared else "", True
        with connection_errors(self._url):
            try:
                with self._engine.begin() as connection:
                    if not seconds:
                        return bool(connection.scalar(text(f"SELECT pg_try_advisory_lock{kind}(:key)"), {"key": key}))
                    limit = {"limit": f"{math.ceil(1000 * seconds)}ms"}
                    connection.execute(text("SELECT set_config('lock_timeout', :limit, true)"), limit)
                    connection.execute(text(f"SELECT pg_advisory_lock{kind}(:key)"), {"key": key})
            except OperationalError as error:
                if getattr(error.orig, "sqlstate", None) != _TIMED_OUT:
                    raise
                return False
            return True

    def _release(self, key: int, *, shared: bool) -> None:
        kind = "_shared" if shared else ""
        with connection_errors(self._url), self._engine.begin() as connection:
            connection.execute(text(f"SELECT pg_advisory_unlock{kind}(:key)"), {"key": key})

    def _held(self, key: int, before: str) -> str:
        """Return a phrase that names the holders of a lock; empty if unknown."""
        number = key % (1 << 64)
        with connection_errors(self._url), self._engine.begin() as connection:
            names = connection.scalars(_HOLDERS, {"high": number >> 32, "low": number % (1 << 32)}).all()
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        return before + "; ".join(names[:_NAMED]) + more if names else ""


def _turns() -> Iterator[float]:
    """Yield how many seconds one that waits to be alone is in the queue, again and again; 0 while others get in."""
    turn = HEAD_START
    while True:
        yield turn
        until = time.monotonic() + turn
        while time.monotonic() < until:
            yield 0.0
        turn = min(2 * turn, _MAX_TURN)


def _key_of(store: str, what: str) -> int:
    """Return the number of a lock: 64 bits, with a sign."""
    return int.from_bytes(hashlib.sha256(f"icm {store} {what}".encode()).digest()[:8], signed=True)
