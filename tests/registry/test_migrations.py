"""The schema: made once, moved forward whole, never moved back."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine

from registry.errors import DamagedStore, NotAStore, StoreTooNew, StoreTooOld
from registry.schema import Base
from registry.storage import migrations, sqlite
from registry.storage.database import Database
from registry.store import Store
from tests.registry import next_schema
from tests.registry.children import run
from tests.registry.every_row import everything, fill
from tests.registry.examples import ingest, new_store

pytestmark = pytest.mark.kept_in("sqlite", "folder", reason="files that older versions left")

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


def schema_of(root: Path) -> int:
    """Return the schema of a store, of which both its places say the same."""
    with closing(sqlite3.connect(root / "registry.db")) as connection:
        (schema,) = connection.execute("PRAGMA user_version").fetchone()
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [(str(schema),)]
        return int(schema)


def test_a_new_store_has_the_tables_that_the_classes_describe(tmp_path: Path) -> None:
    new_store(tmp_path / "store").close()
    engine = create_engine(f"sqlite:///{tmp_path / 'wanted.db'}")
    Base.metadata.create_all(engine)
    engine.dispose()
    with (
        closing(sqlite3.connect(tmp_path / "store" / "registry.db")) as made,
        closing(sqlite3.connect(tmp_path / "wanted.db")) as described,
    ):
        tables = tables_of(made)
        del tables["alembic_version"]
        assert tables == tables_of(described)


def test_a_new_store_has_the_newest_schema(tmp_path: Path) -> None:
    new_store(tmp_path / "store").close()
    assert schema_of(tmp_path / "store") == Database.newest_schema


def test_the_newest_schema_is_the_one_last_revision() -> None:
    scripts = ScriptDirectory(str(migrations.HERE))
    assert scripts.get_heads() == [str(Database.newest_schema)]
    assert [script.revision for script in scripts.walk_revisions()][-1] == str(sqlite.SqliteDatabase.first_schema)


def test_revisions_are_found_wherever_icm_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "100% (a, b): c" / "migrations"
    place.parent.mkdir()
    place.symlink_to(migrations.HERE)
    monkeypatch.setattr(migrations, "HERE", place)
    monkeypatch.setattr(migrations, "VERSIONS", [place / "versions"])
    new_store(tmp_path / "store").close()
    assert schema_of(tmp_path / "store") == Database.newest_schema


@pytest.fixture
def old_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, object]]:
    """A store with rows in every table, which a newer schema has left behind, and all that is to be known of it."""
    with new_store(tmp_path / "store") as store:
        fill(store)
        known = everything(store)
    next_schema.have_it(monkeypatch, tmp_path / "versions")
    return tmp_path / "store", known


@pytest.mark.parametrize("read_only", [True, False])
def test_an_old_store_keeps_everything(
    old_store: tuple[Path, dict[str, object]], read_only: bool, tmp_path: Path
) -> None:
    root, known = old_store

    def check() -> None:
        next_schema.describe_it()
        with Store.open(root, read_only=read_only) as store:
            assert everything(store) == known
            assert list(store.verify(read_data=True)) == []

    assert run(check) == 0
    assert schema_of(root) == next_schema.NUMBER


def test_a_row_that_was_wrong_before_is_wrong_after(old_store: tuple[Path, dict[str, object]], tmp_path: Path) -> None:
    root, _ = old_store
    with closing(sqlite3.connect(root / "registry.db")) as connection, connection:
        connection.execute("UPDATE tasks SET pinned = 1 - pinned WHERE name = 'rust'")

    def check() -> None:
        next_schema.describe_it()
        with Store.open(root) as store:
            (found,) = store.verify()
            assert "rust" in found.message or found.tasks == ("rust",)

    assert run(check) == 0
    assert schema_of(root) == next_schema.NUMBER


def test_what_is_written_after_a_column_came_has_right_checks(
    old_store: tuple[Path, dict[str, object]], tmp_path: Path
) -> None:
    root, _ = old_store

    def check() -> None:
        next_schema.describe_it()
        with new_store(root) as store:
            store.tasks.edit(["rust"], note="changed")
            ingest(store, "new")
            assert list(store.verify(read_data=True)) == []

    assert run(check) == 0


def test_many_commands_move_an_old_store_at_once(old_store: tuple[Path, dict[str, object]]) -> None:
    root, _ = old_store

    def opened(_: int) -> None:
        Store.open(root, read_only=True).close()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(opened, range(4)))
    assert schema_of(root) == next_schema.NUMBER


def test_threads_move_stores_of_their_own_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    roots = [tmp_path / f"store{number}" for number in range(8)]
    for root in roots:
        with new_store(root) as store:
            ingest(store, "rust")
    next_schema.have_it(monkeypatch, tmp_path / "versions")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda root: Store.open(root).close(), roots))
    for root in roots:
        assert schema_of(root) == next_schema.NUMBER
        with closing(sqlite3.connect(root / "registry.db")) as connection:
            assert connection.execute("SELECT extra FROM tasks").fetchall() == [("rust",)]


def test_who_has_a_store_open_writes_nothing_once_a_newer_icm_has_moved_it(tmp_path: Path) -> None:
    root = tmp_path / "store"
    with new_store(root) as store:
        ingest(store, "rust")
        with pytest.MonkeyPatch.context() as patch:
            next_schema.have_it(patch, tmp_path / "versions")
            Store.open(root).close()
        before = (root / "registry.db").read_bytes()
        with pytest.raises(StoreTooNew):
            ingest(store, "html")
        assert (root / "registry.db").read_bytes() == before


def test_a_migration_that_fails_half_way_leaves_the_old_schema(tmp_path: Path) -> None:
    root = tmp_path / "store"
    new_store(root).close()
    with pytest.MonkeyPatch.context() as patch:
        next_schema.have_it(patch, tmp_path / "versions", next_schema.fail_half_way)
        with pytest.raises(ZeroDivisionError):
            new_store(root)
    new_store(root).close()
    assert schema_of(root) == Database.newest_schema
    with closing(sqlite3.connect(root / "registry.db")) as connection:
        assert "half" not in tables_of(connection)


def test_an_old_store_on_read_only_media_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new_store(tmp_path / "store").close()
    next_schema.have_it(monkeypatch, tmp_path / "versions")
    monkeypatch.setattr(sqlite, "can_be_written", lambda path: False)
    with pytest.raises(DamagedStore, match="old schema") as refused:
        Store.open(tmp_path / "store", read_only=True)
    assert "copy the store" in str(refused.value.hint)


def test_a_full_disk_gives_up_the_reserve_for_the_new_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new_store(tmp_path / "store").close()
    next_schema.have_it(monkeypatch, tmp_path / "versions", next_schema.need_the_reserve)
    new_store(tmp_path / "store").close()
    assert schema_of(tmp_path / "store") == next_schema.NUMBER
    assert not (tmp_path / "store" / "reserve").exists()


def run_sql(root: Path, *statements: str) -> None:
    with closing(sqlite3.connect(root / "registry.db")) as connection, connection:
        for statement in statements:
            connection.execute(statement)


def test_a_store_from_before_alembic_is_opened_and_moved_as_its_file_says(
    old_store: tuple[Path, dict[str, object]], tmp_path: Path
) -> None:
    root, _ = old_store
    run_sql(root, "DROP TABLE alembic_version")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Database, "newest_schema", next_schema.NUMBER - 1)
        with new_store(root) as store:
            assert list(store.verify()) == []
    new_store(root).close()
    assert schema_of(root) == next_schema.NUMBER


def test_a_schema_that_two_places_do_not_agree_on_is_neither_believed_nor_moved(tmp_path: Path) -> None:
    root = tmp_path / "store"
    with new_store(root) as store:
        fill(store)
    before = set_pragma(root, "user_version=8")
    with pytest.raises(DamagedStore, match=f"records two schemas: 8 and {Database.newest_schema}"):
        new_store(root)
    assert (root / "registry.db").read_bytes() == before


@pytest.mark.parametrize("wrong", ["UPDATE alembic_version SET version_num = '8'", "DELETE FROM alembic_version"])
def test_verify_finds_what_is_wrong_with_the_noted_schema(tmp_path: Path, wrong: str) -> None:
    new_store(tmp_path / "store").close()
    run_sql(tmp_path / "store", wrong)
    with new_store(tmp_path / "store") as store:
        (found,) = store.verify()
        assert "alembic_version" in found.message


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
    with pytest.raises(StoreTooOld, match="has schema 7; this icm supports schema 8 and later") as refused:
        new_store(tmp_path / "store")
    assert "ingest the adapters again" in str(refused.value.hint)
    assert (tmp_path / "store" / "registry.db").read_bytes() == before


def test_the_database_of_another_program_is_refused(tmp_path: Path) -> None:
    new_store(tmp_path / "store").close()
    set_pragma(tmp_path / "store", "application_id=7")
    with pytest.raises(NotAStore):
        new_store(tmp_path / "store")
