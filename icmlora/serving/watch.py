"""Detect that tasks may have changed, without reading them and without holding a lock.

    a request ──▶ checked recently, or no answer ──▶ the previous stamp: known tasks are served
              └─▶ check in a separate thread     ──▶ a new stamp after a change

A stopped database does not answer at all, so requests never wait long for it.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING

from registry.errors import RegistryError, StoreUnavailable
from registry.files import identity

if TYPE_CHECKING:
    from icmlora.fleet.context import Context
    from registry.storage.database import Database

_COST = 50.0
"""An answer is valid for this multiple of its response time, so that checks take at most a fiftieth of the time."""
_MAX_PAUSE = 1.0  # maximum seconds that an answer is valid
_PATIENCE = 0.25  # seconds to wait for an answer
_SLOWEST = 3.0  # seconds without an answer after which the database counts as unavailable


def stamp_of(path: Path) -> Hashable:
    """Return a value that changes when a file is changed or replaced; None for a missing file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return *identity(found), found.st_ctime_ns


class StoreWatch:
    """Poll a store's database for its number of write transactions. Thread-safe.

    Args:
        context: The store.
        log: Logger for outages.
    """

    def __init__(self, context: Context, log: logging.Logger) -> None:
        self._context, self.place, self._log = context, str(context.address), log
        self._database: Database | None = None
        self._guard, self._answered = threading.Lock(), threading.Event()
        self._answered.set()
        self._asked, self._pause = float("-inf"), 0.0
        self._stamp: int | None = None
        self._outage: StoreUnavailable | None = None
        self._is_logged = False  # whether the outage was logged

    def stamp(self, *, at_once: bool = False) -> Hashable:
        """Return a value that changes with any task; `at_once` ignores a recent answer."""
        self._ask(at_once=at_once)
        return self._stamp

    def check(self) -> None:
        """Raise `StoreUnavailable` if the database is known to be unavailable: opening the store might take long."""
        self._ask()
        with self._guard:
            if not self._answered.is_set() and time.monotonic() - self._asked > _SLOWEST:
                self._record(StoreUnavailable(f"{self.place} does not respond", path=self.place))
            if self._outage is not None:
                raise StoreUnavailable(self._outage.message, path=self.place, hint=self._outage.hint)

    def _ask(self, *, at_once: bool = False) -> None:
        with self._guard:
            is_new = self._answered.is_set() and (at_once or time.monotonic() - self._asked >= self._pause)
            if is_new:
                self._asked = time.monotonic()
                self._answered.clear()
        if is_new:
            threading.Thread(target=self._look, daemon=True, name="icm-watch").start()
        if is_new or at_once:
            self._answered.wait(_PATIENCE)

    def _look(self) -> None:
        stamp, outage = self._stamp, self._outage
        for _ in range(2):  # retry once, because an idle connection may have been closed
            try:
                stamp, outage = self._changes(), None
                break
            except StoreUnavailable as error:
                outage = error
            except RegistryError:  # damaged or locked by another command: reported when the store is read
                outage = None
                break
            except Exception as error:  # otherwise polling would stop forever
                outage = StoreUnavailable(f"{self.place}: {type(error).__name__}", path=self.place)
        with self._guard:
            if outage is not None:
                self._record(outage)
            else:
                if self._is_logged:
                    self._log.info("icm: %s is available again", self.place)
                self._outage, self._is_logged = None, False
            self._stamp = stamp
            self._pause = min(_COST * (time.monotonic() - self._asked), _MAX_PAUSE)
            self._answered.set()

    def _changes(self) -> int:
        if self._database is None:
            from registry.storage.locks import Patience
            from registry.storage.open import open_parts

            context = self._context
            parts = open_parts(
                context.address,
                create=False,
                read_only=True,
                patience=Patience(0.0),
                command=context.command,
                blobs=None,
            )
            # Only the database is used, without a lock: it reconnects for each query, or keeps a connection.
            parts.lock.close()
            parts.database.close()
            self._database = parts.database
            weakref.finalize(self, self._database.close)
        return self._database.changes()

    def _record(self, outage: StoreUnavailable) -> None:
        """Record that the database is unavailable, and log it once."""
        self._outage = outage
        if not self._is_logged:
            self._is_logged = True
            self._log.warning("icm: %s; still serving tasks that were already read", outage.message)
