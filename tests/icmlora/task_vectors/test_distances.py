"""Distances between tasks, and how far a new one lies from the known ones against how far those lie from each other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st
from numpy.typing import NDArray

from icmlora.task_vectors import distances
from icmlora.task_vectors.distances import (
    MeanVectors,
    VectorSpace,
    cosine_distances,
    directions,
    distances_from,
    familiarity,
    mean_vectors,
    nearest,
    task_distances,
)

Floats = NDArray[np.float64]
SEEDS = st.integers(0, 2**32 - 1)
CHANNELS = 24


def fleet(seed: int = 0, tasks: int = 8, sets: int = 4, noise: float = 0.2) -> dict[str, Floats]:
    """Return vectors of tasks that share a large common part, with one channel larger than all others."""
    random = np.random.default_rng(seed)
    common = 5.0 * random.standard_normal(CHANNELS)
    size = np.where(np.arange(CHANNELS) == 3, 50.0, 1.0)
    return {
        f"task-{number}": size
        * (common + random.standard_normal(CHANNELS) + noise * random.standard_normal((sets, CHANNELS)))
        for number in range(tasks)
    }


def without(tasks: dict[str, Floats], name: str) -> dict[str, Floats]:
    return {other: vectors for other, vectors in tasks.items() if other != name}


@given(SEEDS)
def test_distances_are_one_less_the_cosine(seed: int) -> None:
    one, other = np.random.default_rng(seed).standard_normal((2, 5, 7))
    expected = [[1 - a @ b / np.sqrt((a @ a) * (b @ b)) for b in other] for a in one]
    assert cosine_distances(one, other) == pytest.approx(np.array(expected), abs=1e-8)


@given(SEEDS)
def test_distances_between_tasks_are_symmetric_and_zero_on_the_diagonal(seed: int) -> None:
    distances = task_distances(fleet(seed))
    assert np.array_equal(distances, distances.T)
    assert not distances.diagonal().any()
    assert 0 <= distances.min() <= distances.max() <= 2


@given(SEEDS, st.floats(0.01, 100.0))
def test_neither_a_common_part_nor_the_units_of_channels_change_distances(seed: int, factor: float) -> None:
    tasks = fleet(seed)
    moved = {name: factor * vectors + 7.0 for name, vectors in tasks.items()}
    assert task_distances(moved) == pytest.approx(task_distances(tasks), abs=1e-8)


@given(SEEDS)
def test_the_last_bits_of_a_sum_are_no_distance(seed: int) -> None:
    one = np.random.default_rng(seed).standard_normal((3, 576))
    other = one * (1.0 + 1e-15 * np.random.default_rng(seed + 1).standard_normal(one.shape))
    assert cosine_distances(one, other).diagonal().tolist() == [0.0] * 3


def test_distances_from_one_task_are_a_row_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = fleet()
    known = MeanVectors.of(tasks)
    for chunk in (1, 3, 100):
        monkeypatch.setattr(distances, "_CHUNK", chunk)
        assert [distances_from(place, known).tolist() for place in range(len(tasks))] == task_distances(tasks).tolist()


@given(SEEDS, st.integers(1, 7))
def test_means_of_parts_make_those_of_the_whole(seed: int, count: int) -> None:
    tasks = fleet(seed)
    names = list(tasks)
    parts = [MeanVectors.of({name: tasks[name] for name in some}) for some in (names[count:], names[:count])]
    order = names[count:] + names[:count]
    joined = MeanVectors.joined(parts).ordered([order.index(name) for name in names])
    whole = MeanVectors.of(tasks)
    assert np.array_equal(joined.means, whole.means)
    assert joined.squares == pytest.approx(whole.squares)
    assert joined.freedom == whole.freedom


def test_one_large_channel_does_not_decide() -> None:
    tasks = fleet()
    plain = mean_vectors(tasks) - mean_vectors(tasks).mean(axis=0)
    rest = np.delete(directions(plain), 3, axis=1)
    assert np.median(np.square(rest).sum(axis=1)) < 0.05
    placed = directions(VectorSpace.of(tasks).place(mean_vectors(tasks)))
    assert np.median(np.square(np.delete(placed, 3, axis=1)).sum(axis=1)) > 0.7


def test_a_channel_that_differs_between_support_sets_of_one_task_counts_for_less() -> None:
    tasks = fleet(noise=0.1)
    random = np.random.default_rng(1)
    for vectors in tasks.values():
        vectors[:, 5] += 100.0 * random.standard_normal(len(vectors))
    placed = directions(VectorSpace.of(tasks).place(mean_vectors(tasks)))
    unit = VectorSpace.of(tasks).unit
    assert unit[5] > 50 * np.median(unit)
    assert np.square(placed[:, 5]).mean() < 5 / CHANNELS


def test_tasks_with_one_support_set_each_have_distances_too() -> None:
    distances = task_distances(fleet(sets=1))
    assert distances[~np.eye(8, dtype=bool)].min() > 0.1


def test_the_number_of_support_sets_does_not_change_where_a_task_lies() -> None:
    tasks = fleet()
    repeated = {
        name: np.concatenate([vectors, vectors]) if name == "task-2" else vectors for name, vectors in tasks.items()
    }
    assert np.allclose(mean_vectors(repeated), mean_vectors(tasks))


def test_tasks_that_are_all_the_same_are_in_one_place() -> None:
    vectors = np.ones((4, CHANNELS))
    assert not task_distances({"a": vectors, "b": vectors, "c": vectors}).any()


def test_the_nearest_of_a_tasks_own_vector_is_the_task() -> None:
    tasks = fleet()
    assert nearest(tasks["task-3"].mean(axis=0), tasks)[0].task == "task-3"


def test_neighbours_are_all_known_tasks_nearest_first() -> None:
    tasks = fleet()
    found = nearest(np.zeros(CHANNELS), tasks)
    assert {neighbour.task for neighbour in found} == set(tasks)
    assert [neighbour.distance for neighbour in found] == sorted(neighbour.distance for neighbour in found)


def test_neighbours_at_one_distance_are_ranked_by_name() -> None:
    other = np.array([1.0, 0.0, 0.0])
    known = {name: np.array([vector]) for name, vector in (("b", [0.0, 1, 0]), ("c", other), ("a", [0.0, 0, 1]))}
    assert [found.task for found in nearest(other, known)] == ["c", "a", "b"]


@given(SEEDS, st.integers(3, 9), st.integers(1, 4))
def test_the_usual_distances_are_those_of_each_known_task_as_if_it_were_the_new_one(
    seed: int, count: int, sets: int
) -> None:
    tasks = fleet(seed, count, sets)
    space = VectorSpace.of(tasks)
    expected = []
    for name, vectors in tasks.items():
        others = mean_vectors(without(tasks, name))
        around = others.mean(axis=0)
        one, rest = (vectors.mean(axis=0) - around) / space.unit, (others - around) / space.unit
        expected.append(cosine_distances(one[None], rest).min())
    assert familiarity(np.ones(CHANNELS), tasks).usual == pytest.approx(sorted(expected), abs=1e-8)


def groups(seed: int = 0) -> dict[str, Floats]:
    """Return 24 tasks in six groups, so that each has a near one."""
    random = np.random.default_rng(seed)
    middles = random.standard_normal((6, CHANNELS))
    return {
        f"{group}-{number}": middles[group]
        + 0.4 * random.standard_normal(CHANNELS)
        + 0.2 * random.standard_normal((4, CHANNELS))
        for group in range(6)
        for number in range(4)
    }


def test_a_task_like_the_known_ones_is_not_outside() -> None:
    tasks = groups()
    found = familiarity(tasks["2-1"].mean(axis=0), without(tasks, "2-1"))
    assert found.neighbours[0].task.startswith("2-")
    assert (found.is_outside, found.distance) == (False, found.neighbours[0].distance)


def test_a_task_that_has_nothing_in_common_with_the_known_ones_is_outside() -> None:
    tasks = groups()
    _, _, rest = np.linalg.svd(VectorSpace.of(tasks).place(mean_vectors(tasks)))
    space = VectorSpace.of(tasks)
    found = familiarity(space.mean + 5.0 * space.unit * rest[-1], tasks)
    assert found.is_outside
    assert found.farther_than == 1.0


def test_a_task_like_the_known_ones_is_seldom_called_outside() -> None:
    fleets = [groups(seed) for seed in range(10)]
    called = [
        familiarity(vectors.mean(axis=0), without(tasks, name)).is_outside
        for tasks in fleets
        for name, vectors in tasks.items()
    ]
    assert 0.02 < np.mean(called) < 0.12  # two ranks of 24 are outside


def test_what_is_usual_does_not_follow_from_two_tasks() -> None:
    with pytest.raises(ValueError, match="3 tasks"):
        familiarity(np.zeros(CHANNELS), fleet(tasks=2))
