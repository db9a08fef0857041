"""Rows that others refer to: found or made once, by objects and by plain statements alike."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select
from sqlalchemy.orm import Session

from registry.errors import MissingBlob, TaskNotFound
from registry.records import latest_evaluation
from registry.schema import Blob, Document
from registry.storage import row_writer as rows
from registry.storage.blobs.content import digest_of
from registry.storage.row_writer import (
    MAX_VARIABLES,
    RowNumbers,
    RowWriter,
    document_digest,
    document_row,
    in_parts,
    named_blob,
)
from registry.store import Store
from tests.registry.examples import BASE, evaluation, generator, ingest, offer

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def count(session: Session, table: type[Blob] | type[Document]) -> int:
    return len(session.scalars(select(table.id)).all())


@given(st.lists(st.integers(), max_size=3 * MAX_VARIABLES))
def test_parts_are_the_values_in_order_and_none_is_too_long(values: list[int]) -> None:
    parts = list(in_parts(values))
    assert [value for part in parts for value in part] == values
    assert all(0 < len(part) <= MAX_VARIABLES for part in parts)


@given(JSON, JSON)
def test_json_values_share_a_digest_if_and_only_if_they_are_written_alike(one: object, other: object) -> None:
    alike = rows.compact_json(one) == rows.compact_json(other)
    assert (document_digest(one) == document_digest(other)) == alike


@given(st.dictionaries(st.text(max_size=5), st.integers(), min_size=2))
def test_the_order_of_keys_makes_no_other_document(value: dict[str, int]) -> None:
    assert document_digest(value) == document_digest(dict(reversed(value.items())))


def test_more_blobs_than_one_statement_takes_are_numbered(store: Store) -> None:
    digests = store.blobs.put_all([b"blob %d" % number for number in range(MAX_VARIABLES + 9)])
    with store._db.connection(write=True) as connection:
        numbers = RowNumbers(connection, store.blobs)
        found = numbers.blobs(digests)
        assert len(set(found.values())) == len(digests)
        assert numbers.blobs(digests) == found
    with store._db.write() as session:
        writer = RowWriter(session, store.blobs)
        writer.load_blobs(digests)
        assert {digest: writer.blob(digest).id for digest in digests} == found


def test_a_document_has_one_row_however_it_is_recorded(store: Store) -> None:
    body = ("F32", 8, ("q_proj",))
    with store._db.connection(write=True) as connection:
        number = RowNumbers(connection, store.blobs).documents([body, body])[body]
    with store._db.write() as session:
        assert document_row(session, ["F32", 8, ["q_proj"]]).id == number
        assert count(session, Document) == 1


def test_a_row_for_bytes_that_are_not_stored_is_refused(store: Store) -> None:
    absent = digest_of(b"absent")
    with pytest.raises(MissingBlob), store._db.write() as session:
        RowWriter(session, store.blobs).blob(absent)
    with pytest.raises(MissingBlob), store._db.connection(write=True) as connection:
        RowNumbers(connection, store.blobs).blobs([absent])
    with store._db.read() as session:
        assert count(session, Blob) == 0


@pytest.mark.parametrize("by_objects", [True, False])
def test_a_length_that_was_only_claimed_gives_way_to_that_of_the_file(store: Store, by_objects: bool) -> None:
    digest = digest_of(b"four")
    with store._db.write() as session:
        assert named_blob(session, digest).size == 0
    store.blobs.put(b"four")
    if by_objects:
        with store._db.write() as session:
            RowWriter(session, store.blobs).blob(digest)
    else:
        with store._db.connection(write=True) as connection:
            RowNumbers(connection, store.blobs).blobs([digest])
    with store._db.read() as session:
        assert session.scalars(select(Blob.size)).all() == [4]


def test_an_unknown_task_is_answered_with_at_most_three_names_as_the_store_spells_them(store: Store) -> None:
    for name in ("Rust-1", "rust-2", "rust-3", "rust-4", "html"):
        ingest(store, name)
    with pytest.raises(TaskNotFound) as caught:
        store.tasks.get("RUST-10")
    assert caught.value.matches[0] == "Rust-1"
    assert len(caught.value.matches) == 3
    assert caught.value.hint == "did you mean 'Rust-1'?"


class TestTheSameAdapterStill:
    """Whether an adapter that was read is what its task has now."""

    def test_it_is_until_the_task_changes(self, store: Store) -> None:
        ingest(store, "rust")
        seen = store.tasks.final("rust")
        with store._db.read() as session:
            row = rows.final_if_unchanged(session, seen)
            assert row is not None
            assert row.id == seen.id

    def test_a_new_checkpoint_changes_nothing(self, store: Store) -> None:
        ingest(store, "rust")
        seen = store.tasks.final("rust")
        ingest(store, "rust", steps=[80])
        with store._db.read() as session:
            assert rows.final_if_unchanged(session, seen) is not None

    @pytest.mark.kept_in("sqlite", reason="PostgreSQL gives no number twice")
    def test_another_adapter_under_the_number_of_the_old_one_is_not_it(self, store: Store) -> None:
        ingest(store, "rust")
        seen = store.tasks.final("rust")
        store.tasks.ingest([offer(store, "rust", weights=b"other", on_conflict="replace")])
        assert store.tasks.final("rust").id == seen.id  # SQLite gives the number again
        with store._db.read() as session:
            assert rows.final_if_unchanged(session, seen) is None

    def test_a_removed_task_has_none(self, store: Store) -> None:
        ingest(store, "rust")
        seen = store.tasks.final("rust")
        store.tasks.remove(["rust"], last_copies=["rust"])
        with store._db.read() as session:
            assert rows.final_if_unchanged(session, seen) is None


class TestTheLatestMeasurement:
    """Which measurement speaks for a source."""

    def test_the_text_of_the_task_itself_comes_before_a_later_one_on_another(self, store: Store) -> None:
        ingest(store, "rust", eval_data=b"its own text")
        made = store.generators.add(generator(store, ["rust"]))
        task, other = store.tasks.get("rust"), evaluation("rust", nats=3.0, generator_id=made.id)
        assert task.eval_data is not None
        own = evaluation("rust", nats=2.0, generator_id=made.id)
        store.evaluations.add([type(own)(**{**vars(own), "data": task.eval_data}), other])
        found = latest_evaluation(store.evaluations.all("rust"), task, "code", made)
        assert found is not None
        assert (found.data, found.value) == (task.eval_data, 2.0)

    def test_another_generator_or_source_does_not_speak_for_it(self, store: Store) -> None:
        ingest(store, "rust")
        first = store.generators.add(generator(store, ["rust"]))
        second = store.generators.add(generator(store, ["rust"], data=b"second"))
        store.evaluations.add([evaluation("rust", generator_id=first.id), evaluation("rust")])
        found, task = store.evaluations.all("rust"), store.tasks.get("rust")
        assert latest_evaluation(found, task, "code", first) is not None
        assert latest_evaluation(found, task, "code", second) is None
        assert latest_evaluation(found, task, "residual", first) is None


def test_a_base_model_is_recorded_once_for_all_its_tasks(store: Store) -> None:
    ingest(store, "rust")
    ingest(store, "html")
    store.base_models.set_path(BASE, "/models/base")
    assert [(row.name, row.tasks, row.path) for row in store.base_models.all()] == [(BASE, 2, "/models/base")]
