"""Plans and ingests of any batch: the plan comes true, and the same again changes nothing."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from registry.errors import InvalidName, TaskConflict
from registry.records import OnConflict, TaskIngest
from registry.store import Store
from tests.registry.every_row import everything, fill
from tests.registry.examples import ingest, new_store, offer
from tests.shared import paths_of

Offers = list[tuple[str, bytes, tuple[int, ...], bytes | None]]

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


@contextmanager
def fresh_store() -> Iterator[Store]:
    with tempfile.TemporaryDirectory() as folder, new_store(Path(folder) / "store") as store:
        yield store


def batch(store: Store, offers: Offers, on_conflict: OnConflict) -> list[TaskIngest]:
    return [
        offer(store, name, weights=weights, steps=steps, samples=samples, on_conflict=on_conflict)
        for name, weights, steps, samples in offers
    ]


@pytest.mark.slow
@given(OFFERS, OFFERS, st.sampled_from(get_args(OnConflict)))
def test_a_plan_comes_true_and_the_second_time_all_is_known(
    first: Offers, second: Offers, on_conflict: OnConflict
) -> None:
    with fresh_store() as store:
        store.tasks.ingest(batch(store, first, "fail"))
        before, tasks = list(store.tasks.summaries()), batch(store, second, on_conflict)
        try:
            planned = store.tasks.plan_ingest(tasks)
        except TaskConflict:
            with pytest.raises(TaskConflict):
                store.tasks.ingest(tasks)
            assert list(store.tasks.summaries()) == before
            return
        assert list(store.tasks.summaries()) == before  # a plan writes nothing
        assert store.tasks.ingest(tasks) == planned
        after = everything(store)
        again = store.tasks.ingest(tasks)
        assert {outcome.status for outcome in again} <= {"known", "skipped"}
        assert sum(outcome.new for outcome in again) == 0
        assert everything(store) == after


@pytest.mark.slow
@given(OFFERS)
def test_one_batch_and_one_task_at_a_time_end_in_the_same_store(offers: Offers) -> None:
    def contents(store: Store) -> list[object]:
        return [
            (task.name, task.samples, [(row.weights, row.step, row.source) for row in store.tasks.adapters(task.name)])
            for task in store.tasks.all()
        ]

    with fresh_store() as together, fresh_store() as apart:
        together.tasks.ingest(batch(together, offers, "fail"))
        for task in batch(apart, list(reversed(offers)), "fail"):
            apart.tasks.ingest([task])
        assert contents(together) == contents(apart)
        assert together.usage().originals == apart.usage().originals


@pytest.mark.parametrize("broken", ["name", "twice", "final"])
def test_one_bad_task_keeps_the_whole_batch_out(store: Store, broken: str) -> None:
    good, bad = offer(store, "rust"), offer(store, "html")
    bad = {
        "name": replace(bad, name="../html"),
        "twice": replace(bad, name="RUST"),
        "final": replace(bad, adapters=bad.adapters * 2),
    }[broken]
    with pytest.raises((InvalidName, ValueError)):
        store.tasks.ingest([good, bad])
    assert list(store.tasks.all()) == []


def test_an_empty_batch_is_no_work(store: Store) -> None:
    assert store.tasks.ingest([]) == []
    assert store.tasks.plan_ingest([]) == []


def test_a_task_keeps_the_folder_it_first_came_from(store: Store) -> None:
    first = offer(store, "rust")
    store.tasks.ingest([first])
    moved = [replace(row, source="elsewhere/example") for row in offer(store, "rust", steps=[80]).adapters]
    store.tasks.ingest([replace(first, adapters=moved)])
    assert {row.step: row.source for row in store.tasks.adapters("rust")} == {
        None: "loras/example",
        80: "elsewhere/example",
    }


@pytest.mark.slow
@pytest.mark.kept_in("sqlite", "folder", reason="it copies the folder of a store")
def test_a_store_with_everything_in_it_reads_the_same_when_it_is_copied(store: Store, tmp_path: Path) -> None:
    fill(store)
    before = everything(store)
    copy = shutil.copytree(paths_of(store).root, tmp_path / "copy")
    with Store.open(copy, read_only=True) as opened:
        assert everything(opened) == before
        assert [finding for finding in opened.verify(read_data=True) if finding.is_problem] == []


@pytest.mark.parametrize("names", [["rust", "RUST"], ["html", "rust", "Html"]])
def test_a_task_named_twice_is_pinned_and_removed_once(store: Store, names: Sequence[str]) -> None:
    for name in ("rust", "html"):
        ingest(store, name)
    wanted = Counter(name.lower() for name in names)
    assert Counter(task.name for task in store.tasks.edit(names, pinned=True)) == Counter(dict.fromkeys(wanted, 1))
    assert Counter(task.name for task in store.tasks.remove(names)) == Counter(dict.fromkeys(wanted, 1))
