"""The tables are the same in SQLite and in PostgreSQL: columns, values, and what the schema forbids."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import ColumnElement, Connection, create_engine, delete, insert, inspect, select
from sqlalchemy.exc import IntegrityError, ProgrammingError

from registry import row_checks
from registry import schema as models
from registry.names import LOAD_IN
from registry.row_checks import REFUSED, WrongRow, add_functions
from registry.schema import Base, in_any_case
from registry.storage.postgres_checks import guard, install, seal
from registry.storage.row_writer import insert_into, table_of
from registry.storage.sqlite import sqlite_of
from tests.pg_server import new_database

LATE = "2106-02-07T06:28:17Z"  # more seconds than 32 bits count
LARGE = 8 << 30


@pytest.fixture
def connection(postgres: str) -> Iterator[Connection]:
    """A transaction in a PostgreSQL with the tables."""
    url = new_database(postgres)
    engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.begin() as opened:
        Base.metadata.create_all(opened)
        install(opened)
    with engine.connect() as opened:
        guard(opened)
        opened.commit()
        yield opened
    engine.dispose()


def add(connection: Connection, model: type[Base], **values: Any) -> int:
    table = table_of(model)
    return connection.scalars(insert(table).values(values).returning(table.c.id)).one()


def add_task(connection: Connection, name: str) -> int:
    base = add(connection, models.BaseModel, name=f"base of {name}")
    return add(connection, models.Task, name=name, base_model_id=base, folder="", created_at=LATE)


def test_both_have_the_same_columns(connection: Connection) -> None:
    inspector, sqlite = inspect(connection), create_engine("sqlite://")
    Base.metadata.create_all(sqlite)
    other = inspect(sqlite)
    assert set(inspector.get_table_names()) == set(other.get_table_names())
    for table in inspector.get_table_names():
        columns = [
            [(column["name"], column["nullable"]) for column in of.get_columns(table)] for of in (inspector, other)
        ]
        assert columns[0] == columns[1]
    sqlite.dispose()


def test_values_come_back_as_they_were_written(connection: Connection) -> None:
    digest = "ab" * 32
    blob = add(connection, models.Blob, digest=digest, size=LARGE)
    task = add_task(connection, "Größe")
    found = connection.execute(select(table_of(models.Blob).c.digest, table_of(models.Blob).c.size)).one()
    assert (blob, *found) == (1, digest, LARGE)
    table = table_of(models.Task)
    row = connection.execute(select(table.c.name, table.c.created_at, table.c.pinned).where(table.c.id == task)).one()
    assert tuple(row) == ("Größe", LATE, False)


def test_names_of_tasks_that_differ_in_case_are_one_name(connection: Connection) -> None:
    add_task(connection, "rust")
    with pytest.raises(IntegrityError, match="one_task_per_name"):
        add_task(connection, "Rust")


def test_names_of_tasks_are_found_and_ordered_in_any_case(connection: Connection) -> None:
    for name in ("sql", "Rust", "bash", "GRÖSSE"):
        add_task(connection, name)
    column = table_of(models.Task).c.name

    def found(*conditions: ColumnElement[bool]) -> list[str]:
        return list(connection.scalars(select(column).where(*conditions).order_by(in_any_case(column))))

    assert found() == ["bash", "GRÖSSE", "Rust", "sql"]
    assert found(column == "RUST") == ["Rust"]
    assert found(column.in_(["SQL", "Bash", "none"])) == ["bash", "sql"]
    assert found(column == "größe") == []  # letters of ASCII only, as in SQLite
    assert found(column == "grÖsse") == ["GRÖSSE"]
    assert found(column != "SQL", column > "BASH") == ["GRÖSSE", "Rust"]


def test_rows_that_are_there_are_left_or_corrected(connection: Connection) -> None:
    table = table_of(models.Blob)
    known = {"digest": "ab" * 32, "size": 1}
    for size in (1, 2):
        connection.execute(insert_into(connection, table).values({**known, "size": size}).on_conflict_do_nothing())
    assert connection.scalars(select(table.c.size)).all() == [1]
    new = insert_into(connection, table)
    statement = new.on_conflict_do_update(index_elements=["digest"], set_={"size": new.excluded["size"]})
    connection.execute(statement, [{**known, "size": 3}, {"digest": "cd" * 32, "size": 4}])
    assert connection.scalars(select(table.c.size).order_by(table.c.id)).all() == [3, 4]


def test_of_many_generators_one_is_current(connection: Connection) -> None:
    base, blob = add(connection, models.BaseModel, name="base"), add(connection, models.Blob, digest="cd" * 32, size=1)
    known = {"base_model_id": base, "blob_id": blob, "config": {}, "metrics": {}, "created_at": LATE}
    add(connection, models.Generator, version=1, is_current=False, **known)
    add(connection, models.Generator, version=2, is_current=False, **known)
    add(connection, models.Generator, version=3, is_current=True, **known)
    with pytest.raises(IntegrityError, match="one_current_generator"):
        add(connection, models.Generator, version=4, is_current=True, **known)


def commit(connection: Connection) -> None:
    seal(connection)
    connection.commit()


def test_a_row_has_the_same_check_in_both(connection: Connection) -> None:
    sqlite = create_engine("sqlite://")
    with sqlite.begin() as other:
        add_functions(sqlite_of(other))
        Base.metadata.create_all(other)
        row_checks.guard(sqlite_of(other), Base.metadata)
        for where in (connection, other):
            add_task(where, "Größe \\ ' \" \x7f 𝄞")
            blob = add(where, models.Blob, digest="00ff" * 16, size=LARGE)
            document = add(where, models.Document, digest="ab" * 32, body={"layout": [1.5, "é"]})
            base = add(where, models.BaseModel, name="x", shape=[1, 2], load_in=LOAD_IN[0])
            known = {"created_at": LATE, "config": {}, "metrics": {"a": 1e-300}, "blob_id": blob}
            adapter = add(
                where, models.Adapter, task_id=1, is_final=True, weights_id=blob, config_id=blob,
                description_id=document, created_at=LATE, tensors_key="cd" * 32,
            )  # fmt: skip
            for version, figure in enumerate((0.1, 1e-17, 1e22, 123456789.123456789, 5e-324, 8.0)):
                made = {"base_model_id": base, "version": version, "is_current": not version, **known}
                generator = add(where, models.Generator, **made)
                code = {"task_id": 1, "generator_id": generator, "adapter_id": adapter, "blob_id": blob}
                add(where, models.Code, bits=figure, dw_error=figure, **code)
        seal(connection)
        for table in Base.metadata.sorted_tables:
            assert list(connection.execute(select(table))) == list(other.execute(select(table))), table.name
            checks = [row[-1] for row in connection.execute(select(table))]
            assert all(isinstance(check, int) for check in checks)
    sqlite.dispose()


@contextmanager
def without_triggers(connection: Connection) -> Iterator[None]:
    """Change rows as a broken disk does."""
    connection.exec_driver_sql("SET session_replication_role = replica")
    yield
    connection.exec_driver_sql("SET session_replication_role = origin")


def read(connection: Connection, model: type[Base]) -> list[Any]:
    return list(connection.execute(select(table_of(model))))


def test_a_row_is_read_in_its_own_transaction_before_it_has_a_check(connection: Connection) -> None:
    add_task(connection, "rust")
    assert read(connection, models.Task)[0].crc is None
    seal(connection)
    assert read(connection, models.Task)[0].crc is not None


def test_a_committed_row_without_a_check_is_wrong(connection: Connection) -> None:
    add_task(connection, "rust")
    connection.commit()
    with pytest.raises(WrongRow, match="row 1 of tasks"):
        read(connection, models.Task)


@pytest.mark.parametrize(
    ("column", "value"),
    [("name", "'rusu'"), ("created_at", "created_at + 1"), ("pinned", "true"), ("base_model_id", "2"), ("note", "''")],
)
def test_a_row_that_has_changed_on_its_own_is_neither_read_nor_changed_nor_deleted(
    connection: Connection, column: str, value: str
) -> None:
    add_task(connection, "rust")
    add(connection, models.BaseModel, name="another")
    commit(connection)
    with without_triggers(connection):
        connection.exec_driver_sql(f"UPDATE tasks SET {column} = {value}")
    connection.commit()
    with pytest.raises(WrongRow, match="row 1 of tasks"):
        read(connection, models.Task)
    for statement in ("UPDATE tasks SET folder = 'x'", "DELETE FROM tasks"):
        connection.exec_driver_sql(statement)
        with pytest.raises(WrongRow, match=f"row 1 of tasks {REFUSED}"):
            seal(connection)
        connection.rollback()


def test_changes_that_the_database_makes_by_itself_are_checked_too(connection: Connection) -> None:
    base, blob = add(connection, models.BaseModel, name="base"), add(connection, models.Blob, digest="cd" * 32, size=1)
    known = {"base_model_id": base, "blob_id": blob, "config": {}, "metrics": {}, "created_at": LATE}
    first = add(connection, models.Generator, version=1, is_current=False, **known)
    add(connection, models.Generator, version=2, is_current=True, parent_id=first, **known)
    commit(connection)
    connection.execute(delete(table_of(models.Generator)).where(table_of(models.Generator).c.id == first))
    commit(connection)
    (left,) = read(connection, models.Generator)
    assert (left.parent_id, left.version) == (None, 2)


def test_an_adapter_knows_how_many_extras_it_has(connection: Connection) -> None:
    task, blob = add_task(connection, "rust"), add(connection, models.Blob, digest="cd" * 32, size=1)
    document = add(connection, models.Document, digest="ab" * 32, body=[])
    known = {"task_id": task, "weights_id": blob, "config_id": blob, "description_id": document, "created_at": LATE}
    adapter = add(connection, models.Adapter, is_final=True, **known)
    for file in ("a", "b"):
        extra = {"adapter_id": adapter, "file": file, "blob_id": blob, "size": 1}
        connection.execute(insert(table_of(models.Extra)).values(extra))
    commit(connection)
    assert read(connection, models.Adapter)[0].extra_count == 2
    connection.execute(delete(table_of(models.Extra)).where(table_of(models.Extra).c.file == "a"))
    commit(connection)
    assert read(connection, models.Adapter)[0].extra_count == 1
    connection.execute(delete(table_of(models.Task)))
    commit(connection)
    assert read(connection, models.Extra) == []


def test_other_programs_do_not_write(connection: Connection) -> None:
    add_task(connection, "rust")
    commit(connection)
    with connection.engine.connect() as other, pytest.raises(ProgrammingError, match="icm_rows_before"):
        other.exec_driver_sql("DELETE FROM tasks")
