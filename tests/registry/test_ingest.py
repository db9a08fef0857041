"""What an ingest would do, asked of the store before anything is written."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from registry.errors import InvalidName, TaskConflict
from registry.records import OnConflict, TaskIngest
from registry.store import Store
from registry.tables.ingest import plan_tasks
from tests.registry.examples import BASE, adapter, eviction, generator, ingest, new_store, offer


def names(store: Store) -> list[str]:
    return [task.name for task in store.tasks.all()]


def test_a_plan_says_what_the_ingest_then_does(store: Store) -> None:
    ingest(store, "known", steps=[80])
    ingest(store, "updated", steps=[80])
    ingest(store, "Spelled")
    offers = [
        offer(store, "known", steps=[80]),
        offer(store, "updated", steps=[80, 90], samples=b"samples"),
        offer(store, "spelled", weights=b"weights of Spelled"),
        offer(store, "added", steps=[1, 2]),
    ]
    planned = store.tasks.plan_ingest(offers)
    assert [outcome.status for outcome in planned] == ["known", "updated", "known", "added"]
    assert planned[2].name == "Spelled"
    assert names(store) == ["known", "Spelled", "updated"]
    assert store.tasks.ingest(offers) == planned


@pytest.mark.parametrize(("choice", "status"), [("skip", "skipped"), ("replace", "replaced")])
def test_a_conflict_is_planned_as_it_is_decided(store: Store, choice: OnConflict, status: str) -> None:
    ingest(store, "rust", steps=[80])
    other = offer(store, "rust", weights=b"other", on_conflict=choice)
    planned = store.tasks.plan_ingest([other])
    assert planned[0].status == status
    assert store.blobs.read(store.tasks.final("rust").weights) == b"weights of rust"
    assert store.tasks.ingest([other]) == planned


def test_a_conflict_that_would_fail_fails(store: Store) -> None:
    ingest(store, "rust")
    with pytest.raises(TaskConflict, match="rust"):
        store.tasks.plan_ingest([offer(store, "html"), offer(store, "rust", weights=b"other")])


@pytest.mark.one_case
@pytest.mark.parametrize("restore", [False, True])
def test_evicted_adapters_are_planned_as_they_are_met_again(store: Store, restore: bool) -> None:
    ingest(store, "rust", steps=[80])
    store.generators.add(generator(store, ["rust"]))
    store.originals.evict(eviction(store, "rust"))
    again = replace(offer(store, "rust", steps=[80]), restore=restore)
    planned = store.tasks.plan_ingest([again])
    assert (planned[0].evicted, planned[0].restored) == ((0, 2) if restore else (2, 0))
    assert store.tasks.final("rust").is_evicted
    assert store.tasks.ingest([again]) == planned


def test_no_byte_need_be_in_the_store(store: Store) -> None:
    final = replace(adapter(store, b"w", is_final=True), weights="ab" * 32)
    (outcome,) = store.tasks.plan_ingest([TaskIngest("rust", BASE, [final])])
    assert (outcome.status, outcome.new) == ("added", 1)


def test_a_store_that_is_only_read_can_be_asked(store: Store) -> None:
    ingest(store, "rust")
    offered = offer(store, "rust")
    with Store.open(store.address, read_only=True) as reader:
        assert reader.tasks.plan_ingest([offered])[0].status == "known"


def test_where_there_is_no_store_yet_everything_is_new(store: Store) -> None:
    offers = [offer(store, "rust", steps=[80]), offer(store, "html")]
    planned = plan_tasks(None, offers)
    assert [(outcome.status, outcome.new) for outcome in planned] == [("added", 2), ("added", 1)]
    with new_store(store.address) as same:
        assert same.tasks.ingest(offers) == planned


def test_a_plan_refuses_what_the_ingest_refuses(store: Store) -> None:
    final = adapter(store, b"w", is_final=True)
    for plan in (store.tasks.plan_ingest, partial(plan_tasks, None)):
        with pytest.raises(InvalidName):
            plan([TaskIngest("../rust", BASE, [final])])
        with pytest.raises(ValueError, match="exactly one"):
            plan([TaskIngest("rust", BASE, [])])
        with pytest.raises(ValueError, match="same name"):
            plan([TaskIngest(name, BASE, [final]) for name in ("rust", "RUST")])


def test_the_key_of_the_tensors_is_recorded_and_names_a_task_again(store: Store) -> None:
    made = offer(store, "rust")
    (final,) = made.adapters
    store.tasks.ingest([replace(made, adapters=[replace(final, tensors_key="00ff" * 4)])])
    ingest(store, "older")
    assert store.tasks.final("rust").tensors_key == "00ff" * 4
    known = store.tasks.origins().named(["older", "rust"])
    assert {name: origin.tensors_key for name, origin in known.items()} == {"older": None, "rust": "00ff" * 4}
