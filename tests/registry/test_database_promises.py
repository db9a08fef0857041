"""Every database keeps the promises of `registry.testing.databases`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from registry.names import DatabaseUrl
from registry.storage.database import Database
from registry.storage.locks import Deadline
from registry.storage.sqlite import SqliteDatabase
from registry.testing.databases import DatabasePromises
from tests.pg_server import new_database

if TYPE_CHECKING:
    from registry.storage.postgres import PostgresDatabase


class TestSqlite(DatabasePromises):
    """Tables in a file."""

    @pytest.fixture(autouse=True)
    def factory(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        self.folders = tmp_path_factory

    def new_database(
        self, same_as: Database | None = None, *, read_only: bool = False, deadline: float = 60.0
    ) -> Database:
        path = same_as.path if isinstance(same_as, SqliteDatabase) else self.folders.mktemp("rows") / "registry.db"
        database = SqliteDatabase(path, read_only=read_only, deadline=Deadline(deadline))
        if same_as is None:
            (path.parent / "tmp").mkdir()
            database.create()
        return database


class TestPostgres(DatabasePromises):
    """Tables on a server."""

    @pytest.fixture(autouse=True)
    def server(self, postgres: str) -> Iterator[None]:
        self.postgres, self.url = postgres, ""
        self.opened: list[PostgresDatabase] = []
        yield
        for database in self.opened:
            database.close()

    def new_database(
        self, same_as: Database | None = None, *, read_only: bool = False, deadline: float = 60.0
    ) -> Database:
        from registry.storage.postgres import PostgresDatabase

        self.url = self.url if same_as is not None else new_database(self.postgres)
        database = PostgresDatabase(
            DatabaseUrl(self.url), command="icm", read_only=read_only, deadline=Deadline(deadline)
        )
        self.opened.append(database)
        if same_as is None:
            database.create("/nowhere")
        return database
