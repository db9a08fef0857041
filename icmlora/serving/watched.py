"""Whether any task may have changed in a store whose rows are in a database: asked now and then, never waited for long.

a request ──▶ asked less than a second ago, or away ──▶ the stamp of then: what is known still serves
          `──▶ asked, over a connection that stays open
"""

from __future__ import annotations

import threading
import time

from icmlora.serving.tasks import Stamp
from registry.errors import RegistryError
from registry.names import DatabaseUrl
from registry.storage.locks import Patience
from registry.storage.postgres import PostgresDatabase

_PAUSE = 1.0
"""Seconds for which an answer counts."""


class WatchedDatabase:
    """Counts the changes of a store. It may be asked from several threads.

    Args:
        url: The address of the database.
    """

    def __init__(self, url: DatabaseUrl) -> None:
        self._database = PostgresDatabase(url.secret, command="icm watch", read_only=True, patience=Patience(0.0))
        self._lock, self._asked, self._stamp = threading.Lock(), -_PAUSE, Stamp(0, ())

    def stamp(self) -> Stamp:
        """Return what changes when any task may have changed."""
        if time.monotonic() - self._asked > _PAUSE and self._lock.acquire(blocking=False):
            try:
                self._look()
            finally:
                self._lock.release()
        return self._stamp

    def _look(self) -> None:
        try:
            changes = self._database.changes()
        except RegistryError:  # whoever needs the database hears of it
            return
        finally:
            self._asked = time.monotonic()
        if self._stamp.parts != (changes,):
            self._stamp = Stamp(time.time(), (changes,))
