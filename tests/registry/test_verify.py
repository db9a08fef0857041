"""Every kind of damage is found and named, and nothing is ever deleted for it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from registry.errors import DamagedStore, MissingBlob, RegistryError, TaskNotFound
from registry.storage.blobs.content import Blobs
from registry.store import Store
from registry.verify import Finding
from tests.registry.examples import BASE, code, code_of, generator, ingest, new_store, vector
from tests.registry.pairs import damage, lose, overwrite
from tests.shared import paths_of


@pytest.fixture
def weights(store: Store) -> str:
    """The digest of the weights of one of two tasks."""
    ingest(store, "rust", samples=b"samples of rust")
    ingest(store, "html")
    return store.tasks.final("rust").weights


def kinds(store: Store, **options: object) -> list[str]:
    return [finding.kind for finding in store.verify(**options)]  # type: ignore[arg-type]


def flip(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


def test_a_sound_store_has_no_findings(store: Store, weights: str) -> None:
    assert kinds(store, read_data=True) == []


def test_a_missing_blob_is_found_with_the_tasks_that_need_it(store: Store, weights: str) -> None:
    lose(store, weights)
    (finding,) = store.verify()
    place = store.blobs.place(weights)
    assert (finding.kind, finding.digest, finding.path, finding.tasks) == ("missing", weights, place, ("rust",))
    assert finding.is_problem


@pytest.mark.parametrize("step", ["size", "is_intact"])
@pytest.mark.parametrize("what", ["checkpoint", "code"])
def test_what_others_let_go_of_while_it_is_checked_is_no_finding(
    store: Store, twin: Store, weights: str, monkeypatch: pytest.MonkeyPatch, step: str, what: str
) -> None:
    made = store.generators.add(generator(store, ["rust"]))
    run = twin.runs.start(BASE, {})
    twin.runs.save_checkpoint(run.id, step=1, weights=b"run weights", optimizer=b"run optimizer")
    present = code_of(store, "rust").blob if what == "code" else str(store.runs.running(BASE).weights)  # type: ignore[union-attr]
    real, gone = getattr(Blobs, step), list[str]()

    def check(blobs: Blobs, digest: str) -> object:
        if digest == present and not gone:  # the rows were read before this
            gone.append(digest)
            if what == "code":
                twin.codes.replace(made.id, code(twin, "rust", data=b"another code"))
            else:
                twin.runs.save_checkpoint(run.id, step=2, weights=b"later weights", optimizer=b"later optimizer")
        return real(blobs, digest)

    monkeypatch.setattr(Blobs, step, check)
    assert [finding for finding in store.verify(read_data=True) if finding.is_problem] == []
    assert gone == [present]


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\0", lambda data: b""])
def test_a_wrong_length_is_found_without_reading(store: Store, weights: str, change: Callable[[bytes], bytes]) -> None:
    overwrite(store, weights, change)
    assert kinds(store) == ["length"]


def test_wrong_bytes_are_found_by_reading(store: Store, weights: str) -> None:
    overwrite(store, weights, flip)
    assert kinds(store) == []
    assert kinds(store, read_data=True) == ["digest"]


def test_two_blobs_in_each_others_place_are_both_found(store: Store, weights: str) -> None:
    other = store.tasks.final("html").weights
    first, second = store.blobs.read(weights), store.blobs.read(other)
    overwrite(store, weights, lambda data: second)
    overwrite(store, other, lambda data: first)
    assert kinds(store, read_data=True) == ["digest", "digest"]


@pytest.mark.kept_in("folder", reason="an object store has no folders")
def test_a_folder_in_place_of_a_blob_is_found(store: Store, weights: str) -> None:
    lose(store, weights)
    Path(store.blobs.place(weights)).mkdir()
    assert set(kinds(store, read_data=True)) <= {"length", "digest"}
    assert kinds(store, read_data=True) != []


@pytest.mark.kept_in("sqlite", "folder", reason="the temporary files of a store folder")
def test_an_orphan_and_a_leftover_are_named_and_are_no_problem(store: Store, weights: str) -> None:
    store.blobs.put(b"orphan")
    (paths_of(store).tmp / "leftover").touch()
    findings = list(store.verify())
    assert [finding.kind for finding in findings] == ["orphan", "leftover"]
    assert not any(finding.is_problem for finding in findings)


def test_a_shared_blob_names_all_its_tasks(store: Store, weights: str) -> None:
    lose(store, store.tasks.final("rust").config)
    (finding,) = store.verify()
    assert finding.tasks == ("html", "rust")


@pytest.mark.kept_in("sqlite", reason="PostgreSQL itself keeps references right")
def test_a_row_that_refers_to_a_row_that_is_gone_is_found(store: Store, weights: str) -> None:
    damage(store, f"DELETE FROM blobs WHERE digest = x'{weights}'")
    assert "dangling" in kinds(store)


def test_a_task_that_lost_its_final_adapter_is_found(store: Store, weights: str) -> None:
    damage(store, f"DELETE FROM adapters WHERE id = {store.tasks.final('rust').id}")
    (finding,) = [finding for finding in store.verify() if finding.is_problem]
    assert (finding.kind, finding.tasks) == ("dangling", ("rust",))
    with pytest.raises(DamagedStore, match="rust"):
        list(store.tasks.summaries())


def test_only_the_blobs_of_the_named_tasks_are_checked(store: Store, weights: str) -> None:
    store.vectors.add([vector(store, "rust")])
    store.blobs.put(b"orphan")
    lose(store, weights)
    assert kinds(store, names=["html"]) == []
    assert kinds(store, names=["rust"]) == ["missing"]


@pytest.mark.parametrize("needed", ["samples of rust", "vector", "generator", "code of rust"])
def test_all_that_a_task_needs_is_checked(store: Store, weights: str, needed: str) -> None:
    store.vectors.add([vector(store, "rust")])
    store.generators.add(generator(store, ["rust"]))
    lose(store, store.blobs.put(needed.encode()))
    assert kinds(store, names=["rust"]) == ["missing"]


def test_a_missing_generator_is_called_one_and_named_with_the_tasks_that_it_decodes(store: Store, weights: str) -> None:
    assert store.blobs.exists(weights)
    made = store.generators.add(generator(store, ["rust"]))
    lose(store, made.blob)
    (finding,) = store.verify()
    assert (finding.message, finding.tasks) == (f"generator {made.blob} is missing", ("rust",))
    with pytest.raises(MissingBlob) as caught:
        store.blobs.read(made.blob)
    assert "icm train --fresh" in str(caught.value.hint)


def test_an_unknown_name_cannot_be_checked(store: Store) -> None:
    with pytest.raises(TaskNotFound):
        list(store.verify(names=["gone"]))


class TestRepair:
    """Moving damage aside."""

    def test_a_damaged_blob_is_moved_and_kept(self, store: Store, weights: str) -> None:
        overwrite(store, weights, flip)
        ((finding, place),) = store.repair()
        assert finding.tasks == ("rust",)
        assert "quarantine" in place
        assert kinds(store, read_data=True) == ["missing"]

    def test_a_sound_store_needs_none(self, store: Store, weights: str) -> None:
        assert store.repair() == []

    def test_storing_the_original_again_makes_the_store_whole(self, store: Store, weights: str) -> None:
        overwrite(store, weights, flip)
        store.repair()
        ingest(store, "rust")
        assert kinds(store, read_data=True) == []


@pytest.mark.kept_in("sqlite", reason="pages of SQLite's file")
class TestDatabaseDamage:
    """A damaged database is an error or a finding; it is never a traceback of another library."""

    def test_a_garbled_page_is_found(self, store: Store, weights: str) -> None:
        garble(paths_of(store).database, lambda data: data[:8192] + bytes(4096) + data[12288:])
        assert any(finding.kind == "database" for finding in store.verify())

    @pytest.mark.parametrize("seed", range(40))
    def test_a_random_change_ends_in_an_error_of_the_store_or_in_findings(self, tmp_path: Path, seed: int) -> None:
        with new_store(tmp_path / "store") as store:
            ingest(store, "rust", steps=[80])
            database = paths_of(store).database
        draw = random.Random(seed)
        garble(database, lambda data: spoil(data, draw))
        try:
            with new_store(tmp_path / "store") as store:
                findings = list(store.verify())
                assert all(isinstance(finding, Finding) for finding in findings)
                list(store.tasks.summaries())
        except RegistryError:
            return


def garble(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


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
