"""Every kind of damage is found, named and repaired, and nothing is ever deleted for it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from registry.encoding import encode, files_of, unpacked
from registry.errors import DamagedStore, RegistryError, StoreTooNew, TaskNotFound
from registry.findings import Finding
from registry.manifests import Removed, Run, Task
from registry.storage.blobs.content import Blobs
from registry.store import Store
from registry.verify import MAX_REPAIRED_BYTES, corrected
from tests.registry.examples import BASE, ingest, new_store, put, task, train, vector
from tests.registry.pairs import damage, lose, overwrite
from tests.shared import paths_of


@pytest.fixture
def rust(store: Store) -> Task:
    """One of two tasks."""
    ingest(store, "html")
    return ingest(store, "rust", samples=put(store, b"samples of rust"))


def kinds(store: Store, **options: object) -> list[str]:
    return [finding.kind for finding in store.verify(**options)]  # type: ignore[arg-type]


def problems(store: Store) -> list[Finding]:
    return [finding for finding in store.verify(read_data=True) if finding.is_problem]


def flip(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


def flip_two(data: bytes) -> bytes:
    return bytes([data[0] ^ 3]) + data[1:]


def test_a_sound_store_has_no_findings(store: Store, rust: Task) -> None:
    assert kinds(store, read_data=True) == []


def test_a_missing_blob_is_found_with_the_tasks_that_need_it(store: Store, rust: Task) -> None:
    weights = rust.final.weights
    lose(store, weights)
    (finding,) = store.verify()
    place = store.blobs.place(weights)
    assert (finding.kind, finding.digest, finding.path, finding.tasks) == ("missing", weights, place, ("rust",))
    assert finding.is_problem


def test_a_checkpoint_that_a_training_replaces_during_the_check_is_no_finding(
    store: Store, twin: Store, rust: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = twin.save_run(Run(base_model=BASE, config={}, weights=put(twin, b"run weights")))
    real, saved = Blobs.all, list[Run]()

    def listed(blobs: Blobs) -> object:
        if blobs is store.blobs and not saved:  # the manifests were read before this
            saved.append(twin.save_run(replace(run, weights=put(twin, b"later weights"))))
        return real(blobs)

    monkeypatch.setattr(Blobs, "all", listed)
    assert problems(store) == []
    assert saved


def test_a_check_goes_on_after_a_missing_checkpoint_and_a_damaged_run(store: Store) -> None:
    run = store.save_run(Run(base_model=BASE, config={}, weights=put(store, b"run weights")))
    lose(store, run.weights)
    overwrite(store, str(run.manifest), flip_two)
    # The database does not know the next state, as after a kill.
    store.manifests.put(encode(replace(run, parent=run.manifest, seq=run.seq + 1)).data)
    store._state.cache_clear()
    found = {(finding.kind, finding.digest) for finding in problems(store)}
    assert found == {("digest", run.manifest), ("missing", run.weights)}


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\0", lambda data: b""])
def test_a_wrong_length_is_found_without_reading(store: Store, rust: Task, change: Callable[[bytes], bytes]) -> None:
    overwrite(store, rust.final.weights, change)
    assert kinds(store) == ["length"]


def test_wrong_bytes_are_found_by_reading(store: Store, rust: Task) -> None:
    overwrite(store, rust.final.weights, flip)
    assert kinds(store) == []
    assert kinds(store, read_data=True) == ["digest"]


def test_two_blobs_in_each_others_place_are_both_found(store: Store, rust: Task) -> None:
    mine, other = rust.final.weights, store.task("html").final.weights
    first, second = store.blobs.read(mine), store.blobs.read(other)
    overwrite(store, mine, lambda data: second)
    overwrite(store, other, lambda data: first)
    assert kinds(store, read_data=True) == ["digest", "digest"]


@pytest.mark.kept_in("folder", reason="an object store has no folders")
def test_a_folder_in_place_of_a_blob_is_found(store: Store, rust: Task) -> None:
    lose(store, rust.final.weights)
    Path(store.blobs.place(rust.final.weights)).mkdir()
    assert set(kinds(store, read_data=True)) <= {"length", "digest"}
    assert kinds(store, read_data=True) != []


@pytest.mark.kept_in("sqlite", "folder", reason="the temporary files of a store folder")
def test_an_orphan_and_a_leftover_are_named_and_are_no_problem(store: Store, rust: Task) -> None:
    store.blobs.put(b"orphan")
    (paths_of(store).tmp / "leftover").touch()
    findings = list(store.verify())
    assert [finding.kind for finding in findings] == ["orphan", "leftover"]
    assert not any(finding.is_problem for finding in findings)


def test_a_shared_blob_names_all_its_tasks(store: Store, rust: Task) -> None:
    lose(store, rust.final.config)
    (finding,) = store.verify()
    assert finding.tasks == ("html", "rust")


def test_only_the_blobs_of_the_named_tasks_are_checked(store: Store, rust: Task) -> None:
    store.blobs.put(b"orphan")
    lose(store, rust.final.weights)
    assert kinds(store, names=["html"]) == []
    assert kinds(store, names=["RUST"]) == ["missing"]


@pytest.mark.parametrize("needed", ["samples of rust", "vector", "generator", "code of rust"])
def test_all_that_a_task_needs_is_checked(store: Store, rust: Task, needed: str) -> None:
    store.update("rust", lambda known: replace(known, vectors=(vector(store),)))
    train(store, ["rust"])
    lose(store, store.blobs.put(needed.encode()))
    assert kinds(store, names=["rust"]) == ["missing"]


def test_earlier_versions_are_checked_too(store: Store, rust: Task) -> None:
    store.publish([replace(rust, version=2, final=task(store, "rust", weights=b"second").final)])
    lose(store, rust.final.weights)
    assert kinds(store) == kinds(store, names=["rust"]) == ["missing"]


def test_an_unknown_name_cannot_be_checked(store: Store) -> None:
    with pytest.raises(TaskNotFound):
        list(store.verify(names=["gone"]))


class TestLeftovers:
    """Leftovers of a killed command are no problem, and are distinguished from an old database."""

    def test_a_change_that_was_not_committed_is_a_remark(self, store: Store, rust: Task) -> None:
        state = replace(rust, note="x", parent=rust.manifest, seq=rust.seq + 1)
        store.manifests.put(encode(state).data)
        (finding,) = store.verify()
        assert (finding.kind, finding.tasks, finding.is_problem) == ("uncommitted", ("rust",), False)

    def test_so_is_one_of_an_earlier_version(self, store: Store, rust: Task) -> None:
        store.publish([replace(rust, version=2, final=task(store, "rust", weights=b"second").final)])
        store.manifests.put(encode(replace(rust, note="x", parent=rust.manifest, seq=rust.seq + 1)).data)
        (finding,) = store.verify()
        assert (finding.kind, finding.tasks, finding.is_problem) == ("uncommitted", ("rust",), False)

    def test_so_are_new_tasks_and_removals(self, store: Store, rust: Task) -> None:
        for attempt in range(2):
            store.manifests.put(encode(replace(task(store, "sql"), seq=attempt)).data)
        removal = Removed(of="task", name="rust", seq=rust.seq + 1, parent=rust.manifest)
        store.manifests.put(encode(removal).data)
        (finding,) = store.verify()
        assert (finding.kind, finding.tasks, finding.is_problem) == ("uncommitted", ("rust", "sql"), False)

    @pytest.mark.kept_in("sqlite", reason="copies the file of the database")
    def test_an_old_database_is_a_problem(self, store: Store, rust: Task) -> None:
        database = paths_of(store).database
        old = database.read_bytes()
        for note in "ab":
            store.update("rust", lambda known, note=note: replace(known, note=note))  # type: ignore[misc]
        database.write_bytes(old)
        (finding,) = store.verify()
        assert (finding.kind, finding.tasks, finding.is_problem) == ("unlisted", ("rust",), True)
        assert store.rebuild().restored == ("rust",)
        assert (store.task("rust").note, kinds(store)) == ("b", [])


class TestRepair:
    """Correcting one flipped bit, and moving other damage aside."""

    def repair(self, store: Store) -> list[str]:
        store._state.cache_clear()
        done = [store.repair(finding) for finding in store.verify(read_data=True)]
        return [result.split(" ")[0] for result in done if result is not None]

    def test_a_flipped_bit_in_a_small_file_is_corrected(self, store: Store, rust: Task) -> None:
        overwrite(store, rust.final.weights, flip)
        assert self.repair(store) == ["corrected"]
        assert kinds(store, read_data=True) == []
        assert store.blobs.read(rust.final.weights) == b"weights of rust"

    def test_a_flipped_bit_in_a_manifest_is_corrected(self, store: Store, rust: Task) -> None:
        overwrite(store, str(rust.manifest), flip)
        store._state.cache_clear()
        (finding,) = store.verify()
        assert (finding.kind, finding.tasks, finding.is_manifest) == ("digest", ("rust",), True)
        assert self.repair(store) == ["corrected"]
        assert (kinds(store, read_data=True), store.task("rust")) == ([], rust)

    @pytest.mark.parametrize(("change", "result"), [(flip, "corrected"), (flip_two, "moved")])
    def test_a_damaged_document_is_repaired_and_the_manifests_that_share_it_stay(
        self, store: Store, rust: Task, change: Callable[[bytes], bytes], result: str
    ) -> None:
        data = store.manifests.read(str(rust.manifest))
        (document,) = {str(file) for use, file in files_of(unpacked(data)) if use == "manifests"}
        right = store.blobs.read(document)
        overwrite(store, document, change)
        store._shared.cache_clear()  # type: ignore[attr-defined]
        assert self.repair(store) == [result]
        store.blobs.put(right)
        assert (kinds(store, read_data=True), store.task("rust")) == ([], rust)

    def test_other_damage_is_moved_and_kept(self, store: Store, rust: Task) -> None:
        overwrite(store, rust.final.weights, flip_two)
        assert self.repair(store) == ["moved"]
        assert kinds(store, read_data=True) == ["missing"]
        assert len(list(store.blobs.leftovers(aside=True))) == 1

    def test_a_file_that_is_no_manifest_is_moved(self, store: Store, rust: Task) -> None:
        store.manifests.put(b"not a manifest")
        (finding,) = store.verify()
        assert (finding.kind, finding.is_manifest) == ("digest", True)
        assert self.repair(store) == ["moved"]
        assert kinds(store, read_data=True) == []

    def test_a_sound_store_needs_none(self, store: Store, rust: Task) -> None:
        assert self.repair(store) == []

    def test_storing_the_original_again_makes_the_store_whole(self, store: Store, rust: Task) -> None:
        overwrite(store, rust.final.weights, flip_two)
        self.repair(store)
        put(store, b"weights of rust")
        assert kinds(store, read_data=True) == []

    @pytest.mark.parametrize("place", [0, 1, 150, 299])
    def test_a_bit_is_found_wherever_it_is(self, store: Store, place: int) -> None:
        data = random.Random(place).randbytes(300)
        spoiled = bytearray(data)
        spoiled[place] ^= 1 << place % 8
        assert corrected(bytes(spoiled), store.blobs.put(data)) == data
        assert corrected(bytes(spoiled), store.blobs.put(b"others")) is None
        assert corrected(bytes(MAX_REPAIRED_BYTES + 1), store.blobs.put(data)) is None


class TestRebuild:
    """A new database from the manifests."""

    def filled(self, store: Store) -> None:
        ingest(store, "rust", steps=[80], vectors=(vector(store),), tags=("a", "b"))
        first = ingest(store, "html")
        store.publish([replace(first, version=2, final=task(store, "html", weights=b"second").final)])
        train(store, ["rust"])
        train(store, ["html"], data=b"second generator")
        store.update_base(BASE, lambda base: replace(base, fingerprint="f00d"))
        store.save_run(Run(base_model=BASE, config={}, weights=put(store, b"run weights")))
        store.update("html@1", lambda known: replace(known, note="old"))
        ingest(store, "gone")
        store.remove(store.named(["gone"]))

    def contents(self, store: Store) -> object:
        store._state.cache_clear()
        return (
            list(store.refs()),
            [store.history(name) for name in store.names()],
            store.generators(),
            store.run(BASE),
            store.base_models(),
        )

    @pytest.mark.parametrize("statement", [
        "DELETE FROM refs", "DELETE FROM history", "UPDATE refs SET pinned = NOT pinned", "UPDATE refs SET key = name",
        "DELETE FROM refs WHERE kind = 'task'", "UPDATE refs SET kind = 'x' WHERE kind = 'base'",
        "DROP TABLE refs", "DROP TABLE history", "UPDATE refs SET name = NULL",
    ])  # fmt: skip
    def test_a_wrong_database_is_made_right(self, store: Store, statement: str) -> None:
        self.filled(store)
        before = self.contents(store)
        damage(store, statement)
        store._state.cache_clear()
        rebuilt = store.rebuild()
        assert (rebuilt.tasks, rebuilt.removed, rebuilt.lost) == (2, ("gone",), ())
        assert (self.contents(store), problems(store)) == (before, [])
        ingest(store, "later")

    @pytest.mark.kept_in("sqlite", reason="the file of the database")
    @pytest.mark.parametrize("change", ["missing", "empty", "garbage", "cut"])
    def test_a_lost_file_is_written_again(self, store: Store, change: str) -> None:
        self.filled(store)
        before, database = self.contents(store), paths_of(store).database
        data = database.read_bytes()
        database.unlink()
        if change != "missing":
            database.write_bytes(
                {"empty": b"", "garbage": b"not a database" * 100, "cut": data[:2000]}.get(change, b"")
            )
        store.close()
        with new_store(store.address) as again:
            with pytest.raises(DamagedStore) as error:
                again.names()
            assert "icm verify --repair" in str(error.value.hint)
            assert [finding.kind for finding in again.verify()] == ["database"]
            assert again.rebuild().tasks == 2
            assert (self.contents(again), problems(again)) == (before, [])

    def test_flipped_bits_in_manifests_are_corrected_first(self, store: Store) -> None:
        self.filled(store)
        before = self.contents(store)
        for info in list(store.manifests.all()):
            overwrite(store, info.digest, flip)
        damage(store, "DELETE FROM refs")
        store._state.cache_clear()
        assert store.rebuild().tasks == 2
        assert (self.contents(store), problems(store)) == (before, [])

    def test_flipped_bits_in_shared_documents_are_corrected_first(self, store: Store) -> None:
        self.filled(store)
        before = self.contents(store)
        for info in list(store.blobs.all()):
            if store.blobs.read(info.digest)[:1] == b"x":  # deflated
                overwrite(store, info.digest, flip)
        store._state.cache_clear()
        store._shared.cache_clear()  # type: ignore[attr-defined]
        assert store.rebuild().tasks == 2
        assert (self.contents(store), problems(store)) == (before, [])

    def test_a_task_without_a_manifest_is_named(self, store: Store, rust: Task) -> None:
        overwrite(store, str(rust.manifest), flip_two)
        store._state.cache_clear()
        rebuilt = store.rebuild()
        assert (rebuilt.tasks, rebuilt.lost) == (1, ("rust",))
        assert [finding.kind for finding in problems(store)] == ["digest"]
        with pytest.raises(DamagedStore):  # its files stay
            store.prune(grace=0)

    def test_an_earlier_state_is_better_than_none(self, store: Store, rust: Task) -> None:
        noted = store.update("rust", lambda known: replace(known, note="x"))
        lose(store, str(noted.manifest))
        store._state.cache_clear()
        rebuilt = store.rebuild()
        assert (rebuilt.restored, rebuilt.lost) == (("rust",), ())
        assert store.task("rust") == rust

    def test_a_wrong_name_in_the_database_is_not_called_lost(self, store: Store, rust: Task) -> None:
        damage(store, "UPDATE refs SET key = 'rusu', name = 'rusu' WHERE key = 'rust'")
        rebuilt = store.rebuild()
        assert (rebuilt.restored, rebuilt.lost) == (("rust",), ())

    def test_numbers_of_states_grow_on(self, store: Store, rust: Task) -> None:
        state = store.update("rust", lambda known: replace(known, note="x"))
        damage(store, "UPDATE meta SET seq = 0")
        store.rebuild()
        assert store.update("rust", lambda known: replace(known, note="y")).seq > state.seq


@pytest.mark.kept_in("sqlite", reason="pages of SQLite's file")
class TestDatabaseDamage:
    """A damaged database is an error or a finding, never a traceback of another library; a rebuild brings it back."""

    @pytest.mark.parametrize("seed", range(60))
    def test_a_random_change(self, tmp_path: Path, seed: int) -> None:
        with new_store(tmp_path / "store") as store:
            made = {name: ingest(store, name, steps=[80]) for name in ("rust", "html")}
            train(store, ["rust"])
            made = {name: store.task(name) for name in made}
            database = paths_of(store).database
        draw = random.Random(seed)
        database.write_bytes(spoil(database.read_bytes(), draw))
        try:
            with new_store(tmp_path / "store") as store:
                assert all(isinstance(finding, Finding) for finding in store.verify())
                list(store.rows())
        except StoreTooNew:
            pytest.fail("the format of the store is known")
        except RegistryError:
            pass
        with new_store(tmp_path / "store") as store:
            if any(finding.kind in ("database", "row", "unlisted", "uncommitted") for finding in store.verify()):
                store.rebuild()
            assert {task.name: task for task in store.tasks()} == made
            assert problems(store) == []


def spoil(data: bytes, draw: random.Random) -> bytes:
    """Cut, garble or flip a part of the bytes."""
    at = draw.randrange(len(data))
    match draw.randrange(3):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + draw.randbytes(64) + data[at + 64 :]
        case _:
            return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
