"""The map: clusters, silhouettes, points in the plane, pairs that are alike, outliers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, strategies as st
from numpy.typing import NDArray

from icmlora.task_vectors.distances import VectorSpace, cosine_distances, mean_vectors, task_distances
from icmlora.task_vectors.map import PAIRS, map_tasks

Floats = NDArray[np.float64]
SEEDS = st.integers(0, 2**32 - 1)
CHANNELS = 24


def groups(seed: int = 0, sizes: tuple[int, ...] = (4, 3, 2), sets: int = 4, apart: float = 0.4) -> dict[str, Floats]:
    """Return vectors of tasks in groups; the first letter of a name is the group's."""
    random = np.random.default_rng(seed)
    middles = random.standard_normal((len(sizes), CHANNELS))
    return {
        f"{'abcdef'[group]}{number}": middles[group]
        + apart * random.standard_normal(CHANNELS)
        + 0.2 * random.standard_normal((sets, CHANNELS))
        for group, size in enumerate(sizes)
        for number in range(size)
    }


def test_groups_become_clusters_the_largest_first() -> None:
    found = map_tasks(groups())
    assert [sorted(task.name for task in members) for members in found.clusters] == [
        ["a0", "a1", "a2", "a3"],
        ["b0", "b1", "b2"],
        ["c0", "c1"],
    ]


@given(SEEDS)
def test_the_map_does_not_depend_on_the_order_of_the_tasks(seed: int) -> None:
    tasks = groups(seed)
    names = [str(name) for name in np.random.default_rng(seed).permutation(list(tasks))]
    one = {task.name: task for task in map_tasks(tasks).tasks}
    other = {task.name: task for task in map_tasks({name: tasks[name] for name in names}).tasks}
    assert [one[name].point for name in tasks] == [pytest.approx(other[name].point, abs=1e-6) for name in tasks]
    assert [one[name].nearest.task for name in tasks] == [other[name].nearest.task for name in tasks]
    assert [one[name].silhouette for name in tasks] == pytest.approx(
        [other[name].silhouette for name in tasks], abs=1e-8
    )


@given(SEEDS)
def test_both_silhouettes_lie_between_minus_one_and_one(seed: int) -> None:
    found = map_tasks(groups(seed))
    assert -1 <= (found.silhouette_by_task or 0.0) <= 1
    assert -1 <= (found.silhouette_by_cluster or 0.0) <= 1


def test_three_tasks_lie_in_the_plane_as_far_apart_as_they_are() -> None:
    tasks = groups(sizes=(1, 1, 1))
    found = map_tasks(tasks)
    points = np.array([task.point for task in found.tasks])
    # Directions of cosine distance d are sqrt(2 d) apart, and three points always fit into a plane.
    squares = np.square(points[:, None] - points[None]).sum(axis=-1)
    assert squares / 2 == pytest.approx(task_distances(tasks), abs=1e-8)
    assert sum(found.variation) == pytest.approx(1.0)


def test_the_first_axis_shows_the_most() -> None:
    first, second = map_tasks(groups()).variation
    assert 1 > first >= second > 0


def test_a_tasks_point_is_the_mean_of_its_support_sets() -> None:
    for task in map_tasks(groups()).tasks:
        assert np.mean(task.support_sets, axis=0) == pytest.approx(task.point, abs=1e-8)


def test_tasks_that_differ_more_than_their_support_sets_can_be_told_apart() -> None:
    clear = map_tasks(groups(apart=2.0)).silhouette_by_task
    blurred = map_tasks(groups(apart=0.05)).silhouette_by_task
    assert clear is not None
    assert blurred is not None
    assert clear > 0.7 > 0.2 > blurred


def test_single_support_sets_say_nothing_of_whether_tasks_can_be_told_apart() -> None:
    assert map_tasks(groups(sets=1)).silhouette_by_task is None


def test_one_cluster_has_no_silhouette() -> None:
    assert map_tasks(groups(), 1).silhouette_by_cluster is None


def test_the_nearest_pair_comes_first_with_its_distance() -> None:
    tasks = groups()
    pair, *others = map_tasks(tasks).pairs
    names = list(tasks)
    distances = task_distances(tasks)
    assert pair.distance == distances[names.index(pair.tasks[0]), names.index(pair.tasks[1])]
    assert pair.distance == distances[np.triu_indices(len(names), 1)].min()
    assert [other.distance for other in others] == sorted(other.distance for other in others)


def alike_by_definition(tasks: dict[str, Floats], one: str, other: str) -> bool:
    space = VectorSpace.of(tasks)
    first, second = space.place(tasks[one]), space.place(tasks[other])
    within = [
        cosine_distances(vectors, vectors)[np.triu_indices(len(vectors), 1)].mean() for vectors in (first, second)
    ]
    return bool(cosine_distances(first, second.copy()).mean() <= 1.1 * max(within))


@given(SEEDS)
def test_pairs_are_alike_by_the_definition(seed: int) -> None:
    tasks = groups(seed, apart=0.1)
    found = map_tasks(tasks)
    assert all(pair.is_alike == alike_by_definition(tasks, *pair.tasks) for pair in found.pairs)
    assert all(pair.is_alike for pair in found.pairs[PAIRS:])


def test_two_vectors_of_one_task_under_two_names_are_alike_and_no_others() -> None:
    tasks = groups(sets=8, apart=1.0)
    tasks["a0"], tasks["copy"] = tasks["a0"][:4], tasks["a0"][4:]
    assert [pair.tasks for pair in map_tasks(tasks).pairs if pair.is_alike] == [("a0", "copy")]


def test_a_task_that_is_far_from_all_in_a_crowd_is_an_outlier() -> None:
    tasks = groups(sizes=(12,), apart=0.1)
    tasks = {
        name: vectors + 10.0 * np.eye(CHANNELS)[number % 2] for number, (name, vectors) in enumerate(tasks.items())
    }
    tasks["odd"] = np.random.default_rng(5).standard_normal((4, CHANNELS)) * 0.1 + 10.0 * np.eye(CHANNELS)[9]
    assert [task.name for task in map_tasks(tasks).tasks if task.is_outlier] == ["odd"]


def test_the_same_vectors_under_every_name_make_a_map_of_one_place() -> None:
    vectors = mean_vectors(groups())
    found = map_tasks({"a": vectors, "b": vectors, "c": vectors})
    assert {task.point for task in found.tasks} == {(0.0, 0.0)}
    assert found.typical == 0.0


def equally_far(seed: int) -> dict[str, Floats]:
    """Return four tasks that are as far from each other as any two, and another two that are copies of one."""
    noise = 0.1 * np.random.default_rng(seed).standard_normal((6, 2, CHANNELS))
    noise -= noise.mean(axis=1, keepdims=True)
    return {"abcdef"[task]: np.eye(CHANNELS)[min(task, 4)] + noise[min(task, 4)] for task in range(6)}


def on_a_line(seed: int) -> dict[str, Floats]:
    """Return three tasks of which two are copies, so that around their mean all lie on one line."""
    return {name: vectors for name, vectors in equally_far(seed).items() if name in "def"}


@given(SEEDS, st.sampled_from([equally_far, on_a_line]))
def test_the_last_bits_of_the_vectors_change_nothing_that_a_map_shows(
    seed: int, fleet: Callable[[int], dict[str, Floats]]
) -> None:
    tasks, random = fleet(seed), np.random.default_rng(seed + 1)
    shaken = {name: vectors * (1.0 + 1e-15 * random.standard_normal(vectors.shape)) for name, vectors in tasks.items()}
    one, other = map_tasks(tasks), map_tasks(shaken)
    for mine, its in zip(one.tasks, other.tasks, strict=True):
        assert (mine.cluster, mine.nearest.task, mine.is_outlier) == (its.cluster, its.nearest.task, its.is_outlier)
        assert (mine.point, mine.silhouette) == (
            pytest.approx(its.point, abs=1e-6),
            pytest.approx(its.silhouette, abs=1e-8),
        )
        assert np.array(mine.support_sets) == pytest.approx(np.array(its.support_sets), abs=1e-6)
    assert [(pair.tasks, pair.is_alike) for pair in one.pairs] == [(pair.tasks, pair.is_alike) for pair in other.pairs]
    assert (one.pairs[0].tasks, one.pairs[0].distance, other.pairs[0].distance) == (("e", "f"), 0.0, 0.0)


def test_two_tasks_make_no_map() -> None:
    with pytest.raises(ValueError, match="3 tasks"):
        map_tasks(groups(sizes=(2,)))
