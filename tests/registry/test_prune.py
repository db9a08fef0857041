"""Prune deletes garbage, and nothing else."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from registry.encoding import encode, unpacked
from registry.errors import DamagedStore, StoreLocked
from registry.manifests import Removed, Run
from registry.reachability import PruneReport, walk
from registry.store import Store
from registry.tables import packed_files
from tests.registry.children import KILLED, run
from tests.registry.examples import BASE, ingest, new_store, put, task, train, vector
from tests.registry.pairs import damage, lose, overwrite
from tests.shared import paths_of

NOTHING = PruneReport(blobs=0, manifests=0, temporary_files=0, freed_bytes=0)


def fill(store: Store) -> None:
    """Publish a state of every kind."""
    files = {"samples": put(store, b"samples"), "eval_data": put(store, b"eval")}
    ingest(store, "rust", steps=[80], **files, vectors=(vector(store),))
    train(store, ["rust"])
    store.update_base(BASE, lambda base: replace(base, fingerprint="f00d"))
    store.save_run(Run(base_model=BASE, config={}, weights=put(store, b"run weights"), codes=(put(store, b"codes"),)))
    store.prune(grace=0)


def files_of(store: Store) -> set[str]:
    return {info.digest for place in (store.blobs, store.manifests) for info in place.all()}


def put_state(store: Store, state: Removed) -> None:
    """Store a manifest as a command does that is killed before it commits."""
    store.manifests.put(encode(state).data)


def test_nothing_that_a_ref_reaches_is_deleted(store: Store) -> None:
    fill(store)
    before = files_of(store)
    assert store.prune(grace=0) == NOTHING
    assert files_of(store) == before
    assert list(store.verify(read_data=True)) == []


def test_all_of_a_removed_task_is_deleted(store: Store) -> None:
    ingest(store, "rust", steps=[80], samples=put(store, b"samples"))
    store.remove(store.named(["rust"]))
    report = store.prune(grace=0)
    assert (report.blobs, report.manifests) == (5, 2)  # with the document of its layout; a state, and its removal
    assert files_of(store) == set()


def test_versions_are_kept_and_earlier_states_are_not(store: Store) -> None:
    first = ingest(store, "rust")
    second = replace(first, version=2, final=task(store, "rust", weights=b"second").final)
    store.publish([second])
    noted = store.update("rust", lambda known: replace(known, note="x"))
    report = store.prune(grace=0)
    assert (report.blobs, report.manifests) == (0, 1)
    assert [one.manifest for one in store.history("rust")] == [first.manifest, noted.manifest]
    assert store.blobs.read(store.task("rust@1").final.weights) == b"weights of rust"


def test_an_earlier_version_that_was_changed_last_keeps_its_state(store: Store) -> None:
    first = ingest(store, "rust")
    store.publish([replace(first, version=2, final=task(store, "rust", weights=b"second").final)])
    store.update("rust@1", lambda known: replace(known, note="once"))
    store.update("rust@1", lambda known: replace(known, note="twice"))
    found = walk(store)
    assert (len(found.garbage), found.newer) == (2, [])
    store.prune(grace=0)
    assert [one.note for one in store.history("rust")] == ["twice", None]


def test_bytes_that_another_task_shares_stay(store: Store) -> None:
    ingest(store, "rust", weights=b"shared")
    ingest(store, "html", weights=b"shared")
    store.remove(store.named(["rust"]))
    store.prune(grace=0)
    assert store.blobs.read(store.task("html").final.weights) == b"shared"


@pytest.mark.kept_in("sqlite", "folder", reason="the temporary files of a store folder")
def test_orphans_and_leftovers_are_deleted(store: Store) -> None:
    store.blobs.put(b"orphan")
    (paths_of(store).tmp / "leftover").write_bytes(b"123")
    assert store.prune(grace=0) == replace(NOTHING, blobs=1, temporary_files=1, freed_bytes=9)
    assert list(store.verify()) == []


@pytest.mark.kept_in("sqlite", "folder", reason="the temporary files of a store folder")
def test_young_files_stay(store: Store) -> None:
    store.blobs.put(b"orphan")
    (paths_of(store).tmp / "leftover").touch()
    assert store.prune(grace=3600) == replace(NOTHING, young=1, young_bytes=6)


def test_a_dry_run_reports_the_same_and_deletes_nothing(store: Store) -> None:
    fill(store)
    store.remove(store.named(["rust"]))
    train(store, data=b"second generator")
    before = files_of(store)
    planned = store.prune(grace=0, dry_run=True)
    assert (files_of(store), planned.generators) == (before, 1)
    assert store.prune(grace=0) == planned
    assert store.prune(grace=0) == NOTHING


def test_prune_does_not_run_beside_another_command(store: Store) -> None:
    with new_store(store.address, lock_timeout=0) as other, pytest.raises(StoreLocked):
        other.prune(grace=0)


def test_a_pruned_blob_can_be_stored_again(store: Store) -> None:
    ingest(store, "rust")
    store.remove(store.named(["rust"]))
    store.prune(grace=0)
    ingest(store, "rust")
    assert list(store.verify(read_data=True)) == []


class TestRemovals:
    """The manifest of a removal stays as long as states of the task do."""

    @pytest.mark.kept_in("sqlite", "folder", reason="the age of a file")
    def test_a_removal_outlives_what_it_removed(self, store: Store) -> None:
        state = ingest(store, "rust")
        store.remove(store.named(["rust"]))
        files = {info.digest: info for info in store.manifests.all()}
        (removal,) = files.keys() - {state.manifest}
        os.utime(store.manifests.place(removal), (0, 0))  # as in a copy of the folder
        store.prune(grace=3600)
        assert store.manifests.exists(removal)
        assert store.rebuild().removed == ("rust",)

    @pytest.mark.parametrize("point", ["manifests-deleted", "blob-unlinked"])
    @pytest.mark.kept_in("sqlite", "folder", reason="forks, and unlinks files")
    def test_a_killed_prune_brings_nothing_back(self, store: Store, point: str) -> None:
        fill(store)
        store.remove(store.named(["rust"]))
        address = store.address
        store.close()

        def prune() -> None:
            with new_store(address) as child:
                child.prune(grace=0)

        assert run(prune, failpoint=point) == KILLED
        with new_store(address) as opened:
            assert opened.rebuild().tasks == 0
            assert [one for one in opened.verify(read_data=True) if one.is_problem] == []
            opened.prune(grace=0)

    def test_a_name_can_be_used_again(self, store: Store) -> None:
        ingest(store, "rust")
        store.remove(store.named(["rust"]))
        again = ingest(store, "rust", weights=b"others")
        report = store.prune(grace=0)
        assert (report.manifests, report.unlisted) == (2, ())
        assert store.rebuild().tasks == 1
        assert store.task("rust").manifest == again.manifest

    def test_one_that_was_not_committed_removes_nothing(self, store: Store) -> None:
        state = ingest(store, "rust")
        put_state(store, Removed(of="task", name="rust", seq=state.seq + 1, parent=state.manifest))
        assert store.prune(grace=0).unlisted == ("rust",)
        assert store.blobs.read(store.task("rust").final.weights) == b"weights of rust"


class TestUnknownStates:
    """States that the database does not name are deleted only if it has had its say about them."""

    def test_newer_states_stay_with_their_files(self, store: Store) -> None:
        before = ingest(store, "rust")
        newer = store.update("rust", lambda known: replace(known, samples=put(store, b"samples")))
        damage(store, "UPDATE refs SET manifest = " + literal(store, str(before.manifest)))
        files = literal(store, packed_files(unpacked(store.manifests.read(str(before.manifest)))).hex())
        damage(store, f"UPDATE history SET manifest = {literal(store, str(before.manifest))}, files = {files}")
        report = store.prune(grace=0)
        assert (report.manifests, report.unlisted) == (0, ("rust",))
        assert store.blobs.read(str(newer.samples)) == b"samples"

    def test_a_task_that_was_never_committed_stays(self, store: Store) -> None:
        store.manifests.put(encode(replace(task(store, "rust"), seq=1)).data)
        assert store.prune(grace=0).unlisted == ("rust",)
        assert len(list(store.blobs.all())) == 2

    def test_a_state_that_lost_a_race_is_deleted(self, store: Store) -> None:
        first = ingest(store, "rust")
        second = store.update("rust", lambda known: replace(known, note="mine"))
        loser = replace(first, note="theirs", parent=first.manifest, seq=second.seq + 1000)
        store.manifests.put(encode(loser).data)
        report = store.prune(grace=0)
        assert (report.manifests, report.unlisted) == (2, ())

    def test_a_version_that_the_history_has_lost_stays(self, store: Store) -> None:
        first = ingest(store, "rust")
        store.publish([replace(first, version=2, final=task(store, "rust", weights=b"second").final)])
        store.update("rust@1", lambda known: replace(known, note="x"))
        damage(store, "DELETE FROM history WHERE version = 1")
        assert store.prune(grace=0).unlisted == ("rust",)
        assert store.blobs.exists(first.final.weights)
        store.rebuild()
        assert store.task("rust@1").note == "x"

    @pytest.mark.parametrize("statement", [
        "UPDATE refs SET pinned = NOT pinned WHERE kind = 'task'",
        "UPDATE refs SET key = 'ruts' WHERE kind = 'task'",
        "UPDATE refs SET kind = 'tasl' WHERE kind = 'task'",
        "UPDATE refs SET original_bytes = 0 WHERE kind = 'task'",
        "DELETE FROM refs WHERE kind = 'task'",
        "DELETE FROM history WHERE kind = 'task'",
        "UPDATE history SET version = 2 WHERE kind = 'task'",
        "UPDATE history SET key = 'ruts' WHERE kind = 'task'",
        "UPDATE history SET files = substr(files, 10) WHERE kind = 'task'",
        "UPDATE refs SET version = 2 WHERE kind = 'task'",
        "DELETE FROM meta",
    ])  # fmt: skip
    def test_nothing_is_deleted_if_the_database_disagrees(self, store: Store, statement: str) -> None:
        fill(store)
        orphan = store.blobs.put(b"orphan")
        damage(store, statement)
        with pytest.raises(DamagedStore) as error:
            store.prune(grace=0)
        assert "icm verify --repair" in str(error.value.hint)
        assert store.blobs.exists(orphan)

    @pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: bytes([data[0] ^ 1]) + data[1:]])
    @pytest.mark.parametrize("is_current", [True, False])
    def test_nothing_is_deleted_if_a_manifest_cannot_be_read(
        self, store: Store, change: object, is_current: bool
    ) -> None:
        first = ingest(store, "rust")
        second = store.update("rust", lambda known: replace(known, note="x"))
        orphan = store.blobs.put(b"orphan")
        overwrite(store, str((second if is_current else first).manifest), change)  # type: ignore[arg-type]
        store._state.cache_clear()
        with pytest.raises(DamagedStore, match="cannot be read"):
            store.prune(grace=0)
        assert store.blobs.exists(orphan)

    def test_a_missing_manifest_too(self, store: Store) -> None:
        fill(store)
        lose(store, str(store.task("rust").manifest))
        store._state.cache_clear()
        with pytest.raises(DamagedStore, match="cannot be read"):
            store.prune(grace=0)


class TestFree:
    """Deleting the files of some tasks right after a command; elsewhere than in a folder, young ones stay."""

    @pytest.mark.kept_in("sqlite", "folder", reason="elsewhere bytes are deleted once they are old")
    def test_a_removed_task_is_freed_at_once(self, store: Store) -> None:
        ingest(store, "rust", steps=[80])
        ingest(store, "html")
        store.update("rust", lambda known: replace(known, note="x"))
        store.remove(store.named(["rust"]))
        assert (store.free(names=["RUST"]) or 0) > 0
        assert store.prune(grace=0) == NOTHING
        assert list(store.verify(read_data=True)) == []

    def test_a_file_that_is_needed_stays(self, store: Store) -> None:
        weights = ingest(store, "rust").final.weights
        assert store.free([weights]) == 0
        assert store.blobs.read(weights) == b"weights of rust"

    def test_other_garbage_stays(self, store: Store) -> None:
        orphan, weights = store.blobs.put(b"orphan"), ingest(store, "rust", weights=b"shared").final.weights
        store.remove(store.named(["rust"]))
        store.free([weights])
        assert store.blobs.exists(orphan)

    def test_nothing_is_freed_while_another_process_uses_the_store(self, store: Store) -> None:
        ingest(store, "rust")
        with new_store(store.address, lock_timeout=0) as other:
            other.remove(other.named(["rust"]))
            assert other.free(names=["rust"]) is None
        assert store.prune(grace=0).blobs > 0

    def test_nothing_is_freed_if_the_database_disagrees(self, store: Store) -> None:
        ingest(store, "rust")
        ingest(store, "html")
        store.remove(store.named(["rust"]))
        damage(store, "UPDATE refs SET pinned = NOT pinned")
        with pytest.raises(DamagedStore):
            store.free(names=["rust"])


def literal(store: Store, digest: str) -> str:
    """Return a digest as both databases write it in SQL."""
    return f"x'{digest}'" if store.parts.database.place.endswith(".db") else f"decode('{digest}', 'hex')"


class TestAdopted:
    """States of another store, which are older than the removal of the same name here."""

    def test_a_removal_does_not_count_for_them(self, store: Store, tmp_path: Path) -> None:
        with new_store(tmp_path / "other") as other:
            state = ingest(other, "rust")
        ingest(store, "rust")
        store.remove(store.named(["rust"]))
        task(store, "rust")  # its blobs
        store.adopt([state])
        assert (store.prune(grace=0).unlisted, list(store.verify())) == ((), [])
        assert store.rebuild().tasks == 1
        assert store.task("rust").final == state.final

    def test_elsewhere_they_keep_their_manifests(self, store: Store, tmp_path: Path) -> None:
        with new_store(tmp_path / "other") as other:
            state = ingest(other, "rust")
        task(store, "rust")
        store.adopt([state])
        assert store.task("rust").manifest == state.manifest


def test_a_new_task_does_not_take_the_place_of_one_that_the_database_hides(store: Store) -> None:
    state = ingest(store, "rust")
    damage(store, "DELETE FROM refs WHERE key = 'rust'")
    with pytest.raises(DamagedStore, match="has versions of task 'rust' but no ref"):
        ingest(store, "rust", weights=b"others")
    store.rebuild()
    assert store.task("rust") == state


@pytest.mark.kept_in("sqlite", "folder", reason="forks, and loses the file of the database")
@pytest.mark.parametrize("point", ["blob-staged", "blob-renamed", "blobs-durable", "rows-before-commit"])
def test_a_killed_renaming_hides_no_task(store: Store, point: str) -> None:
    first = ingest(store, "rust")
    store.publish([replace(first, version=2, final=task(store, "rust", weights=b"second").final)])
    address = store.address
    store.close()

    def rename() -> None:
        with new_store(address) as child:
            new = [replace(one, name="moved", manifest=None) for one in child.history("rust")]
            child.publish(new, remove=[child.task("rust")])

    assert run(rename, failpoint=point) == KILLED
    with new_store(address) as opened:
        assert [one for one in opened.verify(read_data=True) if one.is_problem] == []
        paths_of(opened).database.unlink()
        opened.rebuild()
        assert opened.names() in (["rust"], ["moved"], ["moved", "rust"])
        opened.prune(grace=0)
        for name in opened.names():
            assert opened.blobs.read(opened.task(name).final.weights) in (b"second", b"weights of rust")
        assert opened.blobs.exists(first.final.weights)
