"""Another code for a task under the same generator."""

from __future__ import annotations

from dataclasses import replace

import pytest

from registry.errors import CodeChanged, GeneratorConflict, LastCopy, MissingBlob, TaskNotFound
from registry.records import CodeRecord, GeneratorRecord, NewCode
from registry.store import Store
from tests.registry.examples import eviction, generator, ingest


def coded(store: Store) -> tuple[GeneratorRecord, CodeRecord]:
    """Record a task with a generator and a code."""
    ingest(store, "rust")
    made = store.generators.add(generator(store, ["rust"]))
    code = store.codes.get("rust", made.id)
    assert code is not None
    return made, code


def new_code(store: Store, data: bytes, error: float = 0.1) -> NewCode:
    return NewCode(store.tasks.final("rust"), store.blobs.put(data), 8.0 * len(data), error)


def test_the_new_code_takes_the_place_of_the_present_one(store: Store) -> None:
    made, _ = coded(store)
    record = store.codes.replace(made.id, new_code(store, b"second", 0.2))
    assert store.codes.all(made.id) == [record]
    assert (store.blobs.read(record.blob), record.dw_error) == (b"second", 0.2)


def test_the_replaced_code_leaves_no_file(store: Store) -> None:
    made, old = coded(store)
    store.codes.replace(made.id, new_code(store, b"second"))
    assert not store.paths.blob(old.blob).exists()
    assert list(store.verify(read_data=True)) == []


def test_the_same_code_again_keeps_its_file(store: Store) -> None:
    made, _ = coded(store)
    for _ in range(2):
        record = store.codes.replace(made.id, new_code(store, b"second"))
    assert store.blobs.read(record.blob) == b"second"


def test_a_task_without_a_code_gets_one(store: Store) -> None:
    made, _ = coded(store)
    ingest(store, "html")
    new = NewCode(store.tasks.final("html"), store.blobs.put(b"other"), 40.0, None)
    store.codes.replace(made.id, new)
    assert {code.task for code in store.codes.all(made.id)} == {"html", "rust"}


def test_the_only_copy_of_a_task_is_not_replaced(store: Store) -> None:
    made, _ = coded(store)
    store.originals.evict(eviction(store, "rust"))
    with pytest.raises(LastCopy, match="'rust'"):
        store.codes.replace(made.id, new_code(store, b"second"))
    assert store.codes.get("rust", made.id) is not None


def test_a_code_whose_bytes_are_not_stored_is_refused(store: Store) -> None:
    made, code = coded(store)
    with pytest.raises(MissingBlob):
        store.codes.replace(made.id, NewCode(store.tasks.final("rust"), "0" * 64, 1.0, None))
    assert store.codes.get("rust", made.id) == code


def test_a_code_whose_bytes_others_dropped_meanwhile_is_stored_again(store: Store, twin: Store) -> None:
    made, code = coded(store)
    new = replace(new_code(store, b"code of rust"), data=b"code of rust")  # once more what is there
    twin.codes.replace(made.id, new_code(twin, b"second"))
    assert not store.paths.blob(code.blob).exists()
    record = store.codes.replace(made.id, new)
    assert (record.blob, store.blobs.read(record.blob)) == (code.blob, b"code of rust")
    assert list(store.verify(read_data=True)) == []


def test_bytes_that_are_not_those_of_the_digest_are_no_code(store: Store) -> None:
    made, code = coded(store)
    with pytest.raises(MissingBlob):
        store.codes.replace(made.id, NewCode(store.tasks.final("rust"), "0" * 64, 1.0, None, data=b"others"))
    assert store.codes.get("rust", made.id) == code


def test_an_unknown_task_is_refused(store: Store) -> None:
    made, code = coded(store)
    nobody = replace(store.tasks.final("rust"), task="nobody")
    with pytest.raises(TaskNotFound):
        store.codes.replace(made.id, NewCode(nobody, code.blob, 1.0, None))


def test_a_code_of_an_adapter_that_was_replaced_meanwhile_is_refused(store: Store) -> None:
    made, _ = coded(store)
    late = new_code(store, b"code of the earlier adapter")
    ingest(store, "rust", weights=b"other weights", on_conflict="replace")
    assert store.tasks.final("rust").id == late.adapter.id  # numbers of rows are given again
    with pytest.raises(CodeChanged, match="another adapter"):
        store.codes.replace(made.id, late)
    assert store.codes.all(made.id) == []


def test_the_adapter_of_another_task_is_refused(store: Store) -> None:
    made, code = coded(store)
    ingest(store, "html", weights=b"other weights")
    wrong = replace(new_code(store, b"second"), adapter=replace(store.tasks.final("html"), task="rust"))
    with pytest.raises(CodeChanged):
        store.codes.replace(made.id, wrong)
    assert store.codes.all(made.id) == [code]


def test_a_generator_that_is_not_current_any_more_is_refused(store: Store) -> None:
    made, code = coded(store)
    store.generators.add(generator(store, ["rust"], data=b"newer"))
    with pytest.raises(GeneratorConflict):
        store.codes.replace(made.id, new_code(store, b"second"))
    assert store.codes.all(made.id) == [code]
