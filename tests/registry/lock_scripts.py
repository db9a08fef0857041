"""The lock operations of each command, in order, and a recorder of the real ones.

`tests/cli/test_lock_scripts.py` shows that the commands do nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from registry.storage.locks import Deadline
from registry.storage.locks.flocks import FileLock

Call = tuple[str, str]
"""The kind of lock, "store" or "job", and the operation."""


class Holder:
    """The locks of one process, acquired as in `registry.store.Store`."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._patience, self._name = folder, Deadline(1e9), name
        self.store = self._lock("lock")

    def _lock(self, name: str) -> FileLock:
        return FileLock(self._folder / name, deadline=self._patience, command=self._name)

    @contextmanager
    def job(self, name: str = "job", *, shared: bool = False) -> Iterator[None]:
        lock = self._lock(name)
        try:
            lock.hold(shared=shared, without=self.store)
            yield
        finally:
            lock.close()

    def alone(self) -> None:
        """Delete something."""
        with self.store.exclusive():
            pass


def read(holder: Holder) -> None:
    """`icm ls`, `materialize`, `ingest` ..."""
    holder.store.enter()


def delete(holder: Holder) -> None:
    """`icm rm`, `icm prune`, `icm verify --repair`."""
    holder.store.enter()
    holder.alone()


def evict(holder: Holder) -> None:
    holder.store.enter()
    with holder.job():
        pass
    holder.alone()


def train(holder: Holder) -> None:
    """`icm train` of any kind, `icm generators rollback`."""
    holder.store.enter()
    with holder.job():
        pass


def encode(holder: Holder) -> None:
    holder.store.enter()
    with holder.job(shared=True):
        pass


def join(holder: Holder) -> None:
    """`icm base alias`."""
    holder.store.enter()
    with holder.job("another job"), holder.job():
        pass


SCRIPTS: tuple[Callable[[Holder], None], ...] = (read, delete, evict, train, encode, join)


@contextmanager
def recording(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Call]]:
    """Record the lock operations in a block; a repeated operation is recorded once."""
    calls: list[Call] = []

    def note(lock: FileLock, what: str) -> None:
        call = ("store" if lock._path.name == "lock" else "job", what)
        if call == ("store", "hold"):  # a part of `exclusive`
            return
        if calls[-1:] != [call]:
            calls.append(call)

    def recorded(name: str) -> Callable[..., object]:
        real = getattr(FileLock, name)

        def method(self: FileLock, **options: object) -> object:
            shared = ", shared" if options.get("shared") else ""
            note(self, f"{name}{shared}{', without the store' if options.get('without') else ''}")
            return real(self, **options)

        return method

    with monkeypatch.context() as patch:
        for name in ("enter", "hold", "exclusive", "close"):
            patch.setattr(FileLock, name, recorded(name))
        yield calls
