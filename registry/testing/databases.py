"""Promises of every database, one by one and from several threads.

class TestMyDatabase(DatabasePromises):
    def new_database(self, same_as=None, *, read_only=False, deadline=60.0) -> Database:    with empty tables
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import func, insert, select, update
from sqlalchemy.exc import IntegrityError

from registry.errors import StoreLocked, StoreReadOnly
from registry.storage.database import Database
from registry.tables import FORMAT, HISTORY, REFS

_THREADS, _ROUNDS = 6, 8


def ref(name: str, **values: Any) -> dict[str, Any]:
    """Return a row of `refs`."""
    return {"kind": "task", "key": name.lower(), "name": name, "manifest": "ab" * 32, "version": 1, **values}


class DatabasePromises:
    """The promises of a database, as a class of tests for pytest."""

    def new_database(
        self, same_as: Database | None = None, *, read_only: bool = False, deadline: float = 60.0
    ) -> Database:
        """Return a database with empty tables; or, given one, the same as another process has it open."""
        raise NotImplementedError

    @pytest.fixture
    def database(self) -> Iterator[Database]:
        """An empty database."""
        database = self.new_database()
        yield database
        database.close()

    def _add(self, database: Database, name: str, **values: Any) -> None:
        with database.write() as connection:
            connection.execute(insert(REFS), ref(name, **values))

    def _names(self, database: Database) -> list[str]:
        with database.read() as connection:
            return list(connection.scalars(select(REFS.c.name).order_by(REFS.c.key)))

    def test_a_block_is_committed_for_others(self, database: Database) -> None:
        self._add(database, "rust")
        assert self._names(self.new_database(database)) == ["rust"]

    def test_a_block_that_fails_leaves_nothing(self, database: Database) -> None:
        def fail() -> None:
            with database.write() as connection:
                connection.execute(insert(REFS), ref("rust"))
                raise LookupError

        with pytest.raises(LookupError):
            fail()
        assert self._names(database) == []

    def test_values_come_back_as_they_were_written(self, database: Database) -> None:
        values = {"manifest": "00ff" * 16, "original_bytes": 8 << 40, "squared_error": 5e-324, "gain": 0.1}
        values |= {"pinned": True, "does_nothing": False, "note": "Größe \\ ' \" 𝄞", "tags": "", "weights": None}
        self._add(database, "Größe", **values)
        with database.read() as connection:
            (row,) = connection.execute(select(REFS)).mappings()
        assert {name: row[name] for name in values} == values
        assert (row["name"], row["key"]) == ("Größe", "größe")

    def test_lower_knows_all_letters(self, database: Database) -> None:
        self._add(database, "GRÖSSE")
        with database.read() as connection:
            assert connection.scalar(select(func.lower(REFS.c.name))) == "grösse"

    def test_keys_are_ordered_by_code_points(self, database: Database) -> None:
        for name in ("b", "a_", "a-", "B2", "ä", "a"):
            self._add(database, name)
        assert self._names(database) == ["a", "a-", "a_", "b", "B2", "ä"]

    def test_a_key_is_unique(self, database: Database) -> None:
        self._add(database, "rust")
        with pytest.raises(IntegrityError):
            self._add(database, "Rust")
        assert self._names(database) == ["rust"]

    def test_a_reader_sees_one_state_whatever_is_committed_meanwhile(self, database: Database) -> None:
        self._add(database, "first")
        with database.read() as connection:
            count = select(func.count()).select_from(REFS)
            before = connection.scalar(count)
            try:
                self._add(self.new_database(database, deadline=0.2), "second")
            except StoreLocked:  # a database may hold up commits while somebody reads
                return
            assert connection.scalar(count) == before
        assert self._names(database) == ["first", "second"]

    def test_one_writes_at_a_time(self, database: Database) -> None:
        other = self.new_database(database, deadline=0.2)
        with database.write() as connection:
            connection.execute(insert(REFS), ref("first"))
            with pytest.raises(StoreLocked):
                self._add(other, "second")
        self._add(other, "second")
        assert self._names(database) == ["first", "second"]

    def test_no_update_is_lost(self, database: Database) -> None:
        self._add(database, "rust", vectors=0)

        def count(who: int) -> None:
            own = self.new_database(database)
            for _ in range(_ROUNDS):
                with own.write() as connection:
                    seen = connection.scalar(select(REFS.c.vectors)) or 0
                    connection.execute(update(REFS).values(vectors=seen + 1))

        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(count, range(_THREADS)))
        with database.read() as connection:
            assert connection.scalar(select(REFS.c.vectors)) == _THREADS * _ROUNDS

    def test_each_commit_is_counted(self, database: Database) -> None:
        before = database.changes()
        self._add(database, "rust")
        self._add(database, "html")
        assert self.new_database(database).changes() == before + 2

    def test_it_knows_its_store(self, database: Database) -> None:
        meta = database.meta()
        assert meta.format == FORMAT
        assert meta.store
        assert self.new_database(database).meta().store == meta.store

    def test_a_database_that_is_only_to_be_read_is_not_written(self, database: Database) -> None:
        self._add(database, "rust")
        reader = self.new_database(database, read_only=True)
        assert self._names(reader) == ["rust"]
        with pytest.raises(StoreReadOnly):
            self._add(reader, "another")
        with pytest.raises(StoreReadOnly):
            reader.must_write()

    def test_a_rebuild_replaces_all_rows_at_its_end(self, database: Database) -> None:
        self._add(database, "old")
        before = database.meta()
        with database.rebuild() as connection:
            connection.execute(insert(REFS), ref("new"))
            connection.execute(
                insert(HISTORY), {"kind": "task", "key": "new", "version": 1, "manifest": "cd" * 32, "files": b""}
            )
        assert self._names(self.new_database(database)) == ["new"]
        after = self.new_database(database).meta()
        assert after.store == before.store
        assert after.changes == before.changes + 1

    def test_a_rebuild_that_fails_changes_nothing(self, database: Database) -> None:
        self._add(database, "old")

        def fail() -> None:
            with database.rebuild() as connection:
                connection.execute(insert(REFS), ref("new"))
                raise LookupError

        with pytest.raises(LookupError):
            fail()
        assert self._names(database) == ["old"]

    def test_a_sound_database_has_no_damage(self, database: Database) -> None:
        self._add(database, "rust")
        assert list(database.damage()) == []
