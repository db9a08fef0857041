"""Flip single bits of the values of every column, behind the back of the database, and see who notices.

A hundred rows in each table; one bit of one column in each of them at a time, without the triggers that keep checks
right, as a broken disk does it. What the database itself refuses to store, such as text that is none, is left out.
"""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from sqlalchemy import Column, Connection, Engine, Table, create_engine, event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from registry.names import DatabaseUrl
from registry.row_checks import COLUMN, add_functions, find_wrong_rows, is_known_by_a_number
from registry.schema import Base, stored_as
from registry.storage.database import Database
from registry.storage.locks import Patience
from registry.storage.sqlite import SqliteDatabase, migrate
from tests.faults.flips import Tally

ROWS = 110
_INTEGER = 31  # bits that both databases store
_NOTHING: dict[type, Any] = {int: 0, bool: False, float: 0.0, str: "", bytes: b""}


class ValueFlips:
    """A database whose tables are full, and changes of it.

    Args:
        database: With empty tables.
        engine: Another way to it, without what keeps checks right.
    """

    def __init__(self, database: Database, engine: Engine, draw: random.Random) -> None:
        self._database, self._engine, self._draw = database, engine, draw
        with database.connection(write=True) as connection:
            for table in Base.metadata.sorted_tables:
                _fill(connection, table)
        assert list(database.damage()) == []

    def close(self) -> None:
        """Give up the connections."""
        self._database.close()

    def study(self, *, each: int) -> dict[str, Tally]:
        """Flip at least `each` bits of each column, or all that there are."""
        return {
            f"{table.name}.{column.name}": self._column(table, column, each)
            for table in Base.metadata.sorted_tables
            for column in table.columns
        }

    def _column(self, table: Table, column: Column[Any], each: int) -> Tally:
        tally, cells = Tally(), Cells(column)
        with self._engine.connect() as connection:
            flips = {key: list(cells.flips(value)) for key, value in cells.rows(connection).items()}
        for some in flips.values():
            self._draw.shuffle(some)
        while tally.flips < each and any(flips.values()):
            with self._engine.connect() as connection:
                taken = sum(cells.change(connection, key, some.pop()) for key, some in flips.items() if some)
                wrong = [fact for fact, _ in find_wrong_rows(connection, Base.metadata, self._database._wrong_in)]
                noticed = sum(fact.endswith(f" of {table.name}") for fact in wrong)
                connection.rollback()
            tally.flips += taken
            tally.noticed += noticed
            tally.unnoticed += taken - noticed
        assert list(self._database.damage()) == []
        return tally


class Cells:
    """The values of one column, and changes of them."""

    def __init__(self, column: Column[Any]) -> None:
        table = column.table
        keys = [key.name for key in table.primary_key]
        is_row = " AND ".join(f"{name} = :key{number}" for number, name in enumerate(keys))
        self._column = column
        self._query = text(f"SELECT {', '.join(keys)}, {column.name} FROM {table.name} ORDER BY {', '.join(keys)}")
        self._update = text(f"UPDATE {table.name} SET {column.name} = :value WHERE {is_row}")

    def rows(self, connection: Connection) -> dict[tuple[Any, ...], Any]:
        """Return the key of each row -> its value."""
        return {tuple(row[:-1]): row[-1] for row in connection.execute(self._query)}

    def flips(self, value: Any) -> Iterator[Any]:
        """Yield all values that differ from one in a bit, and what takes the place of none, or none in its place."""
        return _flipped(value, self._column)

    def change(self, connection: Connection, key: tuple[Any, ...], value: Any) -> bool:
        """Change the value of a row, unless the database refuses, and say whether it did it."""
        values = {f"key{number}": part for number, part in enumerate(key)}
        with suppress(DBAPIError, ValueError, OverflowError), connection.begin_nested():
            return connection.execute(self._update, {"value": value, **values}).rowcount == 1
        return False


def sqlite_flips(folder: Path, draw: random.Random) -> ValueFlips:
    """Return a full database in a folder."""
    path = folder / "registry.db"
    database = SqliteDatabase(path, read_only=False, patience=Patience(10))
    migrate(database, create=True)
    return ValueFlips(database, engine_behind(path), draw)


def postgres_flips(url: str, draw: random.Random) -> ValueFlips:
    """Return a full database on a server."""
    from registry.storage.postgres import PostgresDatabase

    database = PostgresDatabase(DatabaseUrl(url), command="flips", read_only=False, patience=Patience(10))
    with database.creation():
        pass
    return ValueFlips(database, engine_behind(url), draw)


def engine_behind(place: str | Path) -> Engine:
    """Return another way to a database, given its file or its address: one without what keeps rows right."""
    if isinstance(place, Path):
        engine = create_engine(f"sqlite:///{place}", poolclass=NullPool)
        event.listen(engine, "connect", lambda connection, _: add_functions(connection))
        # Otherwise the first savepoint begins the transaction, and ends it.
        event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    else:
        engine = create_engine(place.replace("postgresql://", "postgresql+psycopg://"), poolclass=NullPool)
        replica = "SET LOCAL session_replication_role = replica"
        event.listen(engine, "begin", lambda connection: connection.exec_driver_sql(replica))
    return engine


def _fill(connection: Connection, table: Table) -> None:
    columns = [column for column in table.columns if column.name != COLUMN]
    names, marks = ", ".join(c.name for c in columns), ", ".join(f":{c.name}" for c in columns)
    statement = text(f"INSERT INTO {table.name} ({names}) VALUES ({marks})")
    connection.execute(
        statement, [{c.name: _value(table, c, number) for c in columns} for number in range(1, ROWS + 1)]
    )


def _value(table: Table, column: Column[Any], number: int) -> Any:
    """Return what a column stores in a row: every third that may be empty is."""
    kind = stored_as(column.type)
    if column.foreign_keys or (column.primary_key and is_known_by_a_number(table.name)):
        return number
    if column.nullable and number % 3 == 0:
        return None
    if column.name == "extra_count":
        return 0
    values: dict[type, Any] = {
        int: number,
        bool: bool(number % 2),
        float: number + 0.25,
        str: f"{column.name} {number}",
        bytes: f"{table.name} {column.name} {number}".encode().ljust(32, b"."),
    }
    return values[kind]


def _flipped(value: Any, column: Column[Any]) -> Iterator[Any]:
    """Yield all values that differ from one in a bit, and what takes the place of none, or none in the place of it."""
    kind = int if column.name == COLUMN else stored_as(column.type)
    if value is None:
        yield _NOTHING[kind]
        return
    if column.nullable:
        yield None
    if kind is bool:
        yield not value
    elif kind is int:
        yield from (int(value) ^ 1 << bit for bit in range(_INTEGER))
    elif kind is float:
        numbers = (float(struct.unpack(">d", data)[0]) for data in _bits(struct.pack(">d", value)))
        yield from (number for number in numbers if not math.isnan(number))  # which SQLite does not store
    elif kind is bytes:
        yield from _bits(bytes(value))
    else:
        for data in _bits(value.encode()):
            with suppress(UnicodeDecodeError):
                yield data.decode()


def _bits(data: bytes) -> Iterator[bytes]:
    for place in range(8 * len(data)):
        changed = bytearray(data)
        changed[place // 8] ^= 1 << place % 8
        yield bytes(changed)
