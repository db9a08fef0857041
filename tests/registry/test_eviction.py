"""Letting go of originals: never the last copy, never half, never bytes that somebody else needs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from registry.errors import DamagedBlob, LastCopy, MissingBlob, StoreFull, StoreLocked, TaskNotFound
from registry.records import EvictedAdapter, Extra
from registry.storage.folder import make_reserve
from registry.storage.sqlite import SqliteDatabase
from registry.store import Store
from tests.registry.children import KILLED, run
from tests.registry.examples import BASE, code, evaluation, eviction, generator, ingest, new_store, offer
from tests.registry.pairs import lose, overwrite
from tests.shared import paths_of

WEIGHTS = len(b"weights of rust")


@pytest.fixture
def rust(store: Store) -> Store:
    """A store with one task, one checkpoint and a code."""
    ingest(store, "rust", steps=[80], card=b"card")
    store.generators.add(generator(store, ["rust"]))
    return store


def file_of(store: Store, task: str) -> Path:
    return Path(store.blobs.place(store.tasks.final(task).weights))


@pytest.mark.kept_in("sqlite", "folder", reason="elsewhere bytes are deleted once they are old")
def test_the_weights_go_and_all_else_stays(rust: Store) -> None:
    assert rust.originals.evict(eviction(rust, "rust")) == WEIGHTS + len(b"weights of rust at 80")
    final = rust.tasks.final("rust")
    assert final.is_evicted
    assert (final.layout, final.rank_max, final.dtype) == ((("layers.0.q_proj", 8, 64, 64),
                                                            ("layers.0.v_proj", 8, 64, 32)), 8, "BF16")  # fmt: skip
    assert (final.weights_bytes, final.stored_bytes) == (WEIGHTS, final.original_bytes - WEIGHTS)
    assert (rust.blobs.read(final.config), rust.blobs.read(str(final.card))) == (b'{"r": 8}', b"card")
    with pytest.raises(MissingBlob):
        rust.blobs.read(final.weights)
    assert list(rust.verify(read_data=True)) == []
    assert list(rust.verify(names=["rust"])) == []


def test_what_was_measured_is_recorded_with_it(rust: Store) -> None:
    current = rust.generators.current(BASE)
    assert current is not None
    rust.originals.evict(
        eviction(rust, "rust", evaluations=[evaluation("rust", generator_id=current.id)], squared_error=0.03)
    )
    code = rust.codes.get("rust", current.id)
    assert code is not None
    assert (code.squared_error, [row.rung for row in rust.evaluations.all("rust")]) == (0.03, ["code"])


def test_checkpoints_alone_can_go(rust: Store) -> None:
    checkpoint = rust.tasks.adapters("rust")[0]
    rust.originals.evict(eviction(rust, "rust", adapters=[checkpoint.id]))
    (summary,) = rust.tasks.summaries()
    assert (summary.checkpoints, summary.evicted_checkpoints, summary.final.is_evicted) == (0, 1, False)
    assert rust.blobs.read(summary.final.weights) == b"weights of rust"


@pytest.mark.kept_in("sqlite", "folder", reason="elsewhere bytes are deleted once they are old")
def test_bytes_that_another_task_has_stay_until_it_lets_go_too(store: Store) -> None:
    for name in ("rust", "html"):
        ingest(store, name, weights=b"shared")
    store.generators.add(generator(store, ["rust", "html"]))
    assert store.originals.in_use() == {store.tasks.final("rust").weights: 2}
    assert store.originals.evict(eviction(store, "rust")) == 0
    assert store.blobs.read(store.tasks.final("html").weights) == b"shared"
    assert store.originals.evict(eviction(store, "html")) == len(b"shared")
    assert store.originals.in_use() == {}


@pytest.mark.kept_in("sqlite", "folder", reason="elsewhere bytes are deleted once they are old")
def test_the_bill_counts_what_is_on_disk(rust: Store) -> None:
    rust.originals.evict(eviction(rust, "rust"))
    usage = rust.usage()
    assert (usage.originals, usage.checkpoints, usage.unreferenced) == (len(b'{"r": 8}') + len(b"card"), 0, 0)


def test_a_pinned_task_is_kept(rust: Store) -> None:
    assert [task.name for task in rust.tasks.edit(["RUST", "rust"], pinned=True)] == ["rust"]
    with pytest.raises(LastCopy, match="pinned"):
        rust.originals.evict(eviction(rust, "rust"))
    assert rust.blobs.read(rust.tasks.final("rust").weights) == b"weights of rust"
    rust.tasks.edit(["rust"], pinned=False)
    rust.originals.evict(eviction(rust, "rust"))
    assert rust.tasks.final("rust").is_evicted


def test_pinning_an_unknown_task_pins_nothing(rust: Store) -> None:
    with pytest.raises(TaskNotFound):
        rust.tasks.edit(["rust", "nope"], pinned=True)
    assert not rust.tasks.get("rust").pinned


def test_a_replaced_task_stays_pinned(rust: Store) -> None:
    rust.tasks.edit(["rust"], pinned=True)
    ingest(rust, "rust", weights=b"other", on_conflict="replace")
    assert rust.tasks.get("rust").pinned


@pytest.fixture
def rust_with_extras(store: Store) -> Store:
    """A store with one task that has a head, a tokenizer and a code."""
    files = ((b"head", None), (b"words", "tokenizer.json"))
    ingest(store, "rust", extras=[Extra(store.blobs.put(data), file, len(data), len(data)) for data, file in files])
    store.generators.add(generator(store, ["rust"]))
    return store


@pytest.mark.parametrize("number", range(5))
def test_nothing_goes_while_what_stands_in_is_damaged(rust_with_extras: Store, number: int) -> None:
    rust = rust_with_extras
    order = eviction(rust, "rust")
    assert len(order.digests()) == 5
    digest = order.digests()[number]
    overwrite(rust, digest, lambda data: data[:-1])
    with pytest.raises(DamagedBlob):
        rust.originals.evict(order)
    lose(rust, digest)
    with pytest.raises(MissingBlob):
        rust.originals.evict(order)
    assert not rust.tasks.final("rust").is_evicted
    assert rust.blobs.read(rust.tasks.final("rust").weights) == b"weights of rust"


def test_checkpoints_stay_while_the_final_original_is_damaged(rust: Store) -> None:
    order = eviction(rust, "rust", adapters=[rust.tasks.adapters("rust")[0].id])
    lose(rust, rust.tasks.final("rust").weights)
    with pytest.raises(MissingBlob):
        rust.originals.evict(order)
    assert not rust.tasks.adapters("rust")[0].is_evicted


def test_nothing_goes_after_an_extra_was_lost_from_the_rows(rust_with_extras: Store) -> None:
    order = eviction(rust_with_extras, "rust")
    with rust_with_extras._db.connection(write=True) as connection:
        connection.exec_driver_sql("DELETE FROM extras")
    with pytest.raises(LastCopy, match="changed"):
        rust_with_extras.originals.evict(order)


def test_nothing_goes_after_another_training(rust: Store) -> None:
    order = eviction(rust, "rust")
    rust.generators.add(generator(rust, ["rust"], data=b"another"))
    with pytest.raises(LastCopy, match="changed"):
        rust.originals.evict(order)
    assert not rust.tasks.final("rust").is_evicted


def test_nothing_goes_after_the_task_was_replaced(rust: Store) -> None:
    order = eviction(rust, "rust")
    ingest(rust, "rust", weights=b"other", on_conflict="replace")
    with pytest.raises(LastCopy, match="changed"):
        rust.originals.evict(order)


def test_nothing_goes_after_the_code_was_replaced_and_its_file_dropped(rust: Store) -> None:
    order = eviction(rust, "rust")
    rust.codes.replace(order.generator.id, code(rust, "rust", data=b"finer"))
    with pytest.raises(LastCopy, match="changed"):
        rust.originals.evict(order)
    assert not rust.tasks.final("rust").is_evicted


def test_a_code_that_was_not_checked_does_not_count(rust: Store) -> None:
    order = eviction(rust, "rust")
    with pytest.raises(LastCopy, match="changed"):
        rust.originals.evict(replace(order, code=replace(order.code, id=order.code.id + 1)))


def test_evict_does_not_run_beside_another_command(rust: Store) -> None:
    with new_store(rust.address, lock_timeout=0) as other:
        with pytest.raises(StoreLocked):
            other.originals.evict(eviction(other, "rust"))
        with pytest.raises(StoreLocked):  # before anything is measured
            other.originals.check_alone()


@pytest.mark.kept_in("sqlite", "folder", reason="the reserve file of a store folder")
def test_a_full_disk_can_be_emptied_by_evicting(rust: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    real, order = SqliteDatabase.write, eviction(rust, "rust")

    def write(database: SqliteDatabase) -> object:
        if paths_of(rust).reserve.exists():
            raise StoreFull("database or disk is full")
        return real(database)

    monkeypatch.setattr(SqliteDatabase, "write", write)
    assert rust.originals.evict(order) > 0
    assert paths_of(rust).reserve.exists()
    make_reserve(paths_of(rust))


@pytest.mark.kept_in("sqlite", "folder", reason="elsewhere bytes are deleted once they are old")
def test_a_kill_before_the_unlink_is_made_good_by_the_next_run(rust: Store) -> None:
    root, file = paths_of(rust).root, file_of(rust, "rust")
    rust.close()

    def evict() -> None:
        with new_store(root) as store:
            store.originals.evict(eviction(store, "rust"))

    assert run(evict, failpoint="eviction-committed") == KILLED
    with new_store(root) as store:
        assert file.exists()
        assert [finding.kind for finding in store.verify(read_data=True)] == ["orphan", "orphan"]
        assert file.name in store.originals.interrupted()
        assert store.usage().unreferenced == store.originals.evict(eviction(store, "rust")) > 0
        assert not file.exists()
        assert (store.originals.interrupted(), list(store.verify(read_data=True))) == (set(), [])


@pytest.mark.kept_in("folder", reason="a fork of a process that has used an object store uses none")
def test_prune_removes_what_a_killed_evict_left(rust: Store) -> None:
    root = rust.address
    rust.close()

    def evict() -> None:
        with new_store(root) as store:
            store.originals.evict(eviction(store, "rust"))

    run(evict, failpoint="eviction-committed")
    with new_store(root) as store:
        assert store.prune(grace=0).blobs == 2
        assert list(store.verify(read_data=True)) == []
        assert store.tasks.final("rust").is_evicted


def test_a_new_generator_must_cover_what_is_evicted(rust: Store) -> None:
    ingest(rust, "html")
    rust.originals.evict(eviction(rust, "rust"))
    with pytest.raises(LastCopy, match="rust"):
        rust.generators.add(generator(rust, ["html"], data=b"another"))
    assert rust.generators.add(generator(rust, ["html", "rust"], data=b"another")).version == 2


def test_a_new_generator_may_leave_evicted_tasks_to_the_one_before(rust: Store) -> None:
    first = rust.generators.current(BASE)
    assert first is not None
    ingest(rust, "html")
    rust.originals.evict(eviction(rust, "rust"))
    rust.generators.add(replace(generator(rust, ["html"], data=b"another"), stay=["rust"]))
    with pytest.raises(LastCopy, match="'rust'"):
        rust.generators.forget(first)
    third = rust.generators.add(generator(rust, ["html"], data=b"third"))  # nothing changes for it
    assert rust.generators.extend(replace(generator(rust, [], data=b"fourth"), parent_id=third.id)).version == 4
    rust.prune(grace=0)
    assert rust.codes.get("rust", first.id) is not None
    assert list(rust.verify(read_data=True)) == []


def test_a_generator_with_a_last_copy_is_not_forgotten(rust: Store) -> None:
    first = rust.generators.current(BASE)
    assert first is not None
    rust.originals.evict(eviction(rust, "rust"))
    with rust._db.connection(write=True) as connection:  # which the store itself would refuse
        connection.exec_driver_sql("UPDATE generators SET is_current = FALSE")
    ingest(rust, "html", base_model="other/base")
    with pytest.raises(LastCopy, match="'rust'"):
        rust.generators.forget(first)
    rust.prune(grace=0)
    assert rust.codes.get("rust", first.id) is not None
    assert list(rust.verify(read_data=True)) == []


def test_verify_finds_an_evicted_task_without_a_code(rust: Store) -> None:
    rust.originals.evict(eviction(rust, "rust"))
    with rust._db.connection(write=True) as connection:
        connection.exec_driver_sql("DELETE FROM codes")
    (finding,) = [finding for finding in rust.verify() if finding.is_problem]
    assert (finding.kind, finding.tasks) == ("dangling", ("rust",))


def test_the_same_ingest_leaves_it_evicted_and_needs_no_file(rust: Store) -> None:
    again = offer(rust, "rust", steps=[80], card=b"card")
    rust.originals.evict(eviction(rust, "rust"))
    outcome = rust.tasks.ingest([again])[0]
    assert (outcome.status, outcome.new, outcome.known, outcome.evicted, outcome.restored) == ("known", 0, 2, 2, 0)
    assert rust.tasks.final("rust").is_evicted


def test_an_evicted_original_can_be_restored(rust: Store) -> None:
    rust.originals.evict(eviction(rust, "rust"))
    outcome = rust.tasks.ingest([replace(offer(rust, "rust", steps=[80], card=b"card"), restore=True)])[0]
    assert (outcome.status, outcome.evicted, outcome.restored) == ("updated", 0, 2)
    assert [row.is_evicted for row in rust.tasks.adapters("rust")] == [False, False]
    assert list(rust.verify(read_data=True)) == []
    assert (
        rust.tasks.ingest([replace(offer(rust, "rust", steps=[80], card=b"card"), restore=True)])[0].status == "known"
    )


def test_restoring_without_the_bytes_is_refused(rust: Store) -> None:
    again = offer(rust, "rust", steps=[80], card=b"card")
    rust.originals.evict(eviction(rust, "rust"))
    rust.prune(grace=0)
    with pytest.raises(MissingBlob):
        rust.tasks.ingest([replace(again, restore=True)])
    assert rust.tasks.final("rust").is_evicted


def test_another_task_may_bring_the_bytes_of_an_evicted_one(rust: Store) -> None:
    rust.originals.evict(eviction(rust, "rust"))
    rust.prune(grace=0)
    ingest(rust, "html", weights=b"weights of rust")
    assert rust.blobs.read(rust.tasks.final("html").weights) == b"weights of rust"
    assert rust.tasks.final("rust").is_evicted
    assert rust.prune(grace=0).blobs == 0


def evicted(store: Store) -> tuple[EvictedAdapter, ...]:
    return store.tasks.origins().named(["rust"])["rust"].evicted


def test_evicted_adapters_are_listed_with_what_tells_them(rust: Store) -> None:
    assert evicted(rust) == ()
    rust.originals.evict(eviction(rust, "rust"))
    rows = {row.step: row for row in rust.tasks.adapters("rust")}
    assert evicted(rust) == tuple(
        EvictedAdapter("rust", rows[step].weights, rows[step].config, step, is_final=step is None)
        for step in (None, 80)
    )


def test_withheld_bytes_are_inspected_and_not_stored(store: Store, tmp_path: Path) -> None:
    file, other = tmp_path / "file", tmp_path / "other"
    for path in (file, other):
        path.write_bytes(b"the same")
    seen: list[Path] = []
    (first,) = store.blobs.put_files([file], lambda path, data: seen.append(path), withheld={file: ["0" * 64]})
    assert getattr(first, "is_new", None)
    store.prune(grace=0)
    digest = getattr(first, "digest", "")
    (withheld,) = store.blobs.put_files([file], lambda path, data: seen.append(path), withheld={file: [digest]})
    assert (getattr(withheld, "digest", None), seen, store.blobs.exists(digest)) == (
        digest,
        [file, file],
        False,
    )
    store.blobs.put_files([file, other], lambda path, data: None, withheld={file: [digest]})
    assert store.blobs.read(digest) == b"the same"


def test_a_generator_is_not_forgotten_while_the_one_in_use_is_damaged(rust: Store) -> None:
    first = rust.generators.current(BASE)
    assert first is not None
    second = rust.generators.add(generator(rust, ["rust"], data=b"another"))
    rust.originals.evict(eviction(rust, "rust"))
    lose(rust, second.blob)
    with pytest.raises(MissingBlob):
        rust.generators.forget(first)
    rust.blobs.put(b"another")
    assert rust.generators.forget(first) == 1
