"""Rows say when they are not what was written: however they are read, changed or deleted."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from registry import schema as models
from registry.errors import DamagedRow
from registry.records import Extra
from registry.row_checks import COLUMNS_OF, columns_of
from registry.store import Store
from tests.registry.every_row import fill
from tests.registry.examples import code_of, evaluation, new_store, offer
from tests.registry.pairs import DEFAULT, damage, pair

TABLES = sorted(models.Base.metadata.tables)


def wrong(store: Store) -> list[tuple[str, tuple[str, ...]]]:
    return [(finding.message, finding.tasks) for finding in store.verify() if finding.kind == "row"]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a row in each of the tables."""
    root = tmp_path_factory.mktemp("template") / "store"
    with new_store(root) as store:
        fill(store)
    return root


@pytest.fixture
def filled(template: Path, tmp_path: Path) -> Iterator[Store]:
    if pair.name == DEFAULT:
        shutil.copytree(template, tmp_path / "store")
    with new_store(tmp_path / "store") as store:
        if pair.name != DEFAULT:
            fill(store)
        yield store


def test_a_check_takes_the_columns_of_the_classes_in_their_order() -> None:
    of_classes = {name: tuple(columns_of(table)) for name, table in models.Base.metadata.tables.items()}
    assert of_classes == COLUMNS_OF


@pytest.mark.parametrize("table", TABLES)
def test_every_row_that_icm_writes_has_its_check(filled: Store, table: str) -> None:
    with filled._db.columns() as columns:
        assert columns.execute(f"SELECT count(*) FROM {table} WHERE crc IS NULL").fetchone() == (0,)
    assert wrong(filled) == []


@pytest.mark.parametrize(
    ("statement", "read"),
    [
        ("UPDATE tasks SET pinned = FALSE", lambda store: store.tasks.get("rust")),
        ("UPDATE adapters SET step = step + 1", lambda store: store.tasks.adapters("rust")),
        ("UPDATE adapters SET evicted_at = 0", lambda store: store.tasks.origins().named(["rust"])),
        ("UPDATE blobs SET size = size + 1", lambda store: store.tasks.final("rust")),
        ("UPDATE codes SET dw_error = dw_error / 2", lambda store: code_of(store, "rust")),
        ("UPDATE evaluations SET retained_gain = 0.98", lambda store: store.evaluations.all()),
        ("UPDATE generators SET version = version + 8", lambda store: store.generators.all()),
        ("UPDATE task_vectors SET dim = 65", lambda store: store.vectors.all("rust")),
        ("UPDATE base_models SET path = '/models/bases'", lambda store: store.base_models.all()),
        ("UPDATE train_runs SET step = 3", lambda store: store.runs.running("example/base-model")),
        ("UPDATE codes SET crc = NULL", lambda store: code_of(store, "rust")),
    ],
)
def test_a_row_that_changed_is_not_read(filled: Store, statement: str, read: Callable[[Store], object]) -> None:
    damage(filled, statement)
    with pytest.raises(DamagedRow, match="checksum mismatch in row"):
        read(filled)
    assert wrong(filled) != []


def test_a_wrong_row_is_named_with_its_task(filled: Store) -> None:
    damage(filled, "UPDATE tasks SET pinned = NOT pinned WHERE name = 'rust'")
    assert wrong(filled) == [("checksum mismatch in row 1 of tasks", ("rust",))]


@pytest.mark.kept_in("sqlite", reason="PostgreSQL takes no such text")
def test_text_that_is_none_is_named_and_the_other_rows_are_checked(filled: Store) -> None:
    damage(filled, "UPDATE tasks SET folder = CAST(x'ff61' AS TEXT) WHERE id = 1")
    damage(filled, "UPDATE tasks SET pinned = NOT pinned WHERE id = 2")
    unreadable, changed = wrong(filled)
    assert "cannot be read" in unreadable[0]
    assert changed[0].startswith("checksum mismatch in row 2 of tasks")


def test_a_wrong_row_is_not_made_right_by_a_change(filled: Store) -> None:
    damage(filled, "UPDATE evaluations SET retained_gain = 0.99")
    with pytest.raises(DamagedRow, match="neither changed nor deleted"):
        filled.evaluations.add([evaluation("rust")])
    assert wrong(filled) != []


def test_nothing_is_deleted_while_a_row_is_wrong(filled: Store) -> None:
    orphan = filled.blobs.put(b"orphan")
    damage(filled, "UPDATE task_vectors SET dim = 65")
    filled.close()
    with new_store(filled.address) as store:
        deletions = [lambda: store.prune(grace=0), lambda: store.tasks.remove(["sql"])]
        # In a remote place young bytes stay, so what an eviction leaves there is nothing unusual.
        deletions += [] if store.blobs.is_remote else [store.originals.interrupted]
        for delete in deletions:
            with pytest.raises(DamagedRow, match="deletes nothing"):
                delete()
        assert store.blobs.exists(orphan)


def test_an_extra_that_is_gone_or_another_ones_is_missed(store: Store) -> None:
    for name in ("rust", "html"):
        task = offer(store, name)
        extra = Extra(store.blobs.put(b"tokens"), f"{name}.json", 6, 6)
        store.tasks.ingest([replace(task, adapters=[replace(task.adapters[0], extras=[extra])])])
    damage(store, "DELETE FROM extras WHERE file = 'rust.json'")
    with pytest.raises(DamagedRow, match="has 0 extras, but 1 were recorded"):
        store.tasks.final("rust")
    assert store.tasks.final("html").extras[0].file == "html.json"


def test_the_others_are_listed_where_somebody_is_told(filled: Store) -> None:
    damage(filled, "UPDATE codes SET bits = bits + 8 WHERE task_id = (SELECT id FROM tasks WHERE name = 'rust')")
    told = dict[str, str]()
    with Store.open(filled.address, on_damage=lambda task, error: told.update({task: error.message})) as store:
        assert [row.task.name for row in store.tasks.summaries()] == ["HTML", "sql"]
    assert list(told) == ["rust"]


def test_figures_out_of_range_are_not_kept(filled: Store) -> None:
    filled.evaluations.add([replace(evaluation("rust"), retained_gain=3.7e63, squared_error=-1.0)])
    (found,) = filled.evaluations.all("rust")[-1:]
    assert (found.retained_gain, found.squared_error) == (None, None)


@pytest.mark.parametrize(
    ("statement", "fact"),
    [
        ("UPDATE codes SET bits = bits + 8", "the recorded length"),
        ("UPDATE tasks SET base_model_id = 3 - base_model_id", "another base model"),
        ("UPDATE codes SET adapter_id = 1", "of another task"),
    ],
)
def test_what_is_known_twice_is_compared(filled: Store, statement: str, fact: str) -> None:
    damage(filled, statement)
    assert any(fact in message for message, _ in wrong(filled))
