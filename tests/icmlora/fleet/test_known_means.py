"""`icm show` names the same nearest tasks whether it reads all vectors or the file with their means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from icmlora import Fleet
from icmlora.fleet.map import known_means
from icmlora.task_vectors.distances import Neighbour
from icmlora.task_vectors.file import vectors_to_bytes
from registry.manifests import Vector
from registry.store import Store
from tests.icmlora.fleet.stores import blob_of, damage
from tests.registry.examples import EXTRACTOR, ingest, new_store, put

TASKS = [f"task-{number}" for number in range(7)]


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fleet:
    """A fleet of seven tasks with vectors, of which any number is enough for a file."""
    monkeypatch.setattr(known_means, "_MIN_TASKS", 1)
    with new_store(tmp_path / "store") as store:
        for number, name in enumerate(TASKS):
            add(store, name, number)
    return Fleet(tmp_path / "store", cache=tmp_path / "cache")


def add(store: Store, name: str, seed: int) -> None:
    ingest(store, name)
    give_vectors(store, name, seed)


def give_vectors(store: Store, name: str, seed: int) -> None:
    """Record vectors of one to four support sets."""
    draw, sets = torch.Generator().manual_seed(seed), 1 + seed % 4
    values = torch.randn(1, 8, generator=draw) + torch.randn(sets, 8, generator=draw) / 3
    blob = put(store, vectors_to_bytes({"adapted": values}))
    vectors = [
        Vector(view="adapted", support_set=place, blob=blob, dim=8, extractor=EXTRACTOR) for place in range(sets)
    ]
    store.update(name, lambda task: replace(task, vectors=tuple(vectors)))


def means_file(fleet: Fleet) -> Path:
    (path,) = (fleet.path.parent / "cache" / "means").iterdir()
    return path


def from_vectors(fleet: Fleet, task: str) -> tuple[Neighbour, ...]:
    """Return the nearest tasks as somebody finds them who has no file."""
    return Fleet(fleet.path, cache=fleet.path.parent / "none" / task).show(task).nearest


def change(what: Callable[[Store], object]) -> Callable[[Fleet], None]:
    def do(fleet: Fleet) -> None:
        with Store.open(fleet.path) as store:
            what(store)

    return do


CHANGES = {
    "nothing": lambda fleet: None,
    "a new task": change(lambda store: add(store, "new", 20)),
    "two new tasks": change(lambda store: [add(store, name, seed) for name, seed in (("z", 21), ("b", 22))]),
    "another name": lambda fleet: fleet.edit(["task-2"], name="other"),
    "other vectors": change(lambda store: give_vectors(store, "task-3", 23)),
    "a task is gone": lambda fleet: fleet.remove(["task-4"]),
    "one comes and one goes": lambda fleet: (
        change(lambda store: add(store, "c", 24))(fleet),
        fleet.remove(["task-1"]),
    ),
    "exchanged": change(lambda store: [give_vectors(store, f"task-{one}", other) for one, other in ((2, 6), (6, 2))]),
    "another model": change(lambda store: ingest(store, "d", base_model="acme/other")),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_nearest_tasks_are_those_of_all_vectors_whatever_changed(fleet: Fleet, name: str) -> None:
    assert fleet.show("task-0").nearest == from_vectors(fleet, "task-0")
    CHANGES[name](fleet)
    for task in ("task-0", "task-5"):
        shown = fleet.show(task).nearest
        assert (shown, len(shown)) == (from_vectors(fleet, task), 5)


def test_files_of_vectors_are_not_read_again(fleet: Fleet) -> None:
    before = fleet.show("task-0")
    other = blob_of(fleet, fleet.show("task-1").task.vectors[0].blob)
    other.unlink()
    assert fleet.show("task-0") == before
    with Store.open(fleet.path) as store:
        add(store, "new", 20)
    assert "task-1" in {neighbour.task for task in ("task-0", "new") for neighbour in fleet.show(task).nearest}


@pytest.mark.parametrize("how", ["damaged", "cut off", "empty", "another file", "without a field"])
def test_a_file_that_is_not_as_it_was_written_is_made_again(fleet: Fleet, how: str) -> None:
    before, path = fleet.show("task-0").nearest, means_file(fleet)
    data = bytearray(path.read_bytes())
    if how == "damaged":  # a bit of the first mean
        with np.load(path) as found:
            place = data.index(found["means"].tobytes())
        data[place + 6] ^= 4
    new = {"damaged": data, "cut off": data[:-40], "empty": b"", "another file": b"means"}
    if how == "without a field":
        np.savez(path, names=np.array(TASKS))
    else:
        path.write_bytes(new[how])
    assert fleet.show("task-0").nearest == before
    assert known_means.KnownMeans.read(path) is not None


def test_no_flipped_bit_of_the_file_is_believed(fleet: Fleet) -> None:
    fleet.show("task-0")
    path = means_file(fleet)
    data, whole = path.read_bytes(), known_means.KnownMeans.read(path)
    for place in range(0, len(data), 3):
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        found = known_means.KnownMeans.read(path)
        assert found is None or repr(found) == repr(whole)


def test_a_task_whose_vectors_are_damaged_is_back_once_they_are_mended(fleet: Fleet) -> None:
    path = blob_of(fleet, fleet.show("task-1").task.vectors[0].blob)
    means_file(fleet).unlink()
    whole = path.read_bytes()
    damage(path)
    assert fleet.show("task-0").nearest == from_vectors(fleet, "task-0")
    path.write_bytes(whole)
    near = fleet.show("task-0").nearest
    assert near == Fleet(fleet.path, cache=fleet.path.parent / "later").show("task-0").nearest
    assert len(known_means.KnownMeans.read(means_file(fleet)).names) == len(TASKS)  # type: ignore[union-attr]


def test_manifests_are_not_read_again(fleet: Fleet) -> None:
    before = fleet.show("task-0")
    with Store.open(fleet.path) as store:
        place = Path(store.manifests.place(str(store.task("task-1").manifest)))
        store.update("task-2", lambda task: replace(task, note="others may change"))
    place.chmod(0o600)
    place.write_bytes(b"garbage")
    assert fleet.show("task-0").nearest == before.nearest
    assert "task-1" not in {neighbour.task for neighbour in from_vectors(fleet, "task-0")}


def test_another_version_than_the_current_one_has_no_neighbours(fleet: Fleet) -> None:
    with Store.open(fleet.path) as store:
        store.publish([replace(store.task("task-0"), version=2)])
    assert len(fleet.show("task-0").nearest) == 5
    assert fleet.show("task-0@1").nearest == ()


def test_a_cache_that_cannot_be_written_costs_time_alone(fleet: Fleet) -> None:
    (fleet.path.parent / "cache").write_bytes(b"no folder")
    assert fleet.show("task-0").nearest == from_vectors(fleet, "task-0")


def test_a_few_tasks_leave_no_file(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_means, "_MIN_TASKS", 8)
    assert len(fleet.show("task-0").nearest) == 5
    assert not (fleet.path.parent / "cache").exists()
