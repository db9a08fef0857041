"""The tables are the same in SQLite and in PostgreSQL: columns, values, and what the schema forbids."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Connection, create_engine, insert, inspect, select
from sqlalchemy.exc import IntegrityError

from registry import schema as models
from registry.schema import Base
from registry.storage.row_writer import table_of
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
    with engine.connect() as opened, opened.begin():
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


def test_of_many_generators_one_is_current(connection: Connection) -> None:
    base, blob = add(connection, models.BaseModel, name="base"), add(connection, models.Blob, digest="cd" * 32, size=1)
    known = {"base_model_id": base, "blob_id": blob, "config": {}, "metrics": {}, "created_at": LATE}
    add(connection, models.Generator, version=1, is_current=False, **known)
    add(connection, models.Generator, version=2, is_current=False, **known)
    add(connection, models.Generator, version=3, is_current=True, **known)
    with pytest.raises(IntegrityError, match="one_current_generator"):
        add(connection, models.Generator, version=4, is_current=True, **known)
