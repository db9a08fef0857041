"""The store or bundle that is served. Changes are noticed without reading tasks and without holding a lock.

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
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from icmlora.fleet.bundles.bundles import Bundle
from icmlora.fleet.context import Context
from icmlora.fleet.resources.code_source import CodeSource, open_codes
from registry.errors import RegistryError, StoreUnavailable
from registry.files import identity
from registry.storage.locks import Deadline

if TYPE_CHECKING:
    from registry.storage.database import Database

_COST = 50.0
"""An answer is valid for this multiple of its response time, so that checks take at most a fiftieth of the time."""
_MAX_PAUSE = 1.0  # maximum seconds that an answer is valid
_PATIENCE = 0.25  # seconds to wait for an answer
_MAX_WAIT = 3.0  # seconds without an answer after which the database counts as unavailable

_log = logging.getLogger(__name__)


class ServingBundle:
    """A bundle file, which may be replaced at any time."""

    def __init__(self, path: Path) -> None:
        self.place, self._path = str(path), path
        self._opened = self.stamp(), Bundle(path)

    def stamp(self, *, at_once: bool = False) -> Hashable:
        """Return a value that changes when the file is changed or replaced."""
        try:
            found = self._path.stat()
        except OSError:
            return None
        return *identity(found), found.st_ctime_ns

    def check(self) -> None:
        """Do nothing: a file has no outages."""

    def open(self) -> AbstractContextManager[CodeSource]:
        """Open the current bundle file."""
        opened, bundle = self._opened
        if opened != (stamp := self.stamp()):
            bundle = Bundle(self._path)
            self._opened = stamp, bundle
        return open_codes(bundle.context)


class ServingStore:
    """A store that is opened for each lookup. In between, its number of write transactions is polled. Thread-safe.

    Args:
        context: The store.
        log: Logger for outages.
    """

    def __init__(self, context: Context, log: logging.Logger = _log) -> None:
        self._context, self.place, self._log = context, str(context.address), log
        self._database: Database | None = None
        self._guard, self._answered = threading.Lock(), threading.Event()
        self._answered.set()
        self._asked, self._pause = float("-inf"), 0.0
        self._stamp: int | None = None
        self._outage: StoreUnavailable | None = None
        self._is_logged = False  # whether the outage was logged

    def stamp(self, *, at_once: bool = False) -> Hashable:
        """Return a value that changes with any task; takes microseconds. `at_once` ignores a recent answer."""
        self._ask(at_once=at_once)
        return self._stamp

    def check(self) -> None:
        """Raise `StoreUnavailable` if the database is known to be unavailable: opening the store might take long."""
        self._ask()
        with self._guard:
            if not self._answered.is_set() and time.monotonic() - self._asked > _MAX_WAIT:
                self._record(StoreUnavailable(f"{self.place} does not respond", path=self.place))
            if self._outage is not None:
                raise StoreUnavailable(self._outage.message, path=self.place, hint=self._outage.hint)

    def open(self) -> AbstractContextManager[CodeSource]:
        """Open the store."""
        return open_codes(self._context)

    def _ask(self, *, at_once: bool = False) -> None:
        with self._guard:
            is_new = self._answered.is_set() and (at_once or time.monotonic() - self._asked >= self._pause)
            if is_new:
                self._asked = time.monotonic()
                self._answered.clear()
        if is_new:
            threading.Thread(target=self._poll, daemon=True, name="icm-watch").start()
        if is_new or at_once:
            self._answered.wait(_PATIENCE)

    def _poll(self) -> None:
        stamp, outage = self._stamp, self._outage
        for _ in range(2):  # retry once, because an idle connection may have been closed
            try:
                if self._database is None:
                    self._database = self._open_database()
                stamp, outage = self._database.changes(), None
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

    def _open_database(self) -> Database:
        from registry.storage.open import open_parts

        address, command = self._context.address, self._context.command
        parts = open_parts(address, create=False, read_only=True, deadline=Deadline(0.0), command=command, blobs=None)
        # Only the database is used, without a lock: it reconnects for each query, or keeps a connection.
        parts.lock.close()
        parts.database.close()
        weakref.finalize(self, parts.database.close)
        return parts.database

    def _record(self, outage: StoreUnavailable) -> None:
        self._outage = outage
        if not self._is_logged:
            self._is_logged = True
            self._log.warning("icm: %s; still serving tasks that were already read", outage.message)
