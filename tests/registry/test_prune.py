"""What prune removes, and what it must not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import ForeignKeyConstraint

from registry.errors import StoreLocked
from registry.records import GeneratorRecord
from registry.schema import Base
from registry.storage import prune as garbage
from registry.store import Store
from tests.registry.examples import BASE, evaluation, generator, ingest, new_store, vector
from tests.shared import paths_of


def fill(store: Store) -> None:
    """Put a row into every table that refers to blobs."""
    ingest(store, "rust", steps=[80], samples=b"samples", eval_data=b"eval", card=b"card")
    store.vectors.add([vector(store, "rust")])
    store.generators.add(generator(store, ["rust"]))
    run = store.runs.start(BASE, {})
    store.runs.save_checkpoint(run.id, step=1, weights=b"run weights", optimizer=b"run optimizer")


def blob_files(store: Store) -> list[str]:
    return sorted(store.blobs.sizes())


def test_every_column_that_refers_to_a_blob_is_known() -> None:
    columns = {
        f"{table.name}.{constraint.columns[0].name}"
        for table in Base.metadata.tables.values()
        for constraint in table.constraints
        if isinstance(constraint, ForeignKeyConstraint) and constraint.referred_table.name == "blobs"
    }
    assert {f"{column.class_.__tablename__}.{column.key}" for column in garbage.BLOB_COLUMNS} == columns


def test_nothing_that_a_row_refers_to_goes(store: Store) -> None:
    fill(store)
    before = blob_files(store)
    assert store.prune(grace=0) == garbage.PruneReport(0, 0, 0)
    assert blob_files(store) == before
    assert list(store.verify(read_data=True)) == []


def test_all_of_a_removed_task_goes(store: Store) -> None:
    ingest(store, "rust", steps=[80], samples=b"samples")
    store.tasks.remove(["rust"], last_copies=["rust"])
    report = store.prune(grace=0)
    assert report.blobs == 4
    assert report.freed_bytes == sum(map(len, (b"weights of rust", b"weights of rust at 80", b'{"r": 8}', b"samples")))
    assert blob_files(store) == []


def test_bytes_that_another_task_shares_stay(store: Store) -> None:
    ingest(store, "rust", weights=b"shared")
    ingest(store, "html", weights=b"shared")
    store.tasks.remove(["rust"], last_copies=["rust"])
    store.prune(grace=0)
    assert store.blobs.read(store.tasks.final("html").weights) == b"shared"


@pytest.mark.kept_in("sqlite", "folder", reason="the temporary files of a store folder")
def test_orphans_and_leftovers_go(store: Store) -> None:
    store.blobs.put(b"orphan")
    (paths_of(store).tmp / "leftover").write_bytes(b"123")
    assert store.prune(grace=0) == garbage.PruneReport(1, 1, 9)
    assert list(store.verify()) == []


@pytest.mark.kept_in("sqlite", "folder", reason="the temporary files of a store folder")
def test_young_files_stay(store: Store) -> None:
    store.blobs.put(b"orphan")
    (paths_of(store).tmp / "leftover").touch()
    assert store.prune(grace=3600) == garbage.PruneReport(0, 0, 0, young=1, young_bytes=6)
    assert len(blob_files(store)) == 1


def test_a_dry_run_says_the_same_and_removes_nothing(store: Store) -> None:
    store.blobs.put(b"orphan")
    planned = store.prune(grace=0, dry_run=True)
    assert len(blob_files(store)) == 1
    assert store.prune(grace=0) == planned


@pytest.mark.parametrize("what", ["orphan", "leftover"])
@pytest.mark.kept_in("sqlite", "folder", reason="the temporary files of a store folder")
def test_a_dry_run_passes_over_what_others_remove_once_it_is_listed(
    store: Store, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    leftover, orphan = paths_of(store).tmp / "leftover", Path(store.blobs.place(store.blobs.put(b"orphan")))
    leftover.write_bytes(b"123")
    doomed, listed, names = orphan if what == "orphan" else leftover, Path.iterdir, os.listdir

    def iterdir(folder: Path) -> Iterator[Path]:
        found = list(listed(folder))
        if folder == doomed.parent:
            doomed.unlink(missing_ok=True)
        return iter(found)

    def listdir(folder: int) -> list[str]:
        found = names(folder)
        if doomed.name in found:
            doomed.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(Path, "iterdir", iterdir)
    monkeypatch.setattr(os, "listdir", listdir)
    left = garbage.PruneReport(0, 1, 3) if what == "orphan" else garbage.PruneReport(1, 0, len(b"orphan"))
    assert store.prune(grace=0, dry_run=True) == left


def test_prune_twice_is_prune_once(store: Store) -> None:
    fill(store)
    store.tasks.remove(["rust"], last_copies=["rust"])
    store.prune(grace=0)
    assert store.prune(grace=0) == garbage.PruneReport(0, 0, 0)


def test_many_rows_go_in_several_commits(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage, "_CHUNK", 2)
    ingest(store, "rust", steps=range(7))
    store.tasks.remove(["rust"], last_copies=["rust"])
    assert store.prune(grace=0).blobs == 9
    with store._db.read() as session:
        for table in ("blobs", "documents"):
            assert session.connection().exec_driver_sql(f"SELECT count(*) FROM {table}").scalar_one() == 0


@pytest.mark.slow
def test_a_text_that_was_only_measured_on_is_not_missed_and_its_row_goes_with_the_measurement(store: Store) -> None:
    ingest(store, "rust")
    store.evaluations.add([evaluation("rust")])
    assert list(store.verify()) == []
    assert store.prune(grace=0).blobs == 0
    assert [found.data for found in store.evaluations.all()] == [evaluation("rust").data]
    store.tasks.remove(["rust"], last_copies=["rust"])
    store.prune(grace=0)
    with store._db.read() as session:
        assert session.connection().exec_driver_sql("SELECT count(*) FROM blobs").scalar_one() == 0


def test_the_file_of_a_text_that_was_only_measured_on_is_garbage(store: Store) -> None:
    ingest(store, "rust")
    digest = store.blobs.put(b"texts of a trial")
    store.evaluations.add([replace(evaluation("rust"), data=digest)])
    assert store.prune(grace=0).blobs == 1
    assert [found.data for found in store.evaluations.all()] == [digest]


def test_a_text_that_was_measured_on_first_and_ingested_later_has_its_length(store: Store) -> None:
    ingest(store, "rust")
    digest = store.blobs.put(b"texts")
    store.evaluations.add([replace(evaluation("rust"), data=digest)])
    ingest(store, "html", eval_data=b"texts")
    assert list(store.verify(read_data=True)) == []


def test_prune_does_not_run_beside_another_command(store: Store) -> None:
    with new_store(store.address, lock_timeout=0) as other, pytest.raises(StoreLocked):
        other.prune(grace=0)


def test_a_pruned_blob_can_be_stored_again(store: Store) -> None:
    ingest(store, "rust")
    store.tasks.remove(["rust"], last_copies=["rust"])
    store.prune(grace=0)
    ingest(store, "rust")
    assert list(store.verify(read_data=True)) == []


class TestDropping:
    """Deleting files that rows no longer name, right after a commit."""

    @pytest.mark.kept_in("sqlite", "folder", reason="elsewhere bytes are deleted once they are old")
    def test_a_file_goes_at_once_if_nobody_else_uses_the_store(self, store: Store) -> None:
        digest = replaced_start(store)
        assert not store.blobs.exists(digest)
        assert list(store.verify(read_data=True)) == []

    def test_a_file_stays_while_another_process_uses_the_store(self, store: Store, twin: Store) -> None:
        digest = replaced_start(store)
        assert twin.blobs.read(digest) == b"first"
        assert [(finding.kind, finding.digest) for finding in store.verify()] == [("orphan", digest)]

    @pytest.mark.kept_in("sqlite", "folder", reason="elsewhere bytes are deleted once they are old")
    def test_what_stayed_goes_with_the_next_file_that_is_dropped(self, store: Store, twin: Store) -> None:
        first = replaced_start(store)
        twin.close()
        second = current(store).start
        store.generators.set_start(current(store).id, store.blobs.put(b"third"))
        assert not store.blobs.exists(first)
        assert not store.blobs.exists(str(second))

    def test_what_stayed_goes_with_prune(self, store: Store, twin: Store) -> None:
        replaced_start(store)
        twin.close()
        assert store.prune(grace=0).blobs == 1
        assert list(store.verify(read_data=True)) == []

    def test_what_stayed_and_is_stored_again_is_not_dropped_with_the_next_file(self, store: Store, twin: Store) -> None:
        first = replaced_start(store)
        twin.close()
        again = store.blobs.put(b"first")  # to be recorded in a moment
        store.generators.set_start(current(store).id, store.blobs.put(b"third"))
        assert store.generators.set_start(current(store).id, again).start == first
        assert store.blobs.read(first) == b"first"

    def test_what_a_row_refers_to_stays(self, store: Store) -> None:
        ingest(store, "rust")
        weights = store.tasks.final("rust").weights
        garbage.drop_unreferenced(store._lock, store._db, store.blobs, [weights])
        assert store.blobs.read(weights) == b"weights of rust"

    def test_the_lock_is_shared_again_afterwards(self, store: Store) -> None:
        replaced_start(store)
        with new_store(store.address, lock_timeout=0) as other, pytest.raises(StoreLocked):
            other.prune(grace=0)


def current(store: Store) -> GeneratorRecord:
    found = store.generators.current(BASE)
    assert found is not None
    return found


def replaced_start(store: Store) -> str:
    """Replace the few-shot start of a generator and return the digest of the earlier one."""
    made = store.generators.add(generator(store))
    first = store.blobs.put(b"first")
    store.generators.set_start(made.id, first)
    store.generators.set_start(made.id, store.blobs.put(b"second"))
    return first
