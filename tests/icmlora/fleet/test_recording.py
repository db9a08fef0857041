"""Offers of an ingest: what becomes of tasks that the store knows, and that the same again changes nothing."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, strategies as st

from icmlora.fleet.ingest.known_tasks import KnownTasks
from icmlora.fleet.ingest.record import record
from icmlora.fleet.ingest.report import OnConflict, TaskIngested
from registry.errors import DamagedStore, InvalidName, MissingBlob, TaskConflict
from registry.manifests import Extra, Task
from registry.names import UNKNOWN_BASE, bundle_source
from registry.storage.blobs.content import digest_of
from registry.store import Store
from tests.icmlora.fleet.stores import damage
from tests.registry.examples import BASE, adapter, code, evict, measurement, new_store, put, task, train, vector


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A new store."""
    with new_store(tmp_path / "store") as opened:
        yield opened


def one(store: Store, offered: Task, **options: Any) -> TaskIngested:
    """Record one task; raise its conflict."""
    told = options.pop("base_is_named", False)
    (outcome,) = record(store, [offered], named_bases={offered.name} if told else (), **options)
    if isinstance(outcome, TaskConflict):
        raise outcome
    return outcome


def state(store: Store) -> list[Task]:
    return list(store.tasks())


# New and known tasks


def test_a_new_task_is_added_with_its_adapters(store: Store) -> None:
    offered = task(store, "rust", steps=[80, 90], samples=put(store, b"samples"))
    outcome = one(store, offered)
    assert (outcome.status, outcome.new, outcome.version) == ("added", 3, 1)
    assert store.task("rust").adapters == offered.adapters


def test_the_same_offer_again_writes_nothing(store: Store) -> None:
    offered = task(store, "rust", steps=[80])
    one(store, offered)
    changes = store.changes()
    outcome = one(store, offered)
    assert (outcome.status, outcome.new, outcome.known, store.changes()) == ("known", 0, 2, changes)


def test_a_task_keeps_the_spelling_of_its_name(store: Store) -> None:
    one(store, task(store, "Rust", weights=b"same"))
    assert one(store, task(store, "RUST", weights=b"same")).task == "Rust"


def test_an_adapter_offered_twice_is_recorded_once(store: Store) -> None:
    offered = task(store, "rust", steps=[80])
    outcome = one(store, replace(offered, checkpoints=offered.checkpoints * 2))
    assert (outcome.new, outcome.known) == (2, 1)
    assert len(store.task("rust").checkpoints) == 1


def test_new_checkpoints_and_texts_are_added_in_order_of_steps(store: Store) -> None:
    one(store, task(store, "rust", steps=[80]))
    outcome = one(store, task(store, "rust", steps=[90, 10], eval_data=put(store, b"held out")))
    assert (outcome.status, outcome.new, outcome.known) == ("updated", 2, 1)
    assert [checkpoint.step for checkpoint in store.task("rust").checkpoints] == [10, 80, 90]
    assert store.task("rust").eval_data == digest_of(b"held out")


def test_a_known_adapter_keeps_the_place_it_first_came_from(store: Store) -> None:
    one(store, task(store, "rust"))
    moved = task(store, "rust")
    one(store, replace(moved, final=replace(moved.final, source="/elsewhere/rust")))
    assert store.task("rust").final.source == "loras/example"


def test_other_samples_make_the_vectors_wrong(store: Store) -> None:
    one(store, task(store, "rust", samples=put(store, b"samples")))
    store.update("rust", lambda known: replace(known, vectors=(vector(store),)))
    assert one(store, task(store, "rust", samples=put(store, b"samples"))).status == "known"
    one(store, task(store, "rust", samples=put(store, b"other samples")))
    assert store.task("rust").vectors == ()


def test_later_files_next_to_an_adapter_are_added_to_its_extras(store: Store) -> None:
    first, later, lost = (Extra(blob=put(store, name), file=name.decode(), size=1) for name in (b"a", b"b", b"c"))
    offered = task(store, "rust")
    one(store, replace(offered, final=replace(offered.final, extras=(first, lost))))
    one(store, replace(offered, final=replace(offered.final, extras=(first, later))))
    assert {extra.file for extra in store.task("rust").final.extras} == {"a", "b", "c"}


def test_initial_weights_found_later_describe_the_adapter_anew(store: Store) -> None:
    plain = task(store, "rust")
    one(store, replace(plain, final=replace(plain.final, original_only="it needs its initial weights")))
    initial = put(store, b"initial")
    one(store, replace(plain, final=replace(plain.final, initial=initial)))
    assert (store.task("rust").final.initial, store.task("rust").final.original_only) == (initial, None)


# Versions and conflicts


def test_another_adapter_from_the_same_folder_is_the_next_version(store: Store) -> None:
    one(store, task(store, "rust", steps=[80], samples=put(store, b"samples"), tags=("prod",), note="mine"))
    generator = train(store, ["rust"])
    before = store.update(
        "rust",
        lambda known: replace(known, vectors=(vector(store),), measured=(measurement(generator=str(generator.blob)),)),
    )
    outcome = one(store, task(store, "rust", weights=b"trained again", steps=[80, 90]))
    now = store.task("rust")
    assert (outcome.status, outcome.version, outcome.new, outcome.known) == ("version", 2, 2, 1)
    assert (now.tags, now.note, now.samples, now.created_at) == (("prod",), "mine", before.samples, before.created_at)
    assert (now.code, now.vectors, now.measured) == (None, (), ())
    assert store.task("rust@1") == before


def test_a_final_adapter_from_another_checkpoint_of_the_run_is_the_next_version(store: Store) -> None:
    def run(step: int) -> Task:
        offered = task(store, "rust", steps=range(step))
        final = adapter(store, b"at %d" % step, step=step, source=f"/runs/rust/epoch_{step}")
        checkpoints = (replace(one, source=f"/runs/rust/epoch_{one.step}") for one in offered.checkpoints)
        return replace(offered, final=final, checkpoints=tuple(checkpoints))

    one(store, run(2))
    assert one(store, run(3)).version == 2


def test_another_folder_conflicts_until_the_user_decides(store: Store) -> None:
    one(store, task(store, "rust"))
    other = task(store, "rust", weights=b"other")
    other = replace(other, final=replace(other.final, source="/elsewhere"))
    before = state(store)
    for choice in (None, "fail"):
        with pytest.raises(TaskConflict, match="already exists with a different adapter"):
            one(store, other, on_conflict=choice)
    assert one(store, other, on_conflict="skip") == TaskIngested("rust", "skipped", 0, 0, base_model=BASE)
    assert state(store) == before
    assert one(store, other, on_conflict="version").version == 2


def test_a_conflict_leaves_the_other_tasks_of_the_batch_alone(store: Store) -> None:
    one(store, task(store, "rust"))
    offers = [task(store, name, weights=b"other") for name in ("html", "rust")]
    added, conflict = record(store, offers, on_conflict="fail")
    assert isinstance(added, TaskIngested)
    assert (added.status, isinstance(conflict, TaskConflict)) == ("added", True)
    assert store.names() == ["html", "rust"]


def test_a_batch_needs_valid_and_different_names(store: Store) -> None:
    for names, error in ((["../rust"], InvalidName), (["rust", "RUST"], ValueError)):
        with pytest.raises(error):
            record(store, [replace(task(store, "rust"), name=name) for name in names])
    assert state(store) == []


# Base models


def test_a_task_without_a_base_model_gets_the_one_that_the_user_names(store: Store) -> None:
    offered = task(store, "rust", base_model=UNKNOWN_BASE)
    one(store, offered)
    told = replace(offered, base_model="acme/told")
    assert one(store, told).base_model == UNKNOWN_BASE  # an adapter that names one elsewhere does not move it
    outcome = one(store, told, base_is_named=True)
    assert (outcome.status, store.task("rust").base_model) == ("updated", "acme/told")


def test_another_base_model_for_the_same_adapter_is_a_version_only_if_asked(store: Store) -> None:
    offered = task(store, "rust")
    one(store, offered)
    other = replace(offered, base_model="acme/other")
    with pytest.raises(TaskConflict, match="belongs to base model"):
        one(store, other, base_is_named=True)
    outcome = one(store, other, base_is_named=True, on_conflict="version")
    assert (outcome.version, store.task("rust").base_model) == (2, "acme/other")


# Evicted adapters


@pytest.mark.parametrize("restore", [False, True])
def test_evicted_adapters_stay_evicted_unless_they_are_restored(store: Store, restore: bool) -> None:
    offered = task(store, "rust", steps=[80], note="mine")
    one(store, offered)
    train(store, ["rust"])
    known = evict(store, "rust")
    offered = task(store, "rust", steps=[80])  # stores the bytes again
    outcome = one(store, offered, restore=restore)
    assert (outcome.evicted, outcome.restored) == ((0, 2) if restore else (2, 0))
    assert store.task("rust").final.is_evicted is not restore
    assert (store.task("rust").code, store.task("rust").note) == (known.code, "mine")


def test_a_next_version_keeps_the_checkpoints_of_the_run_evicted(store: Store) -> None:
    one(store, task(store, "rust", steps=[80]))
    evict(store, "rust")
    outcome = one(store, task(store, "rust", weights=b"trained again", steps=[80, 90]))
    assert (outcome.evicted, outcome.new) == (1, 2)
    assert [checkpoint.is_evicted for checkpoint in store.task("rust").checkpoints] == [True, False]
    assert not store.task("rust").final.is_evicted


def test_the_weights_of_an_adapter_from_a_bundle_are_taken(store: Store) -> None:
    offered = task(store, "rust")
    far = replace(offered.final, source=bundle_source("ab" * 32), evicted_at="2026-01-02T03:04:05Z")
    store.publish([replace(offered, final=far, code=code(store, "rust"))])
    outcome = one(store, offered)
    known = store.task("rust")
    assert (outcome.status, outcome.restored) == ("updated", 1)
    assert (known.final.is_evicted, known.final.source, known.code is None) == (False, "loras/example", False)


def test_weights_that_were_withheld_are_missed_where_a_task_needs_them(store: Store) -> None:
    offered = task(store, "rust")
    store.blobs.delete([offered.final.weights])
    with pytest.raises(MissingBlob):
        one(store, offered, withheld={str(offered.final.weights)})
    assert state(store) == []


# Races and plans


def test_a_task_that_another_process_changed_is_decided_again(store: Store) -> None:
    one(store, task(store, "rust"))
    read = {"rust": store.task("rust")}
    store.update("rust", lambda known: replace(known, note="meanwhile"))
    outcomes = record(store, [task(store, "rust", steps=[80])], read)
    assert [outcome.status for outcome in outcomes if isinstance(outcome, TaskIngested)] == ["updated"]
    assert (store.task("rust").note, len(store.task("rust").checkpoints)) == ("meanwhile", 1)


def test_a_task_that_another_process_added_is_known(store: Store) -> None:
    offered = task(store, "rust")
    one(store, offered)
    (outcome,) = record(store, [offered], {})
    assert isinstance(outcome, TaskIngested)
    assert outcome.status == "known"


OFFERS = st.lists(
    st.tuples(
        st.sampled_from(["rust", "Rust", "html", "sql"]),
        st.sampled_from([b"one", b"two"]),
        st.lists(st.sampled_from([80, 90]), max_size=3).map(tuple),
        st.none() | st.sampled_from([b"samples", b"others"]),
    ),
    max_size=3,
    unique_by=lambda made: made[0].lower(),
)
Offers = list[tuple[str, bytes, tuple[int, ...], bytes | None]]


@contextmanager
def fresh_store() -> Iterator[Store]:
    with tempfile.TemporaryDirectory() as folder, new_store(Path(folder) / "store") as store:
        yield store


def batch(store: Store, offers: Offers) -> list[Task]:
    return [
        task(
            store,
            name,
            weights=weights,
            steps=steps,
            samples=None if samples is None else put(store, samples),
        )
        for name, weights, steps, samples in offers
    ]


def told(outcomes: Sequence[TaskIngested | TaskConflict]) -> list[TaskIngested | str]:
    return [str(one) if isinstance(one, TaskConflict) else one for one in outcomes]


@pytest.mark.slow
@given(OFFERS, OFFERS, st.sampled_from([None, *get_args(OnConflict)]))
def test_a_dry_run_comes_true_and_the_second_time_all_is_known(
    first: Offers, second: Offers, on_conflict: OnConflict | None
) -> None:
    with fresh_store() as store:
        record(store, batch(store, first))
        before, offers = state(store), batch(store, second)
        planned = told(record(store, offers, on_conflict=on_conflict, dry_run=True))
        assert state(store) == before
        assert told(record(store, offers, on_conflict=on_conflict)) == planned
        after = state(store)
        again = record(store, offers, on_conflict=on_conflict)
        assert {one.status for one in again if isinstance(one, TaskIngested)} <= {"known", "skipped"}
        assert state(store) == after


@pytest.mark.slow
@given(OFFERS)
def test_one_batch_and_one_task_at_a_time_end_in_the_same_tasks(offers: Offers) -> None:
    def contents(store: Store) -> list[object]:
        return [(one.name, one.samples, [(a.weights, a.step, a.source) for a in one.adapters]) for one in store.tasks()]

    with fresh_store() as together, fresh_store() as apart:
        record(together, batch(together, offers))
        for offer in batch(apart, list(reversed(offers))):
            record(apart, [offer])
        assert contents(together) == contents(apart)


def test_without_a_store_every_task_is_new(store: Store) -> None:
    offers = [task(store, name, steps=[80]) for name in ("rust", "html")]
    planned = record(None, offers)
    assert planned == record(store, offers)
    assert [outcome.status for outcome in planned if isinstance(outcome, TaskIngested)] == ["added", "added"]


# Known tasks


def placed(store: Store, name: str, source: str, *checkpoints: str) -> Task:
    final = adapter(store, name.encode(), source=source)
    others = tuple(
        adapter(store, f"{name} {step}".encode(), step=step, source=at) for step, at in enumerate(checkpoints)
    )
    return replace(task(store, name), final=final, checkpoints=others)


def test_known_tasks_are_found_by_name_in_any_case_also_of_letters_beyond_ascii(store: Store) -> None:
    store.publish([task(store, name) for name in ("Rust", "CAFÉ-Rust", "sql")])
    found = KnownTasks(store).named(["RUST", "café-rust", "css", "no-sql"])
    assert {name: row.name for name, row in found.items()} == {"rust": "Rust", "café-rust": "CAFÉ-Rust"}


def test_known_tasks_are_found_by_the_folder_of_their_run(store: Store) -> None:
    runs = {"rust": "/runs/rust", "sql": "/runs/sql/checkpoint-9", "copy": "/runs/rust", "other": "/runs/other"}
    store.publish([placed(store, name, source) for name, source in runs.items()])
    found = KnownTasks(store).in_folders(["/runs/rust", "/runs/sql", "/runs"])
    assert {folder: [row.name for row in rows] for folder, rows in found.items()} == {
        "/runs/rust": ["copy", "rust"],
        "/runs/sql": ["sql"],
    }


def test_known_tasks_are_found_by_the_ends_of_their_names_in_any_case(store: Store) -> None:
    names = ("a-Rust", "b-c-rust", "rust", "arust", "x-rusty", "É-rust", "a-É", "a-sql", "a-b-sql")
    store.publish([task(store, name) for name in names])
    found = {row.name for row in KnownTasks(store).ending_with(["RUST", "é", "b-sql", "css"])}
    assert found == {"a-Rust", "b-c-rust", "É-rust", "a-É", "a-b-sql"}


def test_known_tasks_are_found_by_the_weights_or_the_tensors_of_final_adapters(store: Store) -> None:
    tasks = [placed(store, name, f"/runs/{name}", f"/runs/{name}/checkpoint-0") for name in ("rust", "sql", "css")]
    keys = ("00" * 8, "01" * 8, "02" * 8)
    store.publish([replace(t, final=replace(t.final, tensors_key=key)) for t, key in zip(tasks, keys, strict=True)])
    same_file = replace(tasks[0].final, tensors_key=None)
    same_tensors = replace(tasks[1].checkpoints[0], tensors_key=keys[1])
    found = KnownTasks(store).with_tensors_of([same_file, same_tensors])
    assert [row.name for row in found] == ["rust", "sql"]


def test_a_damaged_manifest_is_noticed_only_where_it_is_read(store: Store) -> None:
    published = store.publish([task(store, name) for name in ("rust", "sql")])
    damage(Path(store.manifests.place(str(published[1].manifest))))
    with new_store(store.address) as again:
        found = KnownTasks(again).tasks(["rust", "SQL", "css"])
        rows = KnownTasks(again).named(["sql"])
        assert KnownTasks(again).task(rows["sql"]) is None
    assert (found["rust"], found.keys()) == (published[0], {"rust", "sql"})
    assert isinstance(found["sql"], DamagedStore)


def test_without_a_store_no_task_is_known(store: Store) -> None:
    known, final = KnownTasks(None), task(store, "rust").final
    found = [known.named(["a"]), known.in_folders(["/a"]), known.with_tensors_of([final]), known.tasks(["a"])]
    assert [*found, list(known.ending_with(["a"]))] == [{}, {}, [], {}, []]
