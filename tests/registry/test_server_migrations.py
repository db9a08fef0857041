"""The schema of a store in PostgreSQL: made once, moved forward whole, never moved back; checks of rows stay right."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from sqlalchemy import Engine, event, select

from registry.errors import DamagedRow, NotAStore, StoreLocked, StoreNotFound, StoreReadOnly, StoreTooNew, StoreTooOld
from registry.schema import Task
from registry.storage.database import Database
from tests.pg_server import new_database
from tests.registry import next_schema
from tests.registry.children import run
from tests.registry.servers import add_rows, everything_in, opened_server


@pytest.fixture
def empty(postgres: str) -> str:
    """The address of a database without a store."""
    return new_database(postgres)


@pytest.fixture
def url(empty: str) -> str:
    """The address of a store with a few rows."""
    with opened_server(empty, create=True) as database:
        add_rows(database)
    return empty


def run_sql(url: str, *statements: str) -> None:
    """Run statements behind the back of the store: no trigger acts."""
    import psycopg

    with psycopg.connect(url) as connection:
        connection.execute("SET session_replication_role = replica")
        for statement in statements:
            connection.execute(statement)


def open_and_close(url: str, *, patience: float = 60.0, read_only: bool = False) -> None:
    with opened_server(url, patience=patience, read_only=read_only):
        pass


def schema_of(url: str) -> str:
    (noted,) = everything_in(url)["rows"]["alembic_version"]
    return str(noted)


def test_a_new_store_has_the_newest_schema_and_making_it_again_changes_nothing(url: str) -> None:
    assert schema_of(url) == f"('{Database.newest_schema}',)"
    before = everything_in(url)
    with opened_server(url, create=True) as database:
        assert list(database.damage()) == []
    assert everything_in(url) == before


def test_opening_a_store_asks_the_server_one_thing(url: str) -> None:
    asked: list[str] = []

    def note(connection: object, cursor: object, statement: str, *_: object) -> None:
        asked.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    try:
        open_and_close(url)
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    assert asked == ["SELECT version_num FROM alembic_version"]


def test_a_database_without_tables_is_no_store(empty: str) -> None:
    with pytest.raises(StoreNotFound, match="there is no store"):
        open_and_close(empty)
    assert everything_in(empty)["columns"] == []


@pytest.mark.parametrize("create", [True, False])
@pytest.mark.parametrize("rows", ["('1b2c3d4e5f60')", "('9'), ('10')"])
def test_a_database_that_alembic_keeps_for_another_program_is_refused_and_not_touched(
    empty: str, create: bool, rows: str
) -> None:
    run_sql(empty, "CREATE TABLE alembic_version (version_num text)", f"INSERT INTO alembic_version VALUES {rows}")
    before = everything_in(empty)
    with pytest.raises(NotAStore, match="not an icm schema") as refused, opened_server(empty, create=create):
        pytest.fail("it is another program's")
    assert "a separate database" in str(refused.value.hint)
    assert everything_in(empty) == before


@pytest.mark.parametrize("create", [True, False])
@pytest.mark.parametrize(("noted", "error"), [("99", StoreTooNew), ("8", StoreTooOld)])
def test_a_schema_that_is_not_known_is_refused_and_not_touched(
    url: str, noted: str, error: type[Exception], create: bool
) -> None:
    run_sql(url, f"UPDATE alembic_version SET version_num = '{noted}'")
    before = everything_in(url)
    with pytest.raises(error, match=f"has schema {noted}"), opened_server(url, create=create):
        pytest.fail("it has another schema")
    assert everything_in(url) == before


def test_who_has_a_store_open_writes_nothing_once_a_newer_icm_has_moved_it(url: str, tmp_path: Path) -> None:
    with opened_server(url) as database:
        with pytest.MonkeyPatch.context() as patch:
            next_schema.have_it(patch, tmp_path / "versions")
            open_and_close(url)
        before = everything_in(url)
        with pytest.raises(StoreTooNew):
            add_rows(database)
    assert everything_in(url) == before


@pytest.fixture
def old(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a store that a newer schema has left behind."""
    next_schema.have_it(monkeypatch, tmp_path / "versions")
    return url


@pytest.mark.parametrize("read_only", [True, False])
def test_an_old_store_keeps_its_rows_and_they_are_right(old: str, read_only: bool) -> None:
    before = everything_in(old)["rows"]

    def check() -> None:
        next_schema.describe_it()
        with opened_server(old, read_only=read_only) as database:
            assert list(database.damage()) == []
            with database.read() as session:
                tasks = session.scalars(select(Task).order_by(Task.id)).all()
            assert [(task.name, task.pinned, task.tags, task.note) for task in tasks] == [
                ("Rust", True, ("a", "b"), None),
                ("html", False, (), "kept"),
            ]
            assert [task.extra for task in tasks] == ["rust", "html"]  # type: ignore[attr-defined]

    assert run(check) == 0
    after = everything_in(old)["rows"]
    changed = {"tasks", "alembic_version"}
    assert {name: rows for name, rows in after.items() if name not in changed} == {
        name: rows for name, rows in before.items() if name not in changed
    }


def test_a_row_that_was_wrong_before_is_wrong_after(old: str) -> None:
    run_sql(old, "UPDATE tasks SET pinned = NOT pinned WHERE name = 'html'")

    def check() -> None:
        next_schema.describe_it()
        with opened_server(old) as database:
            (found,) = database.damage()
            assert found.task == "html"

    assert run(check) == 0


def test_what_is_written_after_a_column_came_has_right_checks(old: str) -> None:
    def check() -> None:
        next_schema.describe_it()
        with opened_server(old) as database:
            with database.write() as session:
                rust = session.scalars(select(Task).where(Task.name == "rust")).one()
                rust.extra = "written"  # type: ignore[attr-defined]
            assert list(database.damage()) == []
            run_sql(old, "UPDATE tasks SET extra = 'flipped' WHERE extra = 'html'")
            with pytest.raises(DamagedRow), database.write() as session:
                session.delete(session.scalars(select(Task).where(Task.name == "html")).one())

    assert run(check) == 0


def test_many_processes_move_an_old_store_at_once(old: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(open_and_close, [old] * 4))
    assert schema_of(old) == f"('{next_schema.NUMBER}',)"


def test_a_migration_that_fails_half_way_leaves_the_old_schema(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    next_schema.have_it(monkeypatch, tmp_path / "versions", next_schema.fail_half_way)
    before = everything_in(url)
    with suppress(ZeroDivisionError):
        open_and_close(url)
    assert everything_in(url) == before


def test_a_migration_waits_for_who_writes_as_long_as_patience_lasts(old: str) -> None:
    import psycopg

    from registry.storage.postgres import _WRITING

    with psycopg.connect(old) as other:
        other.execute("SELECT pg_advisory_xact_lock(%s)", (_WRITING,))
        with pytest.raises(StoreLocked):
            open_and_close(old, patience=0.0)


def test_a_user_who_may_not_change_tables_is_told_so_and_may_still_read_a_store_of_the_newest_schema(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_sql(
        url,
        "DO $$ BEGIN IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'reader') THEN CREATE ROLE reader LOGIN; "
        "END IF; END $$",
        "GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader",
    )
    reader = url.replace("postgresql://postgres:@", "postgresql://reader:@")
    with opened_server(reader, read_only=True) as database:
        assert list(database.damage()) == []
    next_schema.have_it(monkeypatch, tmp_path / "versions")
    before = everything_in(url)
    with pytest.raises(StoreReadOnly, match="must be owner"):
        open_and_close(reader, read_only=True)
    assert everything_in(url) == before
