"""What every database of rows must do: promises one by one, and from several threads.

class TestMyDatabase(DatabasePromises):
    def new_database(self, same_as=None, *, read_only=False, patience=60.0) -> Database:    with empty tables
    def damage(self, database, statement) -> None:      changes rows behind the back of the database
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from registry.errors import DamagedRow, StoreLocked, StoreReadOnly
from registry.schema import BaseModel, Blob, Task
from registry.storage.database import Database

_NOW, _SECONDS = "2026-01-02T03:04:05Z", 1_767_323_045
_MANY = 2_500  # more than are fetched at a time
_THREADS, _ROUNDS = 6, 8


class DatabasePromises:
    """The promises of a database, as a class of tests for pytest."""

    def new_database(
        self, same_as: Database | None = None, *, read_only: bool = False, patience: float = 60.0
    ) -> Database:
        """Return a database with empty tables; or, given one, the same as another process has it open."""
        raise NotImplementedError

    def damage(self, database: Database, statement: str) -> None:
        """Change rows as a broken disk does: without what keeps their checks right."""
        raise NotImplementedError

    @pytest.fixture
    def database(self) -> Database:
        """An empty database."""
        return self.new_database()

    def _add(self, database: Database, name: str = "base") -> None:
        with database.write() as session:
            session.add(BaseModel(name=name))

    def _names(self, database: Database) -> list[str]:
        with database.read() as session:
            return list(session.scalars(select(BaseModel.name).order_by(BaseModel.name)))

    def _add_task(self, database: Database, name: str = "rust") -> None:
        with database.write() as session:
            base = BaseModel(name=f"base of {name}")
            session.add(Task(name=name, base_model=base, folder="", created_at=_NOW))

    def test_what_a_block_wrote_is_there_for_others(self, database: Database) -> None:
        self._add(database)
        assert self._names(self.new_database(database)) == ["base"]

    def test_a_block_that_fails_leaves_nothing(self, database: Database) -> None:
        def fail() -> None:
            with database.write() as session:
                session.add(BaseModel(name="base"))
                session.flush()
                raise LookupError

        with pytest.raises(LookupError):
            fail()
        assert self._names(database) == []

    def test_statements_without_objects_are_committed_and_checked_too(self, database: Database) -> None:
        with database.connection(write=True) as connection:
            connection.execute(insert(Blob).values(digest="ab" * 32, size=5))
        with database.connection(write=True) as connection:
            connection.execute(update(Blob).values(size=6))
        with database.read() as session:
            (blob,) = session.scalars(select(Blob))
            assert (blob.digest, blob.size) == ("ab" * 32, 6)
            assert blob.crc is not None

    def test_what_was_written_is_read_in_the_same_transaction(self, database: Database) -> None:
        with database.write() as session:
            session.execute(insert(Blob).values(digest="ab" * 32, size=5))
            (blob,) = session.scalars(select(Blob))
            blob.size = 6
            session.flush()
            session.expire_all()
            assert session.scalars(select(Blob)).one().size == 6

    def test_a_reader_sees_one_state_whatever_is_committed_meanwhile(self, database: Database) -> None:
        self._add(database, "first")
        with database.read() as session:
            count = select(func.count()).select_from(BaseModel)
            before = session.scalar(count)
            try:
                self._add(self.new_database(database, patience=0.2), "second")
            except StoreLocked:  # a database may hold up commits while somebody reads
                return
            assert session.scalar(count) == before
        assert self._names(database) == ["first", "second"]

    def test_columns_come_as_they_are_stored(self, database: Database) -> None:
        with database.connection(write=True) as connection:
            connection.execute(insert(Blob).values([{"digest": digit * 64, "size": ord(digit)} for digit in "abc"]))
        self._add_task(database)
        with database.columns() as columns:
            found = columns.execute("SELECT digest, size FROM blobs WHERE size > ? ORDER BY size", (ord("a"),))
            assert found.fetchone() == (b"\xbb" * 32, ord("b"))
            assert [(bytes(digest), size) for digest, size in found] == [(b"\xcc" * 32, ord("c"))]
            query = "SELECT name, created_at, pinned, note, name LIKE '%u%' FROM tasks"
            assert columns.execute(query).fetchall() == [("rust", _SECONDS, False, None, True)]

    def test_many_rows_are_streamed_while_others_are_read(self, database: Database) -> None:
        with database.connection(write=True) as connection:
            connection.execute(insert(Blob), [{"digest": f"{size:064x}", "size": size} for size in range(_MANY)])
        with database.columns() as columns:
            rows = columns.stream("SELECT id, size FROM blobs ORDER BY size")
            for size, (number, found) in zip(range(_MANY), rows, strict=False):
                assert found == size
                if size % 500 == 0:
                    query = "SELECT size FROM blobs WHERE id = ?"
                    assert columns.execute(query, (number,)).fetchall() == list(columns.stream(query, (number,)))
            next(columns.stream("SELECT id FROM blobs", first=True))  # and no more of them
        with database.columns() as columns:
            assert columns.execute("SELECT count(*) FROM blobs").fetchone() == (_MANY,)

    def test_columns_are_of_one_state(self, database: Database) -> None:
        self._add(database, "first")
        with database.columns() as columns:
            before = columns.execute("SELECT count(*) FROM base_models").fetchone()
            try:
                self._add(self.new_database(database, patience=0.2), "second")
            except StoreLocked:
                return
            assert columns.execute("SELECT count(*) FROM base_models").fetchone() == before

    def test_names_of_tasks_are_ordered_in_any_case(self, database: Database) -> None:
        for name in ("sql", "Rust", "bash"):
            self._add_task(database, name)
        with database.columns() as columns:
            query = f"SELECT name FROM tasks ORDER BY {columns.in_any_case('tasks.name')}"  # noqa: S608
            assert [name for (name,) in columns.stream(query)] == ["bash", "Rust", "sql"]

    def test_columns_are_checked_when_that_is_asked_for(self, database: Database) -> None:
        for name in ("rust", "sql"):
            self._add_task(database, name)
        with database.columns() as columns:
            assert columns.are_right()
            assert columns.first_wrong("tasks", "TRUE") is None
        self.damage(database, "UPDATE tasks SET pinned = NOT pinned WHERE name = 'sql'")
        with database.columns() as columns:
            assert not columns.are_right()
            assert columns.first_wrong("tasks", "name = 'rust'") is None
            assert "row 2 of tasks" in str(columns.first_wrong("tasks", "TRUE"))
            right = f"SELECT name FROM tasks WHERE {columns.right_rows('tasks')}"  # noqa: S608
            assert columns.execute(right).fetchall() == [("rust",)]
            right = f"SELECT name FROM base_models WHERE {columns.right_rows('base_models')}"  # noqa: S608
            assert len(columns.execute(right).fetchall()) == 2
        assert list(database.wrong_tasks().values()) == [{2}]

    def test_one_writes_at_a_time(self, database: Database) -> None:
        other = self.new_database(database, patience=0.2)
        with database.write() as session:
            session.add(BaseModel(name="first"))
            session.flush()
            with pytest.raises(StoreLocked):
                self._add(other, "second")
        self._add(other, "second")
        assert self._names(database) == ["first", "second"]

    def test_no_update_is_lost(self, database: Database) -> None:
        with database.write() as session:
            session.add(Blob(digest="ab" * 32, size=0))

        def count(who: int) -> None:
            own = self.new_database(database)
            for _ in range(_ROUNDS):
                with own.write() as session:
                    blob = session.scalars(select(Blob)).one()
                    blob.size += 1

        with ThreadPoolExecutor(_THREADS) as pool:
            for done in [pool.submit(count, who) for who in range(_THREADS)]:
                done.result()
        with database.read() as session:
            assert session.scalars(select(Blob)).one().size == _THREADS * _ROUNDS

    def test_a_database_that_is_only_to_be_read_is_not_written(self, database: Database) -> None:
        self._add(database)
        reader = self.new_database(database, read_only=True)
        assert self._names(reader) == ["base"]
        with pytest.raises(StoreReadOnly):
            self._add(reader, "another")
        with pytest.raises(StoreReadOnly):
            reader.must_write()

    def test_the_rules_of_the_schema_hold(self, database: Database) -> None:
        self._add(database)
        with pytest.raises(IntegrityError):
            self._add(database)
        dangling: dict[str, Any] = {"name": "rust", "base_model_id": 77, "folder": "", "created_at": _NOW}
        with pytest.raises(IntegrityError), database.connection(write=True) as connection:
            connection.execute(insert(Task).values(dangling))

    def test_a_sound_database_has_no_damage(self, database: Database) -> None:
        self._add_task(database)
        assert list(database.damage()) == []
        assert database.is_sound()
        database.must_be_sound()

    @pytest.mark.parametrize(
        "statement",
        [
            "UPDATE tasks SET folder = 'elsewhere'",
            "UPDATE tasks SET note = ''",
            "UPDATE tasks SET created_at = created_at + 1",
            "UPDATE tasks SET crc = crc + 1",
            "UPDATE tasks SET crc = NULL",
        ],
    )
    def test_a_row_that_has_changed_on_its_own_is_found_and_neither_read_nor_changed_nor_deleted(
        self, database: Database, statement: str
    ) -> None:
        self._add_task(database)
        self.damage(database, statement)
        database = self.new_database(database)
        (found,) = database.damage()
        assert (found.kind, found.task) == ("row", "rust")
        assert "row 1 of tasks" in found.fact
        assert not database.is_sound()
        with pytest.raises(DamagedRow, match="deletes nothing"):
            database.must_be_sound()
        with pytest.raises(DamagedRow, match="row 1 of tasks"), database.read() as session:
            session.scalars(select(Task)).all()
        if "NULL" not in statement:
            for change in (update(Task).values(folder="again"), delete(Task)):
                with pytest.raises(DamagedRow), database.write() as session:
                    session.execute(change)
        assert len(list(self.new_database(database).damage())) == 1
