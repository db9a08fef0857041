"""The schema: made once, moved forward whole, never moved back."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import Connection, create_engine

from registry.errors import DamagedStore, NotAStore, StoreFull, StoreTooNew, StoreTooOld
from registry.schema import Base
from registry.storage import sqlite as migrations
from registry.store import Store
from tests.registry.every_row import everything, fill
from tests.registry.examples import ingest, new_store
from tests.shared import paths_of

pytestmark = pytest.mark.kept_in("sqlite", "folder", reason="files that older versions left")


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


def schema_of(store: Store) -> int:
    with closing(sqlite3.connect(paths_of(store).database)) as connection:
        return int(connection.execute("PRAGMA user_version").fetchone()[0])


def test_a_new_store_has_the_tables_that_the_classes_describe(store: Store, tmp_path: Path) -> None:
    wanted = tmp_path / "wanted.db"
    engine = create_engine(f"sqlite:///{wanted}")
    Base.metadata.create_all(engine)
    engine.dispose()
    with closing(sqlite3.connect(paths_of(store).database)) as made, closing(sqlite3.connect(wanted)) as described:
        assert tables_of(made) == tables_of(described)


def test_a_new_store_has_the_newest_schema(store: Store) -> None:
    assert schema_of(store) == migrations.newest()


def add_column(connection: Connection) -> None:
    connection.exec_driver_sql("ALTER TABLE tasks ADD COLUMN extra VARCHAR")


def fail_half_way(connection: Connection) -> None:
    connection.exec_driver_sql("CREATE TABLE half (id INTEGER)")
    raise ZeroDivisionError


@pytest.fixture
def old_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, object]]:
    """A store with rows in every table, which a newer schema has left behind, and all that is to be known of it."""
    with new_store(tmp_path / "store") as store:
        fill(store)
        known = everything(store)
    monkeypatch.setattr(migrations, "MIGRATIONS", (*migrations.MIGRATIONS, add_column))
    return tmp_path / "store", known


@pytest.mark.parametrize("read_only", [True, False])
def test_an_old_store_keeps_everything(old_store: tuple[Path, dict[str, object]], read_only: bool) -> None:
    root, known = old_store
    with Store.open(root, read_only=read_only) as store:
        assert schema_of(store) == migrations.newest()
        assert everything(store) == known
        assert list(store.verify(read_data=True)) == []


def test_many_commands_move_an_old_store_at_once(old_store: tuple[Path, dict[str, object]]) -> None:
    root, known = old_store
    with ThreadPoolExecutor(4) as pool:
        versions = list(pool.map(lambda _: schema_read_from(root), range(4)))
    assert versions == [migrations.newest()] * 4
    with Store.open(root, read_only=True) as store:
        assert everything(store) == known


def schema_read_from(root: Path) -> int:
    with Store.open(root, read_only=True) as store:
        return schema_of(store)


def test_a_migration_that_fails_half_way_leaves_the_old_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new_store(tmp_path / "store").close()
    with monkeypatch.context() as patched:
        patched.setattr(migrations, "MIGRATIONS", (*migrations.MIGRATIONS, fail_half_way))
        with pytest.raises(ZeroDivisionError):
            new_store(tmp_path / "store")
    with new_store(tmp_path / "store") as store, closing(sqlite3.connect(paths_of(store).database)) as connection:
        assert schema_of(store) == migrations.newest()
        assert "half" not in tables_of(connection)


def test_a_command_that_only_reads_moves_an_old_store_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with new_store(tmp_path / "store") as store:
        ingest(store, "shakespeare")
    monkeypatch.setattr(migrations, "MIGRATIONS", (*migrations.MIGRATIONS, add_column))
    with Store.open(tmp_path / "store", read_only=True) as store:
        assert [task.name for task in store.tasks.all()] == ["shakespeare"]
        assert schema_of(store) == migrations.newest()


def test_an_old_store_on_read_only_media_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new_store(tmp_path / "store").close()
    monkeypatch.setattr(migrations, "MIGRATIONS", (*migrations.MIGRATIONS, add_column))
    monkeypatch.setattr(migrations, "can_be_written", lambda path: False)
    with pytest.raises(DamagedStore, match="old schema") as refused:
        Store.open(tmp_path / "store", read_only=True)
    assert "copy the store" in str(refused.value.hint)


def test_a_full_disk_gives_up_the_reserve_for_the_new_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new_store(tmp_path / "store").close()
    reserve = tmp_path / "store" / "reserve"

    def full(connection: Connection) -> None:
        add_column(connection)
        if reserve.exists():
            raise StoreFull("database or disk is full")

    monkeypatch.setattr(migrations, "MIGRATIONS", (*migrations.MIGRATIONS, full))
    with new_store(tmp_path / "store") as store:
        assert schema_of(store) == migrations.newest()
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


def test_a_schema_from_before_the_first_release_is_refused_and_not_touched(tmp_path: Path) -> None:
    new_store(tmp_path / "store").close()
    before = set_pragma(tmp_path / "store", "user_version=7")
    with pytest.raises(StoreTooOld, match="has schema 7; this icm begins with schema 8") as refused:
        new_store(tmp_path / "store")
    assert "ingest the adapters again" in str(refused.value.hint)
    assert (tmp_path / "store" / "registry.db").read_bytes() == before


def test_the_database_of_another_program_is_refused(tmp_path: Path) -> None:
    new_store(tmp_path / "store").close()
    set_pragma(tmp_path / "store", "application_id=7")
    with pytest.raises(NotAStore):
        new_store(tmp_path / "store")
