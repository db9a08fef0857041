"""Extras: what a code of an adapter cannot represent has rows and blobs for as long as the adapter has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from registry.errors import MissingBlob
from registry.records import Extra, NewGenerator, TaskIngest
from registry.storage.blobs.content import digest_of
from registry.store import Store
from registry.tables.bundles import BundleImport, ImportedTask
from tests.registry.examples import BASE, adapter, eviction, generator, new_store, offer
from tests.registry.pairs import lose

HEAD, BIAS, TOKENIZER = b"packed head", b"packed bias", b"packed tokenizer"


def extra(store: Store, data: bytes, file: str | None = None) -> Extra:
    return Extra(store.blobs.put(data), file, 10 * len(data), len(data))


def usual(store: Store) -> tuple[Extra, ...]:
    return extra(store, HEAD), extra(store, BIAS), extra(store, TOKENIZER, "tokenizer.json")


def with_extras(store: Store, name: str, extras: Sequence[Extra], **options: object) -> TaskIngest:
    made = offer(store, name, **options)  # type: ignore[arg-type]
    final, *checkpoints = made.adapters
    return replace(made, adapters=[replace(final, extras=extras), *checkpoints])


def ingest(store: Store, name: str, extras: Sequence[Extra] | None = None, **options: object) -> None:
    store.tasks.ingest([with_extras(store, name, usual(store) if extras is None else extras, **options)])


def test_an_adapter_comes_back_with_its_extras(store: Store) -> None:
    ingest(store, "rust")
    final = store.tasks.final("rust")
    assert sorted(final.extras, key=str) == sorted(usual(store), key=str)
    assert final.extras_bytes == len(HEAD + BIAS + TOKENIZER)
    assert [summary.final.extras for summary in store.tasks.summaries()] == [final.extras]


def test_the_order_of_extras_does_not_depend_on_what_was_stored_before(store: Store) -> None:
    backwards = sorted((HEAD, BIAS, b"packed norms"), key=digest_of, reverse=True)
    for number, data in enumerate(backwards):
        ingest(store, f"earlier-{number}", [extra(store, data)])
    ingest(store, "rust", [extra(store, data) for data in backwards])
    assert [found.blob for found in store.tasks.final("rust").extras] == [digest_of(data) for data in backwards[::-1]]


def test_an_adapter_comes_back_with_why_there_can_be_no_code_and_with_its_form(store: Store) -> None:
    final = replace(
        adapter(store, b"w", is_final=True), original_only="peft_type is LOHA", does_nothing=True, layout=[]
    )
    other = replace(adapter(store, b"v", is_final=True), template='{"dtype":"F32"}')
    store.tasks.ingest([TaskIngest("one", BASE, [final]), TaskIngest("two", BASE, [other])])
    one, two = store.tasks.final("one"), store.tasks.final("two")
    assert (one.original_only, one.does_nothing, one.can_be_read, one.template) == (
        "peft_type is LOHA",
        True,
        False,
        "",
    )
    assert (two.original_only, two.does_nothing, two.can_be_read, two.template) == (
        None,
        False,
        True,
        '{"dtype":"F32"}',
    )


@pytest.mark.slow
def test_each_of_many_adapters_has_its_own(store: Store) -> None:
    names = [f"task-{number}" for number in range(30)]
    offers = [with_extras(store, name, [extra(store, name.encode(), name)], steps=[1, 2]) for name in names]
    store.tasks.ingest(offers)
    for name in names:
        *checkpoints, final = store.tasks.adapters(name)
        assert [(found.file, found.blob) for found in final.extras] == [(name, digest_of(name.encode()))]
        assert [checkpoint.extras for checkpoint in checkpoints] == [(), ()]


def test_an_extra_whose_blob_is_missing_is_not_recorded(store: Store) -> None:
    ghost = Extra(digest_of(b"never stored"), None, 5, 5)
    with pytest.raises(MissingBlob):
        ingest(store, "rust", [ghost])
    assert list(store.tasks.all()) == []


def test_the_same_adapter_again_changes_nothing(store: Store) -> None:
    ingest(store, "rust")
    (outcome,) = store.tasks.ingest([with_extras(store, "rust", usual(store))])
    assert (outcome.status, len(store.tasks.final("rust").extras)) == ("known", 3)


def test_another_adapter_brings_its_own(store: Store) -> None:
    ingest(store, "rust")
    ingest(store, "rust", [extra(store, b"new head")], weights=b"other", on_conflict="replace")
    assert [found.blob for found in store.tasks.final("rust").extras] == [digest_of(b"new head")]


def test_prune_keeps_extras_and_removes_those_of_tasks_that_are_gone(store: Store) -> None:
    ingest(store, "rust")
    ingest(store, "sql", [extra(store, HEAD)])
    assert store.prune(grace=0).blobs == 0
    store.tasks.remove(["rust"], last_copies=["rust"])
    store.prune(grace=0)
    assert [store.blobs.exists(digest_of(data)) for data in (HEAD, BIAS, TOKENIZER)] == [True, False, False]
    assert list(store.verify(read_data=True)) == []


def test_a_damaged_extra_names_its_tasks(store: Store) -> None:
    ingest(store, "rust")
    ingest(store, "sql", [extra(store, HEAD)])
    lose(store, digest_of(HEAD))
    (finding,) = store.verify()
    assert (finding.kind, finding.tasks) == ("missing", ("rust", "sql"))


@pytest.mark.kept_in("sqlite", "folder", reason="elsewhere bytes are deleted once they are old")
def test_an_evicted_adapter_keeps_its_extras(store: Store) -> None:
    ingest(store, "rust")
    store.generators.add(generator(store, ["rust"]))
    store.originals.evict(eviction(store, "rust"))
    assert not store.blobs.exists(store.tasks.final("rust").weights)
    assert len(store.tasks.final("rust").extras) == 3
    assert store.blobs.read(digest_of(HEAD)) == HEAD
    assert list(store.verify(read_data=True)) == []


def test_a_restored_adapter_has_its_tensors_as_they_are_packed_now(store: Store) -> None:
    ingest(store, "rust")
    store.generators.add(generator(store, ["rust"]))
    store.originals.evict(eviction(store, "rust"))
    again = with_extras(store, "rust", [extra(store, b"packed in another way")])
    store.tasks.ingest([replace(again, restore=True)])
    assert {(found.file, found.blob) for found in store.tasks.final("rust").extras} == {
        (None, digest_of(b"packed in another way")),
        ("tokenizer.json", digest_of(TOKENIZER)),
    }


def test_the_bill_counts_shared_extras_once(store: Store) -> None:
    ingest(store, "rust")
    ingest(store, "sql")
    usage = store.usage()
    assert usage.extras == len(HEAD + BIAS + TOKENIZER)
    assert usage.unreferenced == 0


def test_an_imported_task_has_its_extras(store: Store) -> None:
    original = replace(
        adapter(store, b"gone", is_final=True),
        weights=digest_of(b"elsewhere"),
        extras=usual(store),
        template='{"metadata":{}}',
    )
    task = ImportedTask("rust", original, 4096, store.blobs.put(b"code"), 0.1, None)
    store.bundles.add(BundleImport(NewGenerator(BASE, store.blobs.put(b"g"), {}, {}), 1, [task]))
    final = store.tasks.final("rust")
    assert sorted(final.extras, key=str) == sorted(usual(store), key=str)
    assert (final.template, final.is_evicted) == ('{"metadata":{}}', True)


def test_an_import_without_the_bytes_of_an_extra_records_nothing(store: Store) -> None:
    ghost = Extra(digest_of(b"never stored"), "tokenizer.json", 5, 5)
    original = replace(adapter(store, b"gone", is_final=True), weights=digest_of(b"elsewhere"), extras=[ghost])
    task = ImportedTask("rust", original, 4096, store.blobs.put(b"code"), 0.1, None)
    with pytest.raises(MissingBlob):
        store.bundles.add(BundleImport(NewGenerator(BASE, store.blobs.put(b"g"), {}, {}), 1, [task]))
    assert list(store.tasks.all()) == []


def test_extras_are_there_after_the_store_was_closed(store: Store) -> None:
    ingest(store, "rust")
    known = store.tasks.final("rust")
    with new_store(store.address) as again:
        assert again.tasks.final("rust") == known
