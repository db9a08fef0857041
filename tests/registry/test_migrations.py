"""The schema: made once, moved forward whole, never moved back."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, tzinfo
from pathlib import Path

import pytest
from sqlalchemy import Connection, create_engine

from registry import migrations, writer
from registry.engine import PAGE_SIZE, Database
from registry.errors import DamagedStore, NotAStore, StoreFull, StoreTooNew
from registry.models import Base
from registry.records import Asked, NewResidual
from registry.store import Store
from tests.registry.every_row import everything, fill
from tests.registry.examples import code_of, evaluation, ingest, new_store, vector

VERSION_1 = Path(__file__).parent / "data" / "store_v1.sql"
VERSION_2 = Path(__file__).parent / "data" / "store_v2.sql"
VERSION_3 = Path(__file__).parent / "data" / "store_v3.sql"
VERSION_4 = Path(__file__).parent / "data" / "store_v4.sql"
WRITTEN_AT = datetime(2026, 11, 24, 16, 51, 22, tzinfo=UTC)


def tables_of(connection: sqlite3.Connection) -> dict[str, object]:
    """Return what matters of a schema, free of how its SQL is written."""
    names = [name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type='table' ORDER BY 1")]
    return {
        name: (
            connection.execute(f"SELECT name, type, \"notnull\", pk FROM pragma_table_info('{name}')").fetchall(),
            sorted(connection.execute(f'SELECT "table", "from", on_delete FROM pragma_foreign_key_list(\'{name}\')')),
            sorted(indexes_of(connection, name)),
        )
        for name in names
    }


def indexes_of(connection: sqlite3.Connection, table: str) -> Iterator[tuple[object, ...]]:
    for _, name, unique, origin, partial in connection.execute(f"PRAGMA index_list('{table}')").fetchall():
        columns = connection.execute(f"SELECT name, coll FROM pragma_index_xinfo('{name}') WHERE key").fetchall()
        yield (name if origin == "c" else "", unique, partial, str(columns))


def test_the_migrations_make_the_tables_that_the_classes_describe(store: Store, tmp_path: Path) -> None:
    wanted = tmp_path / "wanted.db"
    engine = create_engine(f"sqlite:///{wanted}")
    Base.metadata.create_all(engine)
    engine.dispose()
    with closing(sqlite3.connect(store.paths.database)) as made, closing(sqlite3.connect(wanted)) as described:
        assert tables_of(made) == tables_of(described)


def test_a_new_store_has_the_tables_that_an_old_one_is_moved_to(tmp_path: Path, of_schema_2: dict[str, object]) -> None:
    new_store(tmp_path / "store").close()
    new_store(tmp_path / "new").close()
    paths = [tmp_path / name / "registry.db" for name in ("store", "new")]
    with closing(sqlite3.connect(paths[0])) as moved, closing(sqlite3.connect(paths[1])) as made:
        query = "SELECT name, sql FROM sqlite_schema ORDER BY name"
        assert moved.execute(query).fetchall() == made.execute(query).fetchall()


def test_a_new_store_has_the_newest_schema(store: Store) -> None:
    assert store.schema_version == migrations.newest()


def restore_version_1(root: Path) -> None:
    """Replace the database of a store with the kept dump of one of schema 1."""
    with new_store(root) as store:
        ingest(store, "shakespeare", steps=[80, 90])
    put_database(root, VERSION_1)


def put_database(root: Path, dump: Path) -> None:
    database = root / "registry.db"
    database.unlink()
    with closing(sqlite3.connect(database)) as connection:
        connection.executescript(dump.read_text())


def test_a_store_of_schema_1_opens_with_its_rows(tmp_path: Path) -> None:
    restore_version_1(tmp_path / "store")
    with new_store(tmp_path / "store") as store:
        assert [adapter.step for adapter in store.adapters("shakespeare")] == [80, 90, None]
        assert list(store.verify(read_data=True)) == []
        assert store.schema_version == migrations.newest()


class Written(datetime):
    """The moment at which the kept dumps were written."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
        return WRITTEN_AT


@pytest.fixture
def expected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Make a store with rows in every table, and return what this schema says of them."""
    monkeypatch.setattr(writer, "datetime", Written)
    with new_store(tmp_path / "store") as store:
        fill(store)
        return everything(store)


@pytest.fixture
def of_schema_2(tmp_path: Path, expected: dict[str, object]) -> dict[str, object]:
    """Make a store of schema 2 with rows in every table, and return what this schema says of the same rows."""
    put_database(tmp_path / "store", VERSION_2)
    return expected


@pytest.mark.parametrize("dump", [VERSION_2, VERSION_3, VERSION_4], ids=["2", "3", "4"])
def test_every_row_of_a_store_of_an_earlier_schema_survives(
    tmp_path: Path, expected: dict[str, object], dump: Path
) -> None:
    put_database(tmp_path / "store", dump)
    with new_store(tmp_path / "store") as store:
        assert everything(store) == expected
        assert [finding for finding in store.verify(read_data=True) if finding.is_problem] == []
        assert store.schema_version == migrations.newest()


def test_a_code_of_schema_3_has_no_residual_and_gets_one(tmp_path: Path, expected: dict[str, object]) -> None:
    put_database(tmp_path / "store", VERSION_3)
    with new_store(tmp_path / "store") as store:
        code = code_of(store, "rust")
        assert (code.residual, code.asked) == (None, None)
        store.replace_residual(code, NewResidual(store.put_blob(b"residual"), 0.001), Asked(max_error=0.01))
        assert code_of(store, "rust").best_error == 0.001
        assert list(store.verify(read_data=True)) == []


def test_a_moved_store_goes_on_as_one_that_was_never_old(tmp_path: Path, of_schema_2: dict[str, object]) -> None:
    with new_store(tmp_path / "store") as store:
        before = everything(store)
        store.add_evaluations([evaluation("rust")])
        assert store.add_vectors([vector(store, "rust")]) == 0
        assert {**everything(store), "evaluations": None} == {**before, "evaluations": None}
        assert len(store.evaluations()) == 4  # the one that was measured again took the place of the earlier one
        store.remove_task("rust")
        store.prune(grace=0)
        assert list(store.verify(read_data=True)) == []


def test_a_moved_store_is_several_times_smaller(tmp_path: Path, of_schema_2: dict[str, object]) -> None:
    database = tmp_path / "store" / "registry.db"
    before = database.stat().st_size
    new_store(tmp_path / "store").close()
    assert database.stat().st_size < before / 5


def page_size(root: Path) -> int:
    with closing(sqlite3.connect(root / "registry.db")) as connection:
        return int(connection.execute("PRAGMA page_size").fetchone()[0])


def test_a_store_that_could_not_be_compacted_is_compacted_by_a_later_command(
    tmp_path: Path, of_schema_2: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as killed:
        killed.setattr(Database, "compact", lambda self: None)
        new_store(tmp_path / "store").close()
    assert page_size(tmp_path / "store") == 4096
    with Store.open(tmp_path / "store", read_only=True) as store:
        assert everything(store) == of_schema_2
    assert page_size(tmp_path / "store") == PAGE_SIZE


def test_a_store_that_cannot_be_compacted_is_used_as_it_is(tmp_path: Path, of_schema_2: dict[str, object]) -> None:
    with closing(sqlite3.connect(tmp_path / "store" / "registry.db", isolation_level=None)) as connection:
        with new_store(tmp_path / "store", lock_timeout=0):
            pass
        connection.execute("PRAGMA page_size=4096")
        connection.execute("VACUUM")
        connection.execute("BEGIN IMMEDIATE")
        with new_store(tmp_path / "store", lock_timeout=0) as store:
            assert everything(store) == of_schema_2
        assert page_size(tmp_path / "store") == 4096


def add_column(connection: Connection) -> None:
    connection.exec_driver_sql("ALTER TABLE tasks ADD COLUMN extra VARCHAR")


def fail_half_way(connection: Connection) -> None:
    connection.exec_driver_sql("CREATE TABLE half (id INTEGER)")
    raise ZeroDivisionError


def test_an_old_store_is_moved_forward_with_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with new_store(tmp_path / "store") as store:
        ingest(store, "shakespeare")
    monkeypatch.setattr(migrations, "MIGRATIONS", (*migrations.MIGRATIONS, add_column))
    with new_store(tmp_path / "store") as store:
        assert store.schema_version == migrations.newest()
        assert store.task("shakespeare").name == "shakespeare"
    with new_store(tmp_path / "store") as store:  # and only once
        assert store.schema_version == migrations.newest()


def test_a_migration_that_fails_half_way_leaves_the_old_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new_store(tmp_path / "store").close()
    with monkeypatch.context() as patched:
        patched.setattr(migrations, "MIGRATIONS", (*migrations.MIGRATIONS, fail_half_way))
        with pytest.raises(ZeroDivisionError):
            new_store(tmp_path / "store")
    with new_store(tmp_path / "store") as store, closing(sqlite3.connect(store.paths.database)) as connection:
        assert store.schema_version == migrations.newest()
        assert "half" not in tables_of(connection)


def test_a_command_that_only_reads_moves_an_old_store_forward(tmp_path: Path) -> None:
    restore_version_1(tmp_path / "store")
    with Store.open(tmp_path / "store", read_only=True) as store:
        assert [task.name for task in store.tasks()] == ["shakespeare"]
        assert store.schema_version == migrations.newest()


def test_an_old_store_on_read_only_media_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    restore_version_1(tmp_path / "store")
    monkeypatch.setattr(Database, "can_be_written", lambda self: False)
    with pytest.raises(DamagedStore, match="old schema") as refused:
        Store.open(tmp_path / "store", read_only=True)
    assert "copy the store" in str(refused.value.hint)


def test_nothing_of_a_store_of_schema_1_is_evicted_or_pinned(tmp_path: Path) -> None:
    restore_version_1(tmp_path / "store")
    with new_store(tmp_path / "store") as store:
        assert not store.task("shakespeare").pinned
        assert [adapter.evicted_at for adapter in store.adapters("shakespeare")] == [None] * 3


def test_a_full_disk_gives_up_the_reserve_for_the_new_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    restore_version_1(tmp_path / "store")
    reserve, real = tmp_path / "store" / "reserve", migrations.m002_evicted_and_pinned

    def full(connection: Connection) -> None:
        real(connection)
        if reserve.exists():
            raise StoreFull("database or disk is full")

    monkeypatch.setattr(migrations, "MIGRATIONS", (full,))
    with new_store(tmp_path / "store") as store:
        assert store.schema_version == 2
    assert not reserve.exists()


def set_pragma(root: Path, pragma: str) -> bytes:
    path = root / "registry.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA {pragma}")
    return path.read_bytes()


def test_a_newer_schema_is_refused_and_not_touched(tmp_path: Path) -> None:
    new_store(tmp_path / "store").close()
    before = set_pragma(tmp_path / "store", "user_version=99")
    with pytest.raises(StoreTooNew, match="99"):
        new_store(tmp_path / "store")
    assert (tmp_path / "store" / "registry.db").read_bytes() == before


def test_the_database_of_another_program_is_refused(tmp_path: Path) -> None:
    new_store(tmp_path / "store").close()
    set_pragma(tmp_path / "store", "application_id=7")
    with pytest.raises(NotAStore):
        new_store(tmp_path / "store")
