"""A check value in each row, so that a bit that flips in the database is seen before anybody acts on the row.

    id ... all columns ... crc      CRC-32 of the name of the table and of the values of all columns, with their types

    written   by triggers, so by whoever writes: objects, plain statements, upserts, SQLite's own ON DELETE SET NULL
    checked   where a row is selected with its column `crc`, which all objects are and plain statements ask for,
              and where it is updated or deleted: nothing makes a wrong row right

SQLite's own checks see broken pages and indexes. They do not see that an error of 0.09 has become one of 0.02.
"""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sqlalchemy import Connection, MetaData, Table

Value = int | float | str | bytes | None
"""What SQLite stores."""

COLUMN = "crc"
REFUSED = "has a checksum mismatch and was neither changed nor deleted"
"""How SQLite's message ends where a wrong row was to be changed."""


# Table -> its columns, in the order in which the check takes them, without that of the check. `registry.schema` says
# more of each, but takes longer to import than thousands of rows to check.
COLUMNS_OF = {
    table: tuple(names.split())
    for table, names in {
        "adapters": (
            "id task_id step is_final weights_id config_id card_id description_id source "
            "created_at evicted_at is_generated initial_id tensors_key extra_count"
        ),
        "base_labels": "id label base_model_id reason path",
        "base_models": "id name fingerprint path shape loader load_in",
        "blobs": "id digest size",
        "codes": (
            "id task_id generator_id adapter_id blob_id bits dw_error residual_id residual_error "
            "min_gain max_error tolerance is_kept refined max_size claim keep effect"
        ),
        "documents": "id digest body",
        "evaluations": (
            "id task_id rung generator_id data_id metric nats_per_token tokens utf8_bytes "
            "retained_gain dw_error settings_id created_at score load_in"
        ),
        "extras": "adapter_id file blob_id size",
        "generators": ("id base_model_id version parent_id blob_id config metrics is_current created_at start_id"),
        "run_codes": "run_id adapter_id blob_id generator squared_error initial_is_known",
        "task_vectors": "task_id view support_set extractor_id id blob_id dim",
        "tasks": "id name base_model_id samples_id eval_id created_at pinned folder note tags label_id",
        "train_runs": "id base_model_id state config step weights_id optimizer_id created_at updated_at",
    }.items()
}


_COUNTING = tuple(
    f"CREATE TEMP TRIGGER extras_{event} AFTER {event} ON main.extras BEGIN"  # noqa: S608
    f" UPDATE adapters SET extra_count = extra_count {change} WHERE id = {row}.adapter_id; END"
    for event, change, row in (("INSERT", "+ 1", "NEW"), ("DELETE", "- 1", "OLD"))
)
"""An adapter knows how many extras it has, so that one that moved or is gone is missed."""


_KEY_LENGTH = {"extras": 3, "task_vectors": 4, "run_codes": 2}
"""Of the tables whose rows are not known by one number."""


_OF_RUNS = ("train_runs", "run_codes")
"""What no task depends on: these rows are gone when a training is done."""


class WrongRow(ValueError):
    """A row does not have the values that it was written with."""


def passed(value: int | str | None) -> int | None:
    """Return what the check of a row said; raise `WrongRow` if the row failed."""
    if isinstance(value, str):
        raise WrongRow(value)
    return value


def add_functions(connection: sqlite3.Connection) -> None:
    """Give a connection the functions that make and compare checks."""
    connection.create_function("icm_check", -1, check_of, deterministic=True)
    connection.create_function("icm_checked", -1, checked, deterministic=True)


def check_of(table: str, *values: Value) -> int:
    """Return the check value of a row: the name of its table and its values. As SQLite's signed 4 bytes."""
    return _check_in(table, len(values))(*values)


@lru_cache(maxsize=64)
def _check_in(table: str, count: int) -> Callable[..., int]:
    """Return what makes the check of a row of `count` values of one table: most of a listing's time goes by in it."""
    # As `ascii` writes a tuple of them all, in three quarters of its time. Python writes these five types in the same
    # way for ever, and each in another way than the others.
    form, crc32 = f"({table!a}, {', '.join(['%a'] * count)})", zlib.crc32

    def check(*values: Value) -> int:
        return crc32((form % values).encode()) - 0x80000000

    return check


def checked(check: int | None, table: str, *values: Value) -> int | str | None:
    """Return the check value, or else which row it is wrong for."""
    if check == check_of(table, *values):
        return check
    if check is None and not any(value is not None for value in values):
        return None  # an outer join that found no row
    return f"checksum mismatch in {name_of(table, values)}"


def is_known_by_a_number(table: str) -> bool:
    """Say whether the first column of a table is its key, and the place of its rows."""
    return table not in _KEY_LENGTH


def name_of(table: str, values: Sequence[Value]) -> str:
    """Return what a message calls a row."""
    key = ", ".join(ascii(value)[:40] for value in values[: _KEY_LENGTH.get(table, 1)])
    return f"row {key} of {table}"


def guard(connection: sqlite3.Connection, tables: MetaData) -> None:
    """Let every change of a row write its check, until the connection closes."""
    for statement in _triggers(tables):
        connection.execute(statement)


@lru_cache(maxsize=1)
def _triggers(tables: MetaData) -> tuple[str, ...]:
    return (*(statement for table in tables.sorted_tables for statement in _triggers_of(table)), *_COUNTING)


def _triggers_of(table: Table) -> Iterator[str]:
    name, columns = table.name, ", ".join(f'"{column}"' for column in columns_of(table))
    ours = " AND ".join(f'"{key.name}" = NEW."{key.name}"' for key in table.primary_key)
    write = f"UPDATE {name} SET {COLUMN} = {_call(table)} WHERE {ours};"  # noqa: S608  # names of our own
    old = f"OLD.{COLUMN} IS NOT {_call(table, 'OLD.')}"
    refuse = f"SELECT RAISE(ABORT, 'a row of {name} {REFUSED}') WHERE {old};"
    yield f"CREATE TEMP TRIGGER {name}_made AFTER INSERT ON main.{name} BEGIN {write} END"
    # Without the column of the check, or writing it would begin this again.
    yield f"CREATE TEMP TRIGGER {name}_changed AFTER UPDATE OF {columns} ON main.{name} BEGIN {refuse} {write} END"
    yield f"CREATE TEMP TRIGGER {name}_gone BEFORE DELETE ON main.{name} BEGIN {refuse} END"


def columns_of(table: Table) -> list[str]:
    """Return the columns that the check of a row is of."""
    return [column.name for column in table.columns if column.name != COLUMN]


def _call(table: Table, row: str = "", *, checked: bool = False) -> str:
    """Return the SQL of the check of a row, which may be OLD in a trigger, or of what it says of the one it has."""
    values = ", ".join(f'{row}"{column}"' for column in columns_of(table))
    return f"icm_checked({COLUMN}, '{table.name}', {values})" if checked else f"icm_check('{table.name}', {values})"


def is_right(table: str) -> str:
    """Return SQLite's SQL of the condition that a row of a table has the values that it was written with."""
    return f"{table}.{COLUMN} IS icm_check('{table}', {_values_of(table)})"


def first_wrong(connection: sqlite3.Connection, table: str, condition: str) -> str | None:
    """Check the rows of a table that a condition holds for; say what is wrong with the first that fails."""
    said = f"icm_checked({table}.{COLUMN}, '{table}', {_values_of(table)})"  # no text for a row that passes
    query = f"SELECT {said} FROM {table} WHERE ({condition}) AND typeof({said}) = 'text' LIMIT 1"  # noqa: S608
    row = connection.execute(query).fetchone()
    return None if row is None else str(row[0])


def _values_of(table: str) -> str:
    return ", ".join(f'{table}."{name}"' for name in COLUMNS_OF[table])


def are_right(connection: sqlite3.Connection) -> bool:
    """Say whether all rows have the values that they were written with; SQLite goes through them up to a wrong one."""
    try:
        for table, columns in COLUMNS_OF.items():
            connection.create_function("icm_check_in", -1, _check_in(table, len(columns)), deterministic=True)
            wrong = f"SELECT 1 FROM {table} WHERE {COLUMN} IS NOT icm_check_in({_values_of(table)}) LIMIT 1"  # noqa: S608
            if connection.execute(wrong).fetchone() is not None:
                return False
    except (sqlite3.Error, UnicodeDecodeError):  # text that is none, or a page that cannot be read
        return False
    return True


WrongIn = Callable[["Connection", "Table", Sequence[str]], Iterator[tuple[Any, ...]]]
"""Yields what is wrong with each wrong row of a table, and some fields of it: see `Database._wrong_in`."""


def find_wrong_rows(connection: Connection, tables: MetaData, wrong_in: WrongIn) -> Iterator[tuple[str, str | None]]:
    """Check every row, and every adapter's number of extras; yield what is wrong, and the task it is about if known."""
    for table in tables.sorted_tables:
        yield from ((fact, task) for fact, task in wrong_in(connection, table, [owner_of(table)]))
    for name, there, counted in connection.exec_driver_sql(_MISCOUNTED):
        yield f"an adapter of task {name} has {there} extras, but {counted} were recorded", name


def find_wrong_tasks(connection: Connection, tables: MetaData, wrong_in: WrongIn) -> dict[str, set[int]]:
    """Check every row; return what is wrong with one -> the numbers of the tasks whose figures depend on it."""
    found: dict[str, set[int]] = {}
    for table in tables.sorted_tables:
        numbers = _numbers_in(table)
        for fact, *values in wrong_in(connection, table, numbers):
            row = dict(zip(numbers, values, strict=True))
            # The numbers of a row that cannot be read are not known: whoever reads it meets the damage.
            found[fact] = {number for number in _depending(connection, tables, table, row) if number is not None}
    return found


def wrong_in(connection: Connection, table: Table, fields: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """Let SQLite check a table; yield what is wrong with a row, and some fields of it, None if it cannot be read."""
    from sqlalchemy.exc import OperationalError

    fails = f"SELECT {_call(table, checked=True)}, {', '.join(fields)} FROM {table.name} AS own"  # noqa: S608
    try:
        yield from map(tuple, connection.exec_driver_sql(f"{fails} WHERE {COLUMN} IS NOT {_call(table)}").all())
    except OperationalError:  # one has text that is none
        yield from _one_by_one(connection, table, fails, len(fields))


def _one_by_one(connection: Connection, table: Table, fails: str, fields: int) -> Iterator[tuple[Any, ...]]:
    from sqlalchemy.exc import OperationalError

    count = int(connection.exec_driver_sql(f"SELECT count(*) FROM {table.name}").scalar_one())  # noqa: S608
    for place in range(count):
        try:
            row = connection.exec_driver_sql(f"{fails} LIMIT 1 OFFSET {place}").one()
        except OperationalError as error:
            yield f"row {place + 1} of {count} of {table.name} cannot be read: {error.orig}", *[None] * fields
        else:
            if isinstance(row[0], str):
                yield tuple(row)


def _numbers_in(table: Table) -> list[str]:
    """Return the columns that number the rows of a table, and those of others that it refers to."""
    return [column.name for column in table.columns if column.name == "id" or column.foreign_keys]


def _depending(connection: Connection, tables: MetaData, table: Table, row: Mapping[str, Any]) -> Iterator[int]:
    """Yield the numbers of the tasks that a row is about, and of those that rows are about which refer to it."""
    if table.name in _OF_RUNS:
        return
    if table.name == "tasks":
        yield row["id"]
    if "task_id" in row:
        yield row["task_id"]
    asked = [f"SELECT task_id FROM adapters WHERE id = {row['adapter_id']:d}"] if row.get("adapter_id") else []  # noqa: S608
    if table.name in ("generators", "base_labels"):
        asked += [f"SELECT id FROM tasks WHERE base_model_id = {row['base_model_id'] or 0:d}"]  # noqa: S608
    for statement in asked:
        yield from connection.exec_driver_sql(statement).scalars()
    for other in tables.sorted_tables if row.get("id") else ():
        numbers = _numbers_in(other)
        for name in (key.parent.name for key in other.foreign_keys if key.column.table is table and other is not table):
            query = f"SELECT {', '.join(numbers)} FROM {other.name} WHERE {name} = {row['id']:d}"  # noqa: S608
            for values in connection.exec_driver_sql(query).all():
                yield from _depending(connection, tables, other, dict(zip(numbers, values, strict=True)))


def owner_of(table: Table) -> str:
    """Return the SQL of the name of the task that a row is about."""
    if table.name == "tasks":
        return "own.name"
    if "task_id" in table.columns:
        return "(SELECT name FROM tasks WHERE id = own.task_id)"
    if "adapter_id" in table.columns:
        return "(SELECT name FROM tasks JOIN adapters ON tasks.id = task_id WHERE adapters.id = own.adapter_id)"
    return "NULL"


_MISCOUNTED = """
SELECT name, there, extra_count FROM (
    SELECT task_id, extra_count, (SELECT count(*) FROM extras WHERE adapter_id = adapters.id) AS there FROM adapters
) AS counted JOIN tasks ON tasks.id = task_id WHERE there != extra_count"""
