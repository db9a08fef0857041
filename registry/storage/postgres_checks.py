"""The checks of rows in PostgreSQL, which cannot call Python: this process makes them just before it commits.

    written    ──trigger──▶ has no check     ──before the commit──▶ read back, and given the check of what came back
    changed    ──trigger──▶ what it was      ──before the commit──▶ that had passed, or nothing is committed
    or deleted              is noted

So nobody forgets a check, and nothing makes a wrong row right, as in SQLite. The notes are a temporary table, which
each connection that writes makes for itself: other programs cannot write.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from sqlalchemy import BigInteger, Connection, Integer, String, Table, bindparam, update
from sqlalchemy.dialects import postgresql

from registry.row_checks import COLUMN, COLUMNS_OF, REFUSED, Value, WrongRow, check_of, checked, name_of
from registry.schema import Base, as_text, row_of, stored_as

_NOTES = "icm_rows_before"
_FEW = 1000  # rows that are fetched at a time
_COUNTING = """
CREATE FUNCTION icm_count_extras() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF TG_OP = 'INSERT' THEN UPDATE adapters SET extra_count = extra_count + 1 WHERE id = NEW.adapter_id;
    ELSE UPDATE adapters SET extra_count = extra_count - 1 WHERE id = OLD.adapter_id; END IF;
    RETURN NULL;
END $$"""
_WRITING = """
CREATE FUNCTION icm_write_{table}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF TG_OP != 'INSERT' AND OLD.{check} IS NOT NULL THEN INSERT INTO pg_temp.{notes} VALUES ({old}); END IF;
    IF TG_OP = 'DELETE' THEN RETURN OLD; END IF;
    IF TG_OP = 'INSERT' OR OLD.{check} IS NOT NULL THEN NEW.{check} := NULL; END IF;
    RETURN NEW;
END $$"""


def install(connection: Connection) -> None:
    """Make the triggers of all tables, which have none."""
    for table in Base.metadata.sorted_tables:
        name = table.name
        names = {"table": name, "check": COLUMN, "notes": _NOTES, "old": _texts_of(table, "OLD")}
        for statement in (
            _WRITING.format(**names),
            f"CREATE TRIGGER icm_write BEFORE INSERT OR UPDATE OR DELETE ON {name} FOR EACH ROW "
            f"EXECUTE FUNCTION icm_write_{name}()",
            f"CREATE INDEX IF NOT EXISTS icm_new_{name} ON {name} ({COLUMN}) WHERE {COLUMN} IS NULL",
        ):
            connection.exec_driver_sql(statement)
    connection.exec_driver_sql(_COUNTING)
    connection.exec_driver_sql(
        "CREATE TRIGGER icm_count AFTER INSERT OR DELETE ON extras FOR EACH ROW EXECUTE FUNCTION icm_count_extras()"
    )


def remove(connection: Connection) -> None:
    """Remove the triggers of all tables, whichever they are by now: they name columns."""
    ours = (
        "SELECT proname FROM pg_proc WHERE proname ~ '^icm_' AND prorettype = 'trigger'::regtype "
        "AND pronamespace = current_schema()::regnamespace"
    )
    for function in connection.exec_driver_sql(ours).scalars().all():
        connection.exec_driver_sql(f"DROP FUNCTION {function} CASCADE")


def guard(connection: Connection) -> None:
    """Let a connection write rows, until it closes."""
    # What goes with a row that it belongs to is deleted in the name of who owns the tables, and noted in that name.
    connection.exec_driver_sql(
        f"CREATE TEMP TABLE IF NOT EXISTS {_NOTES} (texts text[]) ON COMMIT DELETE ROWS;"
        f"GRANT INSERT ON pg_temp.{_NOTES} TO PUBLIC"
    )


def seal(connection: Connection) -> None:
    """Give all rows that this transaction wrote their checks; raise `WrongRow` if it changed one that was wrong."""
    for texts in connection.exec_driver_sql(f"SELECT texts FROM pg_temp.{_NOTES}").scalars():  # noqa: S608
        table, row = row_of(texts)
        if isinstance(checked(int(texts[0]), table, *row), str):
            raise WrongRow(f"{name_of(table, row)} {REFUSED}")
    written = defaultdict[str, list[list[Value]]](list)
    for texts in connection.exec_driver_sql(" UNION ALL ".join(map(_new_rows, Base.metadata.sorted_tables))).scalars():
        table, row = row_of(texts)
        written[table].append(row)
    for table, rows in written.items():
        _write_checks(connection, Base.metadata.tables[table], rows)


def wrong_in(connection: Connection, table: Table, fields: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """As `Database._wrong_in`: yield what is wrong with each wrong row of a table, and some fields of it."""
    query = f"SELECT {', '.join(fields)}, {with_check(table.name, 'own')} FROM {table.name} AS own"  # noqa: S608
    with connection.execution_options(yield_per=_FEW).exec_driver_sql(query) as found:
        for values in found:
            fact = what_is_wrong(table.name, values[len(fields) :])
            if fact is not None:
                yield fact, *values[: len(fields)]


def with_check(table: str, row: str) -> str:
    """Return the SQL of the check of a row and of what it is of: a yes or no is stored as a number in SQLite."""
    kinds = {column.name: stored_as(column.type) for column in Base.metadata.tables[table].columns}
    values = (f"{row}.{name}::int" if kinds[name] is bool else f"{row}.{name}" for name in COLUMNS_OF[table])
    return ", ".join((f"{row}.{COLUMN}", *values))


def what_is_wrong(table: str, row: Sequence[Any]) -> str | None:
    """Say what is wrong with a row that `with_check` selected, if anything is."""
    said = checked(row[0], table, *row[1:])
    return said if isinstance(said, str) else None


def _new_rows(table: Table) -> str:
    return f"SELECT {_texts_of(table, table.name)} FROM {table.name} WHERE {COLUMN} IS NULL"  # noqa: S608


def _texts_of(table: Table, row: str) -> str:
    """Return the SQL of a row as texts: its check, its table, and all other columns."""
    dialect: Any = postgresql
    spelled = {"dialect": dialect.dialect(), "compile_kwargs": {"literal_binds": True}}
    others = (str(as_text(column).compile(**spelled)) for column in table.columns if column.name != COLUMN)
    values = ", ".join(other.replace(f"{table.name}.", f"{row}.") for other in others)
    return f"ARRAY[{row}.{COLUMN}::text, '{table.name}', {values}]"


def _write_checks(connection: Connection, table: Table, rows: list[list[Value]]) -> None:
    """Write the checks of some rows of a table."""
    names = [column.name for column in table.columns if column.name != COLUMN]
    keys = [key.name for key in table.primary_key]
    # Of plain types: what is here is what is stored.
    types = {name: BigInteger() if stored_as(table.c[name].type) is int else String() for name in keys}
    is_row = [table.c[name] == bindparam(f"key_{name}", type_=types[name]) for name in keys]
    statement = update(table).where(*is_row).values({COLUMN: bindparam("check", type_=Integer())})
    values = [dict(zip(names, row, strict=True)) for row in rows]
    connection.execute(
        statement,
        [
            {"check": check_of(table.name, *row.values()), **{f"key_{name}": row[name] for name in keys}}
            for row in values
        ],
    )
