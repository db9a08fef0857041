"""Every kind of locks keeps the promises of `registry.testing.locks`."""

from __future__ import annotations

import sys

import pytest

from registry.names import DatabaseUrl
from registry.storage.locks import Deadline, StoreLock
from registry.storage.locks.flocks import FolderLock
from registry.storage.paths import StorePaths
from registry.testing.locks import LockPromises


class TestFolder(LockPromises):
    """Flocks of files in a folder."""

    @pytest.fixture(autouse=True)
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        self.root = tmp_path_factory.mktemp("stores")

    def new_lock(self, store: str, deadline: Deadline, command: str = "icm") -> StoreLock:
        paths = StorePaths(self.root / store)
        paths.root.mkdir(exist_ok=True)
        return FolderLock(paths.lock, paths.job, deadline=deadline, command=command)


class TestFolderAsOnWindows(TestFolder):
    """Locks through portalocker, which Windows needs; here it uses the locks of this system."""

    @pytest.fixture(autouse=True)
    def without_fcntl(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("portalocker")
        monkeypatch.setitem(sys.modules, "fcntl", None)


class TestPostgres(LockPromises):
    """Advisory locks of a database."""

    @pytest.fixture(autouse=True)
    def server(self, postgres: str) -> None:
        self.url = DatabaseUrl(postgres)

    def new_lock(self, store: str, deadline: Deadline, command: str = "icm") -> StoreLock:
        from registry.storage.locks.advisory import AdvisoryLock
        from registry.storage.postgres import only_connection

        return AdvisoryLock(only_connection(self.url, command), store, url=self.url, deadline=deadline)
