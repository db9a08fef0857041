"""Schema 10: a code is made for a share of what its adapter does, and that share is measured.

Table `codes` gets the columns `keep` and `effect`, which say nothing of the codes that are there. Their checks are
written anew, since a check is of all columns. A row that failed its check fails after it too.
"""

from collections.abc import Iterator

from alembic import op
from sqlalchemy import Column, Connection, Double, bindparam, column, table, update

from registry.errors import DamagedStore
from registry.row_checks import Value, check_of
from registry.storage.sqlite import sqlite_of

revision = "10"
down_revision = "9"

_BEFORE = (
    *("id", "task_id", "generator_id", "adapter_id", "blob_id", "bits", "dw_error", "residual_id", "residual_error"),
    *("min_gain", "max_error", "tolerance", "is_kept", "refined", "max_size", "claim"),
)
_FEW = 1000  # rows that are read, or written, at a time


def upgrade() -> None:
    """Move a store to this schema."""
    connection = op.get_bind()
    right, found = list(_new_checks(connection)), 0
    op.add_column("codes", Column("keep", Double))
    op.add_column("codes", Column("effect", Double))
    codes = table("codes", column("id"), column("crc"))
    of_row = update(codes).where(codes.c.id == bindparam("number")).values(crc=bindparam("check"))
    for start in range(0, len(right), _FEW):
        some = [{"number": number, "check": check} for number, check in right[start : start + _FEW]]
        found += connection.execute(of_row, some).rowcount
    if found != len(right):  # SQLite does not find all rows where the number of another is wrong
        fact = f"{len(right) - found} of {len(right)} intact rows of table codes cannot be found by their ids"
        raise DamagedStore(fact, hint="run `icm verify --repair` with icm 0.10, which may repair the table")


def _new_checks(connection: Connection) -> Iterator[tuple[int, int]]:
    """Yield the number of each row that passes its check, and the check that it gets."""
    if connection.dialect.name == "sqlite":  # text that is none is in a row that fails
        sqlite_of(connection).text_factory = lambda stored: stored.decode(errors="replace")
    query = f"SELECT crc, {', '.join(_BEFORE)} FROM codes"  # noqa: S608  # names of our own
    for check, *row in connection.exec_driver_sql(query, execution_options={"yield_per": _FEW}):
        values = [_as_in_sqlite(value) for value in row]
        if check == check_of("codes", *values):
            yield row[0], check_of("codes", *values, None, None)


def _as_in_sqlite(value: Value) -> Value:
    return int(value) if isinstance(value, bool) else value  # PostgreSQL has a type for what is true
