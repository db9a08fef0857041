"""Correct rows of which a single bit flipped: the one change of one bit with which the check of the row is right again.

    wrong row ──▶ every flip of every value, and of the check ──▶ one fits:  the table is written anew, and committed
                                                              └─▶ none or several, or it breaks a rule: the row stays

The table is written anew, not only the row: where a bit of a key flipped, the row is out of order, and SQLite does not
find it to change it. A row of which more than one bit flipped passes for another one once in 2^32 flips that are tried.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from sqlalchemy import Connection, Table
from sqlalchemy.exc import IntegrityError

from registry.errors import DamagedStore
from registry.row_checks import COLUMN, Value, check_of, columns_of, name_of, owner_of
from registry.schema import Base
from registry.storage.folder import StorePaths
from registry.storage.kept import set_aside
from registry.storage.sqlite import SqliteDatabase, sqlite_of

_COPY = "temp.being_repaired"
_NONE = "no single-bit change restores its checksum"
_WIDTHS = (1, 2, 3, 4, 6, 8)  # bytes that SQLite stores integers in
_WITHOUT_BYTES: tuple[Value, ...] = (None, 0, 1, 0.0, 1.0, "", b"")
"""Values that are nothing but a type, so that a bit of the type turns one into another."""


class _Text(bytes):
    """Text as it is stored; with a wrong bit it may be none."""

    def __repr__(self) -> str:
        """Say that it is not a blob, to the check of a row too."""
        return f"text {super().__repr__()}"


@dataclass(frozen=True)
class RowRepair:
    """A wrong row, and the value that was corrected, or why none was; or the indexes, which were made anew."""

    row: str
    task: str | None = None  # that the row is about, as far as it tells
    column: str | None = None
    before: str | None = None
    after: str | None = None
    problem: str | None = None


def repair_rows(database: SqliteDatabase, paths: StorePaths) -> list[RowRepair]:
    """Correct what can be corrected, and return what became of each wrong row; a copy goes to quarantine before."""
    if database.is_sound():
        return []
    set_aside(database, paths)
    try:
        with database.connection(write=True, guarded=False) as connection:
            sqlite_of(connection).text_factory = _Text
            repairs = [made for table in Base.metadata.sorted_tables for made in _repair_table(connection, table)]
            return [*repairs, *_repair_indexes(connection)]
    except DamagedStore as error:  # SQLite cannot read all rows, and nothing was changed
        return [RowRepair("the database", problem=str(error))]


def _repair_indexes(connection: Connection) -> Iterator[RowRepair]:
    if connection.exec_driver_sql("PRAGMA integrity_check").scalars().all() != [b"ok"]:
        with suppress(IntegrityError), connection.begin_nested():
            connection.exec_driver_sql("REINDEX")
            yield RowRepair("the indexes")


def _repair_table(connection: Connection, table: Table) -> Iterator[RowRepair]:
    listed = ", ".join(f'"{name}"' for name in [*columns_of(table), COLUMN])
    stored = connection.exec_driver_sql(f"SELECT {listed} FROM {table.name} NOT INDEXED").all()  # noqa: S608
    rows = enumerate(([_readable(value) for value in row] for row in stored), 1)
    wrong = [(place, row) for place, row in rows if row[-1] != check_of(table.name, *row[:-1])]
    if wrong:
        # Its rows are numbered in the order in which they were just read.
        connection.exec_driver_sql(f"CREATE TABLE {_COPY} AS SELECT * FROM main.{table.name} NOT INDEXED")  # noqa: S608
        yield from (_repair_row(connection, table, place, row) for place, row in wrong)
        connection.exec_driver_sql(f"DROP TABLE {_COPY}")


def _repair_row(connection: Connection, table: Table, place: int, row: list[Value]) -> RowRepair:
    name = name_of(table.name, row)
    fits = {ascii(found): found for found in _corrections(table.name, row)}
    if len(fits) != 1:
        problem = f"{len(fits)} different single-bit changes restore its checksum" if fits else _NONE
        return RowRepair(name, _owner(connection, table, place), problem=problem)
    ((index, value),) = fits.values()
    column, before, after = [*columns_of(table), COLUMN][index], ascii(row[index])[:40], ascii(value)[:40]
    savepoint = connection.begin_nested()
    connection.exec_driver_sql(f'UPDATE {_COPY} SET "{column}" = ? WHERE rowid = ?', (value, place))  # noqa: S608
    task, problem_of = _owner(connection, table, place), _write_anew(connection, table)
    if problem_of is None:
        savepoint.commit()
    else:
        savepoint.rollback()
    return RowRepair(name, task, column, before, after, problem_of)


def _write_anew(connection: Connection, table: Table) -> str | None:
    """Fill a table from the copy; return which rule the rows break, if they break one."""
    dangling = _dangling(connection)
    try:
        connection.exec_driver_sql(f"DELETE FROM main.{table.name}")  # noqa: S608
        connection.exec_driver_sql(f"INSERT INTO main.{table.name} SELECT * FROM {_COPY}")  # noqa: S608
    except IntegrityError as error:
        return f"the correction violates a constraint: {error.orig}"
    return "the correction leaves a dangling reference" if _dangling(connection) > dangling else None


def _dangling(connection: Connection) -> int:
    return len(connection.exec_driver_sql("PRAGMA foreign_key_check").all())


def _owner(connection: Connection, table: Table, place: int) -> str | None:
    query = f"SELECT {owner_of(table)} FROM {_COPY} AS own WHERE own.rowid = ?"  # noqa: S608
    found = connection.exec_driver_sql(query, (place,)).scalar_one()
    return found.decode(errors="replace") if isinstance(found, bytes) else None


def _readable(value: Value) -> Value:
    if isinstance(value, _Text):
        with suppress(UnicodeDecodeError):
            return value.decode()
    return value


def _corrections(table: str, row: list[Value]) -> Iterator[tuple[int, Value]]:
    """Yield the index and the value of each change of one bit with which the check, which comes last, is right."""
    *values, check = row
    for index, value in enumerate(values):
        for other in _flips(value):
            if check_of(table, *values[:index], other, *values[index + 1 :]) == check:
                yield index, other
    right = check_of(table, *values)
    if isinstance(check, int) and right in _flips(check):
        yield len(values), right


def _flips(value: Value) -> Iterator[Value]:
    """Yield what a value may have been before one bit of it flipped, in any form that SQLite stores it in."""
    if value in _WITHOUT_BYTES:
        yield from _WITHOUT_BYTES
    if isinstance(value, int):
        yield from _integers(value)
    elif isinstance(value, float):
        if value.is_integer() and abs(value) < 1 << 63:
            yield from map(float, _integers(int(value)))  # so SQLite stores those that are whole
        yield from (struct.unpack(">d", other)[0] for other in _bits(struct.pack(">d", value)))
    elif isinstance(value, bytes) and not isinstance(value, _Text):
        yield from _bits(value)
        yield from _texts([value])
    elif value is not None:
        stored = value.encode() if isinstance(value, str) else bytes(value)
        yield from _texts(_bits(stored))
        yield stored


def _integers(value: int) -> Iterator[int]:
    for width in _WIDTHS:
        with suppress(OverflowError):  # it is too large to be stored so
            for other in _bits(value.to_bytes(width, "big", signed=True)):
                yield int.from_bytes(other, "big", signed=True)


def _texts(stored: Iterator[bytes] | list[bytes]) -> Iterator[str]:
    for one in stored:
        with suppress(UnicodeDecodeError):
            yield one.decode()


def _bits(stored: bytes) -> Iterator[bytes]:
    for bit in range(8 * len(stored)):
        flipped = bytearray(stored)
        flipped[bit // 8] ^= 1 << bit % 8
        yield bytes(flipped)
