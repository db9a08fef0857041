"""Codes that were made elsewhere are recorded as tasks whose original was evicted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from registry.errors import GeneratorConflict, InvalidName, MissingBlob, StoreReadOnly, TaskConflict
from registry.names import bundle_source
from registry.records import Claim, NewAdapter, NewGenerator
from registry.storage.blobs.content import digest_of
from registry.store import Store
from registry.tables.bundles import BundleImport, ImportedTask
from tests.registry.examples import BASE, LAYOUT, generator, ingest, new_store, offer, vector


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with new_store(tmp_path / "store") as opened:
        yield opened


def imported(store: Store, name: str, **fields: Any) -> ImportedTask:
    """Store what arrives of a task and return it; its original is what `ingest` would record."""
    original = NewAdapter(
        weights=digest_of(f"weights of {name.lower()}".encode()),
        config=store.blobs.put(b'{"r": 8}'),
        card=None,
        step=None,
        is_final=True,
        dtype="BF16",
        rank_max=8,
        parameters=1792,
        target_modules=["q_proj", "v_proj"],
        layout=LAYOUT,
        source="bundle",
    )
    plain: dict[str, Any] = {
        "name": name,
        "original": original,
        "weights_bytes": 4096,
        "code": store.blobs.put(f"code of {name.lower()}".encode()),
        "squared_error": None,
        "claim": Claim(0.11, {"retained_gain": 0.9}),
    }
    return ImportedTask(**plain | fields)


def bundle(store: Store, *tasks: ImportedTask, data: bytes = b"generator", **fields: Any) -> BundleImport:
    new = NewGenerator(BASE, store.blobs.put(data), {"quality": 4}, {"bits": 1.5})
    return BundleImport(**{"generator": new, "version": 3, "tasks": tasks} | fields)


def statuses(outcomes: list[Any]) -> list[tuple[str, str]]:
    return [(outcome.name, outcome.status) for outcome in outcomes]


def rows(store: Store) -> list[Any]:
    return [list(store.tasks.summaries()), store.generators.all(), store.evaluations.all()]


def test_a_task_arrives_without_its_original(store: Store) -> None:
    outcomes = store.bundles.add(bundle(store, imported(store, "rust")))
    assert statuses(outcomes) == [("rust", "added")]
    final = store.tasks.final("rust")
    assert (final.is_evicted, final.weights_bytes, final.stored_bytes) == (True, 4096, len(b'{"r": 8}'))
    with pytest.raises(MissingBlob):
        store.blobs.read(final.weights)


def test_its_code_belongs_to_the_generator_that_arrives(store: Store) -> None:
    store.bundles.add(bundle(store, imported(store, "rust")))
    current = store.generators.current(BASE)
    assert current is not None
    code = store.codes.get("rust", current.id)
    assert code is not None
    assert (store.blobs.read(code.blob), code.bits) == (b"code of rust", 8.0 * 12)
    assert (current.version, current.config, current.metrics) == (3, {"quality": 4}, {"bits": 1.5})


def test_what_is_said_of_a_code_from_elsewhere_stays_a_claim(store: Store) -> None:
    store.bundles.add(bundle(store, imported(store, "rust"), imported(store, "sql", claim=None)))
    first, second = (row.code for row in store.tasks.summaries())
    assert (first and first.claim) is not None
    assert second is not None
    assert (first.squared_error, first.claim.squared_error, first.claim.retained_gain) == (None, 0.11, 0.9)
    assert (second.claim, store.evaluations.all()) == (None, [])


def test_the_true_original_of_a_bundle_is_stored_although_nobody_asks_to_restore_it(store: Store) -> None:
    task = imported(store, "rust")
    store.bundles.add(bundle(store, replace(task, original=replace(task.original, source=bundle_source("ab")))))
    assert store.tasks.origins().named(["rust"])["rust"].evicted == ()
    assert store.tasks.ingest([offer(store, "rust")])[0].restored == 1
    assert store.tasks.final("rust").source == offer(store, "rust").adapters[0].source


def test_verify_and_prune_find_nothing_wrong(store: Store) -> None:
    store.bundles.add(bundle(store, imported(store, "rust"), imported(store, "sql")))
    assert list(store.verify(read_data=True)) == []
    assert store.prune(grace=0).blobs == 0


def test_the_same_again_changes_nothing(store: Store) -> None:
    store.bundles.add(bundle(store, imported(store, "rust")))
    before = rows(store)
    assert statuses(store.bundles.add(bundle(store, imported(store, "RUST")))) == [("rust", "known")]
    assert rows(store) == before


def test_a_second_arrival_adds_to_the_first(store: Store) -> None:
    store.bundles.add(bundle(store, imported(store, "rust")))
    outcomes = store.bundles.add(bundle(store, imported(store, "rust"), imported(store, "sql")))
    assert statuses(outcomes) == [("rust", "known"), ("sql", "added")]
    assert len(store.generators.all()) == 1


def test_a_task_with_the_same_original_gets_its_code_and_keeps_the_original(store: Store) -> None:
    ingest(store, "rust", steps=[80])
    outcomes = store.bundles.add(bundle(store, imported(store, "rust")))
    assert statuses(outcomes) == [("rust", "encoded")]
    (summary,) = store.tasks.summaries()
    assert (summary.final.is_evicted, summary.checkpoints) == (False, 1)
    assert summary.code is not None
    assert summary.code.adapter_id == summary.final.id


def test_a_task_with_another_original_is_a_conflict(store: Store) -> None:
    ingest(store, "rust", weights=b"other weights")
    before = rows(store)
    with pytest.raises(TaskConflict) as caught:
        store.bundles.add(bundle(store, imported(store, "sql"), imported(store, "rust")))
    assert (caught.value.name, "replace" in str(caught.value.hint)) == ("rust", False)
    assert rows(store) == before


def test_a_conflict_can_be_skipped(store: Store) -> None:
    ingest(store, "rust", weights=b"other weights")
    new = bundle(store, imported(store, "sql"), imported(store, "rust"), on_conflict="skip")
    assert statuses(store.bundles.add(new)) == [("sql", "added"), ("rust", "skipped")]
    assert [row.code is not None for row in store.tasks.summaries()] == [False, True]


def test_nothing_but_conflicts_leave_no_generator(store: Store) -> None:
    ingest(store, "rust", weights=b"other weights")
    store.bundles.add(bundle(store, imported(store, "rust"), on_conflict="skip"))
    assert store.generators.all() == []


def test_another_code_of_the_same_task_is_a_conflict(store: Store) -> None:
    store.bundles.add(bundle(store, imported(store, "rust")))
    other = imported(store, "rust", code=store.blobs.put(b"coarser code"))
    with pytest.raises(TaskConflict):
        store.bundles.add(bundle(store, other))


def test_another_generator_is_refused_and_the_codes_in_use_stay(store: Store) -> None:
    ingest(store, "rust")
    store.generators.add(generator(store, ["rust"], data=b"generator in use"))
    before = rows(store)
    with pytest.raises(GeneratorConflict, match=BASE) as caught:
        store.bundles.add(bundle(store, imported(store, "sql"), on_conflict="skip"))
    assert "--store" in str(caught.value.hint)
    assert rows(store) == before


def test_the_generator_of_another_base_model_is_in_nobodys_way(store: Store) -> None:
    ingest(store, "rust")
    store.generators.add(generator(store, ["rust"], data=b"generator in use"))
    new = bundle(store, imported(store, "sql"))
    store.bundles.add(replace(new, generator=replace(new.generator, base_model="acme/other")))
    assert [row.is_current for row in store.generators.all()] == [True, True]


def test_a_plan_says_the_same_and_writes_nothing(store: Store) -> None:
    ingest(store, "rust")
    before = rows(store)
    new = bundle(store, imported(store, "rust"), imported(store, "sql"))
    planned = store.bundles.plan(new)
    assert rows(store) == before
    assert store.bundles.add(new) == planned


def test_a_plan_needs_no_blob(store: Store) -> None:
    new = bundle(store, imported(store, "rust", code="0" * 64))
    assert statuses(store.bundles.plan(new)) == [("rust", "added")]


@pytest.mark.parametrize("what", ["code", "config"])
def test_a_blob_that_is_not_there_records_nothing(store: Store, what: str) -> None:
    task = imported(store, "rust")
    lacking = (
        replace(task, code="0" * 64)
        if what == "code"
        else replace(task, original=replace(task.original, config="0" * 64))
    )
    with pytest.raises(MissingBlob):
        store.bundles.add(bundle(store, imported(store, "sql"), lacking))
    assert rows(store) == [[], [], []]


def test_a_task_that_was_to_be_skipped_and_could_be_encoded_by_now_is_skipped(store: Store, twin: Store) -> None:
    ingest(store, "rust", weights=b"other weights")
    lacking = imported(store, "rust", code=digest_of(b"code that nobody put, since the plan skips it"))
    new = bundle(store, lacking, imported(store, "sql"), on_conflict="skip")
    assert statuses(store.bundles.plan(new)) == [("rust", "skipped"), ("sql", "added")]
    ingest(twin, "rust", on_conflict="replace")  # by the very adapter that the bundle has the code of
    assert statuses(store.bundles.add(new)) == [("rust", "skipped"), ("sql", "added")]
    assert [finding for finding in store.verify(read_data=True) if finding.is_problem] == []


def test_a_hostile_name_is_refused(store: Store) -> None:
    with pytest.raises(InvalidName):
        store.bundles.add(bundle(store, imported(store, "../rust")))


def test_two_tasks_of_one_name_are_refused(store: Store) -> None:
    with pytest.raises(ValueError, match="same name"):
        store.bundles.add(bundle(store, imported(store, "rust"), imported(store, "RUST")))


def test_a_store_opened_read_only_takes_nothing(store: Store) -> None:
    new = bundle(store, imported(store, "rust"))
    with Store.open(store.address, read_only=True) as opened, pytest.raises(StoreReadOnly):
        opened.bundles.add(new)


def test_ingesting_the_original_brings_it_back_whatever_length_was_claimed(store: Store) -> None:
    store.bundles.add(bundle(store, imported(store, "rust")))
    store.tasks.ingest([replace(offer(store, "rust"), restore=True)])
    assert not store.tasks.final("rust").is_evicted
    assert list(store.verify(read_data=True)) == []


def test_a_new_task_comes_with_its_vectors_and_its_mark(store: Store) -> None:
    task = imported(store, "rust")
    made = replace(task.original, is_generated=True)
    store.bundles.add(bundle(store, replace(task, original=made, vectors=[vector(store, "rust")])))
    assert [row.task for row in store.vectors.all("rust")] == ["rust"]
    assert store.tasks.final("rust").is_generated


def test_vectors_that_are_not_in_the_store_leave_nothing_recorded(store: Store) -> None:
    absent = replace(vector(store, "rust"), blob="0" * 64)
    with pytest.raises(MissingBlob):
        store.bundles.add(bundle(store, imported(store, "rust", vectors=[absent])))
    assert list(store.tasks.all()) == []


def test_a_task_that_is_there_keeps_its_vectors(store: Store) -> None:
    store.bundles.add(bundle(store, imported(store, "rust")))
    again = imported(store, "rust", vectors=[vector(store, "rust")])
    assert statuses(store.bundles.add(bundle(store, again))) == [("rust", "known")]
    assert store.vectors.all("rust") == []
