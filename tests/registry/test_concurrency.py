"""Processes at the same time: nothing is lost, and none of them fails."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from registry.errors import TaskConflict
from registry.manifests import Run
from registry.store import Store
from tests.registry.children import run_together
from tests.registry.examples import adapter, ingest, new_store, put
from tests.registry.pairs import pair

pytestmark = pytest.mark.kept_in("folder", reason="a fork of a process that has used an object store uses none")

TIMEOUT = 60.0  # far above the need; the tests check that no process fails, not the speed


def names(root: Path) -> set[str]:
    with new_store(root) as store:
        return set(store.names())


def is_sound(root: Path) -> bool:
    with new_store(root) as store:
        return not any(finding.is_problem for finding in store.verify(read_data=True))


@pytest.mark.one_case
@pytest.mark.parametrize("attempt", range(5))
def test_eight_that_make_the_same_store_all_succeed(tmp_path: Path, attempt: int) -> None:
    root = tmp_path / "store"
    assert run_together(*[lambda: new_store(root, lock_timeout=TIMEOUT).close()] * 8) == [0] * 8
    assert is_sound(root)


@pytest.mark.slow
def test_ingests_of_overlapping_fleets_end_in_their_union(tmp_path: Path) -> None:
    root = tmp_path / "store"

    def ingest_from(first: int) -> None:
        with new_store(root, lock_timeout=TIMEOUT) as store:
            for number in range(first, first + 6):
                with suppress(TaskConflict):
                    ingest(store, f"task{number}", steps=[1])

    assert run_together(*[lambda first=first: ingest_from(first) for first in range(4)]) == [0] * 4  # type: ignore[misc]
    assert names(root) == {f"task{number}" for number in range(9)}
    with new_store(root) as store:
        assert all(len(task.adapters) == 2 for task in store.tasks())
    assert is_sound(root)


@pytest.mark.slow
def test_no_version_is_given_twice_and_no_change_is_lost(tmp_path: Path) -> None:
    root = tmp_path / "store"
    with new_store(root) as store:
        ingest(store, "rust")

    def change(who: int) -> None:
        with new_store(root, lock_timeout=TIMEOUT) as store:
            for number in range(5):
                final = adapter(store, f"{who} {number}".encode())
                store.update("rust", lambda known: replace(known, version=known.version + 1, final=final))  # noqa: B023
                store.update("rust", lambda known: replace(known, tags=(*known.tags, f"{who}.{number}")))  # noqa: B023

    assert run_together(*[lambda who=who: change(who) for who in range(4)]) == [0] * 4  # type: ignore[misc]
    with new_store(root) as store:
        assert [one.version for one in store.history("rust")] == list(range(1, 22))
        assert len(store.task("rust").tags) == 20
    assert is_sound(root)


@pytest.mark.slow
def test_pruning_and_removing_beside_ingests_and_readers_breaks_nothing(tmp_path: Path) -> None:
    root = tmp_path / "store"
    new_store(root).close()

    def ingest_again_and_again() -> None:
        for number in range(15):
            with new_store(root, lock_timeout=TIMEOUT) as store:
                if store.find(f"task{number}") is None:
                    ingest(store, f"task{number}", steps=[1, 2])

    def remove_and_prune() -> None:
        for _ in range(15):
            with new_store(root, lock_timeout=TIMEOUT) as store:
                for name in store.names()[:1]:
                    store.remove(store.named([name]))
                    store.free(names=[name])
                store.prune(grace=0)

    def read() -> None:
        for _ in range(30):
            with Store.open(pair.place_of(root)[0], read_only=True, lock_timeout=TIMEOUT) as store:
                for task in list(store.tasks()):
                    store.blobs.read(task.final.weights)

    assert run_together(ingest_again_and_again, remove_and_prune, read, read) == [0] * 4
    assert is_sound(root)


def test_runs_of_several_base_models_keep_their_checkpoints(tmp_path: Path) -> None:
    root = tmp_path / "store"
    new_store(root).close()

    def train(base: str) -> None:
        with new_store(root, lock_timeout=TIMEOUT) as store:
            run = Run(base_model=base, config={})
            for step in range(1, 20):
                weights = put(store, f"step {step} of {base}".encode())
                run = store.save_run(replace(run, step=step, weights=weights, optimizer=weights))

    assert run_together(*[lambda base=base: train(base) for base in "abc"]) == [0] * 3  # type: ignore[misc]
    assert is_sound(root)
