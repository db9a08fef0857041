"""Task vectors."""

from __future__ import annotations

from dataclasses import replace

import pytest

from registry.errors import TaskNotFound
from registry.records import TaskSummary
from registry.store import Store
from tests.registry.examples import EXTRACTOR, ingest, vector


@pytest.fixture(autouse=True)
def two_tasks(store: Store) -> None:
    """Every test here begins with two tasks."""
    ingest(store, "rust")
    ingest(store, "html")


def summary(store: Store, task: str) -> TaskSummary:
    """Return what the store has of a task."""
    return next(row for row in store.tasks.summaries() if row.task.name == task)


def test_vectors_come_back_as_they_were_recorded(store: Store) -> None:
    store.vectors.add([vector(store, "rust", 1), vector(store, "rust", 0)])
    first, second = store.vectors.all("rust")
    assert (first.support_set, second.support_set) == (0, 1)
    assert (first.task, first.view, first.extractor, first.dim) == ("rust", "context", EXTRACTOR, 64)
    assert store.vectors.all("html") == []


def test_vectors_of_all_tasks_come_by_task(store: Store) -> None:
    store.vectors.add([vector(store, "rust", 1), vector(store, "rust", 0), vector(store, "html")])
    assert [(row.task, row.support_set) for row in store.vectors.all()] == [("html", 0), ("rust", 0), ("rust", 1)]


def test_the_same_again_changes_nothing(store: Store) -> None:
    assert store.vectors.add([vector(store, "rust")]) == 1
    before = store.vectors.all("rust")
    assert store.vectors.add([vector(store, "rust")]) == 0
    assert store.vectors.all("rust") == before


def test_other_bytes_take_the_place_of_the_earlier_ones(store: Store) -> None:
    store.vectors.add([vector(store, "rust")])
    assert store.vectors.add([vector(store, "rust", data=b"better")]) == 1
    assert [store.blobs.read(found.blob) for found in store.vectors.all("rust")] == [b"better"]


def test_another_extractor_makes_another_vector(store: Store) -> None:
    one = vector(store, "rust")
    store.vectors.add([one, replace(one, extractor={**EXTRACTOR, "version": 2})])
    assert len(store.vectors.all("rust")) == 2


def test_a_vector_of_an_unknown_task_is_refused_with_all_others(store: Store) -> None:
    with pytest.raises(TaskNotFound):
        store.vectors.add([vector(store, "rust"), vector(store, "gone")])
    assert store.vectors.all("rust") == []


def test_of_a_task_that_is_as_it_was_they_are_recorded(store: Store) -> None:
    assert store.vectors.add([vector(store, "rust")], of=summary(store, "rust")) == 1


@pytest.mark.kept_in("sqlite", reason="PostgreSQL gives no number twice")
def test_of_an_adapter_that_was_replaced_meanwhile_they_are_left_out(store: Store) -> None:
    ingest(store, "zig")
    seen = summary(store, "zig")
    ingest(store, "zig", weights=b"other weights", on_conflict="replace")
    assert store.tasks.final("zig").id == seen.final.id  # numbers of rows are given again
    assert store.vectors.add([vector(store, "zig")], of=seen) is None
    assert store.vectors.all("zig") == []


def test_of_samples_that_were_replaced_meanwhile_they_are_left_out(store: Store) -> None:
    seen = summary(store, "rust")
    ingest(store, "rust", samples=b'{"text": "new"}\n')
    assert store.vectors.add([vector(store, "rust")], of=seen) is None
    assert store.vectors.all("rust") == []


def test_of_a_task_that_was_removed_meanwhile_they_are_left_out(store: Store) -> None:
    seen = summary(store, "rust")
    store.tasks.remove(["rust"], last_copies=["rust"])
    assert store.vectors.add([vector(store, "rust")], of=seen) is None
