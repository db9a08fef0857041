"""Cache a team's store for a server, and poll the database for changes.

    a request ──▶ polled less than a second ago, or unavailable ──▶ the old stamp: cached tasks are served
              `──▶ polled on a separate thread, over a connection without locks ──▶ a new stamp after a change

    a task, found once ──▶ its manifest is cached ──▶ its adapter is written from the manifest and the blob cache

A stopped database does not respond at all, so requests never wait for it.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from icmlora.fleet.context import Context
from icmlora.fleet.resources.code_source import StoreCodes, open_store
from icmlora.fleet.write.materialize import Chosen, MadeFiles, choose
from icmlora.serving.stamp import Stamp
from icmlora.serving.tasks import find_chosen
from registry.errors import DamagedStore, RegistryError, StoreUnavailable
from registry.manifests import Task
from registry.names import DatabaseUrl
from registry.storage.locks import Patience
from registry.storage.postgres import PostgresDatabase

if TYPE_CHECKING:
    from icmlora.base_models.finding.tensors import BaseTensors
    from icmlora.fleet.resources.decoding import OriginalForm
    from registry.storage.blobs.content import Blobs

_PAUSE = 1.0
"""Seconds for which an answer counts."""
_PATIENCE = 0.25  # seconds that whoever asks waits for the answer
_SLOWEST = 3.0  # seconds without an answer after which the database counts as away
_KEPT = 10_000
"""Tasks whose manifests are kept."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Kept:
    chosen: Chosen
    key: str
    stamp: Stamp


class WatchedStore:
    """A store in a database. The methods may be called from several threads.

    Args:
        context: The store.
        key_of: Returns the key of what an adapter is made from.
        log: Logger for outages. Some engines show only messages below their own logger name.
    """

    def __init__(self, context: Context, key_of: Callable[[Chosen], str], log: logging.Logger = _log) -> None:
        assert isinstance(context.address, DatabaseUrl)
        self._context, self._key_of, self._log = context, key_of, log
        self._watch = _Watch(context.address, context.command, log)
        self.stamp, self.check = self._watch.stamp, self._watch.check
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._blobs: Blobs | None = None  # of the store, which need not be open to read them
        self._is_told = False  # that the place of the bytes is away
        self._guard = threading.Lock()

    @contextmanager
    def open(self) -> Iterator[StoreCodes]:
        """Open the store for one piece of work, unless it is known that it is away."""
        self.check()
        with open_store(self._context) as codes:
            yield codes

    def find(self, name: str) -> Chosen | None:
        """Return what the adapter of a task is made from, now; None if there is no such task."""
        stamp = self.stamp()
        with self.open() as codes:
            chosen = find_chosen(codes, name)
            if chosen is None:
                return None
            task = chosen.task
            version = None if chosen.generator is None else codes.version_of(chosen.generator, task.base_model)
        kept = replace(chosen, codes=_KeptCodes(codes, self._context, version))
        with self._guard:
            self._blobs = codes.store.blobs
            self._kept[name] = _Kept(kept, self._key_of(kept), stamp)
            self._kept.move_to_end(name)
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return kept

    def get(self, name: str) -> Chosen:
        """Return what the adapter of a task is made from; the same while the store is unchanged, or away.

        Raises:
            TaskNotFound: There is no such task.
        """
        known = self._kept.get(name)
        if known is not None and known.stamp == self.stamp():
            return known.chosen
        try:
            found = self.find(name)
        except StoreUnavailable:
            if known is None:
                raise
            return known.chosen
        if found is None:
            with self.open() as codes:  # raises, with names that are like it
                found = choose(codes, codes.get(name))
        return found

    def files(self, name: str, key: str) -> MadeFiles | None:
        """Make the files of a task as it is kept, None if it is not, or not under this key; the database is not read.

        Raises:
            StoreUnavailable: Some of its bytes are not in the cache, and the place of the bytes is away.
        """
        known = self._kept.get(name)
        if known is None or known.key != key:
            return None
        try:
            return known.chosen.files()
        except DamagedStore:  # bytes may be gone that nothing refers to any more
            return None

    def missing(self, name: str, key: str) -> list[str]:
        """Return the digests of what the files of a task are made from and that is not in the cache."""
        known, blobs = self._kept.get(name), self._blobs
        if known is None or known.key != key or blobs is None:
            return []
        return [digest for digest in _digests(known.chosen) if not blobs.is_at_hand(digest)]

    def fetch(self, digests: Sequence[str]) -> None:
        """Download blobs into the cache.

        Raises:
            StoreUnavailable: The object store is unavailable.
        """
        if not digests:
            return
        assert self._blobs is not None  # `missing` has named them
        try:
            self._blobs.fetch(digests)
            for digest in digests:  # says what is wrong with it
                self._blobs.read(digest)
        except StoreUnavailable as error:
            if not self._is_told:
                self._is_told = True
                self._log.warning("icm: %s; still serving tasks whose files are cached here", error.message)
            raise
        if self._is_told:
            self._is_told = False
            self._log.info("icm: the object store is available again")


class _KeptCodes(StoreCodes):
    """A task as it was, and bytes, from the cache or from their place; the store itself need not be open."""

    def __init__(self, codes: StoreCodes, context: Context, version: int | None) -> None:
        super().__init__(codes.store, context)
        self._version = version

    def version_of(self, generator: str, base_model: str) -> int | None:
        return self._version

    def form(self, task: Task) -> OriginalForm:
        from icmlora.fleet.resources.decoding import base_tensors, form_of

        def of_base() -> BaseTensors:
            with self._context.open(read_only=True) as store:
                return base_tensors(store, task)

        return form_of(task.final, self.read, of_base)


class _Watch:
    """Asks a database how many changes there were, at most once a second."""

    def __init__(self, url: DatabaseUrl, command: str, log: logging.Logger) -> None:
        self._url, self._log = url, log
        self._database = PostgresDatabase(url, command=command, read_only=True, patience=Patience(0.0))
        weakref.finalize(self, self._database.close)
        self._guard, self._answered = threading.Lock(), threading.Event()
        self._answered.set()
        self._asked, self._stamp = float("-inf"), Stamp(0, ())
        self._away: RegistryError | None = None
        self._is_told = False  # that it is away

    def stamp(self) -> Stamp:
        """Return what changes when any task may have changed."""
        self._ask()
        return self._stamp

    def check(self) -> None:
        """Raise `StoreUnavailable` if the database is away as far as is known: opening the store may take long then."""
        self._ask()
        with self._guard:
            if not self._answered.is_set() and time.monotonic() - self._asked > _SLOWEST:
                self._tell(StoreUnavailable(f"{self._url} does not respond", path=str(self._url)))
            if self._away is not None:
                raise StoreUnavailable(self._away.message, path=str(self._url), hint=self._away.hint)

    def _ask(self) -> None:
        with self._guard:
            if not self._answered.is_set() or time.monotonic() - self._asked < _PAUSE:
                return
            self._asked = time.monotonic()
            self._answered.clear()
        threading.Thread(target=self._look, daemon=True, name="icm-watch").start()
        self._answered.wait(_PATIENCE)

    def _look(self) -> None:
        changes = 0
        away: RegistryError | None = None
        for _ in range(2):  # a connection that nobody used for long may be closed by now
            try:
                changes, away = self._database.changes(), None
                break
            except Exception as error:  # else nobody would ever ask again
                fact = f"{self._url}: {type(error).__name__}"
                away = error if isinstance(error, RegistryError) else StoreUnavailable(fact, path=str(self._url))
        with self._guard:
            if away is not None:
                self._tell(away)
            else:
                if self._is_told:
                    self._log.info("icm: %s is available again", self._url)
                self._away, self._is_told = None, False
                self._stamp = Stamp(0, (changes,))  # a count has no steps, as a clock has
            self._answered.set()

    def _tell(self, away: RegistryError) -> None:
        """Take note that the database is away, and say so once."""
        self._away = away
        if not self._is_told:
            self._is_told = True
            self._log.warning("icm: %s; still serving tasks that were already read", away.message)


def _digests(chosen: Chosen) -> list[str]:
    """Return what blobs the files of an adapter are made from."""
    final, code = chosen.task.final, chosen.code
    found = [final.config, *(extra.blob for extra in final.extras)]
    if chosen.generator is None:
        return [*found, final.weights, *(blob for blob in (final.initial, final.card) if blob is not None)]
    return [*found, chosen.generator, *([] if code is None else [code.blob])]
