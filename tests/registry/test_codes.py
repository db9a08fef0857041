"""Another code for a task under the same generator."""

from __future__ import annotations

from dataclasses import replace

import pytest

from registry.errors import GeneratorConflict, LastCopy, MissingBlob
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
    assert record is not None
    assert store.codes.all(made.id) == [record]
    assert (store.blobs.read(record.blob), record.squared_error) == (b"second", 0.2)


@pytest.mark.kept_in("sqlite", "folder", reason="elsewhere bytes are deleted once they are old")
def test_the_replaced_code_leaves_no_file(store: Store) -> None:
    made, old = coded(store)
    store.codes.replace(made.id, new_code(store, b"second"))
    assert not store.blobs.exists(old.blob)
    assert list(store.verify(read_data=True)) == []


def test_the_same_code_again_keeps_its_file(store: Store) -> None:
    made, _ = coded(store)
    for _ in range(2):
        record = store.codes.replace(made.id, new_code(store, b"second"))
        assert record is not None
    assert store.blobs.read(record.blob) == b"second"


def test_a_task_without_a_code_gets_one(store: Store) -> None:
    made, _ = coded(store)
    ingest(store, "html")
    new = NewCode(store.tasks.final("html"), store.blobs.put(b"other"), 40.0, None)
    store.codes.replace(made.id, new)
    assert {code.task for code in store.codes.all(made.id)} == {"html", "rust"}


def test_codes_of_many_tasks_are_read_with_one_look_and_those_without_are_left_out(store: Store) -> None:
    made, code = coded(store)
    ingest(store, "html")
    assert store.codes.of(["rust", "html", "gone"], made.id) == {"rust": code}


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


def test_a_code_of_a_task_that_was_removed_meanwhile_is_left_out(store: Store) -> None:
    made, _ = coded(store)
    late = new_code(store, b"second")
    store.tasks.remove(["rust"], last_copies=["rust"])
    assert store.codes.replace(made.id, late) is None


@pytest.mark.kept_in("sqlite", reason="PostgreSQL gives no number twice")
def test_a_code_of_an_adapter_that_was_replaced_meanwhile_is_left_out(store: Store) -> None:
    made, _ = coded(store)
    late = new_code(store, b"code of the earlier adapter")
    ingest(store, "rust", weights=b"other weights", on_conflict="replace")
    assert store.tasks.final("rust").id == late.adapter.id  # numbers of rows are given again
    assert store.codes.replace(made.id, late) is None
    assert store.codes.add(made.id, [late]) == []
    assert store.codes.all(made.id) == []


def test_the_adapter_of_another_task_is_left_out(store: Store) -> None:
    made, code = coded(store)
    ingest(store, "html", weights=b"other weights")
    wrong = replace(new_code(store, b"second"), adapter=replace(store.tasks.final("html"), task="rust"))
    assert store.codes.replace(made.id, wrong) is None
    assert store.codes.all(made.id) == [code]


def test_a_generator_that_is_not_current_any_more_is_refused(store: Store) -> None:
    made, code = coded(store)
    store.generators.add(generator(store, ["rust"], data=b"newer"))
    with pytest.raises(GeneratorConflict):
        store.codes.replace(made.id, new_code(store, b"second"))
    assert store.codes.all(made.id) == [code]
