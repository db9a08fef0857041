"""A schema after this program's, for tests: revisions of it, and the program that has it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from alembic import op
from sqlalchemy import Column, String, column, table, update
from sqlalchemy.orm import mapped_column

from registry import row_checks, schema
from registry.errors import StoreFull
from registry.row_checks import check_of
from registry.schema import Task
from registry.storage import migrations
from registry.storage.database import Database
from tests.statements import forget_statements

NUMBER = Database.newest_schema + 1

_BEFORE = (
    *("id", "name", "base_model_id", "samples_id", "eval_id", "created_at"),
    *("pinned", "folder", "note", "tags", "label_id"),
)
_AFTER = (*_BEFORE, "extra")


def add_column() -> None:
    """Add a column to a table that has rows: what docs/design.md asks of a revision."""
    connection = op.get_bind()
    op.add_column("tasks", Column("extra", String))
    connection.exec_driver_sql("UPDATE tasks SET extra = lower(name)")
    tasks = table("tasks", column("id"), column("crc"))
    for row in connection.exec_driver_sql("SELECT * FROM tasks").mappings().all():
        # As SQLite stores it: PostgreSQL has a type for what is true.
        values = {name: int(value) if isinstance(value, bool) else value for name, value in row.items()}
        if row["crc"] == check_of("tasks", *(values[name] for name in _BEFORE)):  # what failed before fails after
            check = check_of("tasks", *(values[name] for name in _AFTER))
            connection.execute(update(tasks).where(tasks.c.id == row["id"]).values(crc=check))


def fail_half_way() -> None:
    """Change tables, then fail."""
    op.create_table("half", Column("id", String))
    raise ZeroDivisionError


def change_large_rows() -> None:
    """Write more than fits into the memory of a connection that has little, then go on."""
    op.get_bind().exec_driver_sql("UPDATE documents SET body = zeroblob(length(body))")
    add_column()


def commit_half_way() -> None:
    """Do what no revision may."""
    connection = op.get_bind()
    op.add_column("tasks", Column("extra", String))
    connection.exec_driver_sql("COMMIT")
    connection.exec_driver_sql("BEGIN")


def need_the_reserve() -> None:
    """Add a column where there is room for it, once the reserve is gone."""
    path = Path(op.get_bind().exec_driver_sql("PRAGMA database_list").all()[0][2])
    add_column()
    if path.with_name("reserve").exists():
        raise StoreFull("database or disk is full")


def have_it(patch: pytest.MonkeyPatch, folder: Path, upgrade: Callable[[], None] = add_column) -> None:
    """Let this process be the icm of the next schema, as far as revisions go; a folder gets its revision."""
    folder.mkdir(exist_ok=True)
    folder.joinpath("schema_next.py").write_text(
        f"from {upgrade.__module__} import {upgrade.__name__} as upgrade\n"
        f"revision, down_revision = '{NUMBER}', '{NUMBER - 1}'\n"
    )
    patch.setattr(migrations, "VERSIONS", [*migrations.VERSIONS, folder])
    patch.setattr(Database, "newest_schema", NUMBER)


def describe_it() -> None:
    """Let the classes of this process have the columns of the next schema, for the rest of its life: in a child."""
    Task.extra = mapped_column(String)  # type: ignore[attr-defined]
    row_checks.COLUMNS_OF["tasks"] = _AFTER
    # What was made of the classes as they were:
    forget_statements()
    row_checks._triggers.cache_clear()
    schema._kinds_of.cache_clear()
