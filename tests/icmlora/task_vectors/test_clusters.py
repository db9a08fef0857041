"""Clusters are those of the definition, silhouettes too, and neither depends on the order of the points."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, strategies as st
from numpy.typing import NDArray

from icmlora.task_vectors.clusters import MAX_CLUSTERS, cluster, partitions, silhouettes

Floats = NDArray[np.float64]
SEEDS = st.integers(0, 2**32 - 1)


def distances_of(points: Floats) -> Floats:
    found: Floats = np.linalg.norm(points[:, None] - points[None], axis=-1)
    return found


def scattered(seed: int, count: int) -> Floats:
    return distances_of(np.random.default_rng(seed).standard_normal((count, 3)))


def heaps(*sizes: int, spread: float = 0.1) -> Floats:
    """Return distances of points in heaps that are ten apart."""
    random = np.random.default_rng(0)
    centres = np.repeat(10.0 * np.eye(len(sizes)), sizes, axis=0)
    return distances_of(centres + spread * random.standard_normal(centres.shape))


def silhouette_by_definition(distances: Floats, labels: list[int], point: int) -> float:
    """Rousseeuw's definition, a point at a time."""
    by_cluster = {
        name: [distances[point, other] for other, label in enumerate(labels) if label == name and other != point]
        for name in set(labels)
    }
    own = by_cluster.pop(labels[point])
    if not own or not by_cluster:
        return 0.0
    within, others = np.mean(own), min(np.mean(values) for values in by_cluster.values())
    return float((others - within) / max(within, others))


def linkage_by_definition(distances: Floats) -> list[set[frozenset[int]]]:
    """Average linkage, every mean over pairs of points taken anew."""
    groups = {frozenset([point]) for point in range(len(distances))}
    steps = [set(groups)]
    while len(groups) > 1:
        pairs = [tuple(pair) for pair in combinations(groups, 2)]
        one, other = min(pairs, key=lambda pair: distances[np.ix_(sorted(pair[0]), sorted(pair[1]))].mean())
        groups = (groups - {one, other}) | {one | other}
        steps.append(set(groups))
    return steps


def as_sets(labels: NDArray[np.int64]) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(labels == name).tolist()) for name in set(labels.tolist())}


@given(SEEDS, st.integers(2, 12))
def test_partitions_are_those_of_average_linkage_by_definition(seed: int, count: int) -> None:
    distances = scattered(seed, count)
    assert [as_sets(labels) for labels in partitions(distances)] == linkage_by_definition(distances)


@given(SEEDS, st.lists(st.integers(0, 3), min_size=2, max_size=12))
def test_silhouettes_are_those_of_the_definition(seed: int, labels: list[int]) -> None:
    distances = scattered(seed, len(labels))
    expected = [silhouette_by_definition(distances, labels, point) for point in range(len(labels))]
    assert silhouettes(distances, np.array(labels)) == pytest.approx(expected, abs=1e-8)


@given(SEEDS, st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_a_silhouette_lies_between_minus_one_and_one(seed: int, labels: list[int]) -> None:
    values = silhouettes(scattered(seed, len(labels)), np.array(labels))
    assert bool(((values >= -1) & (values <= 1)).all())


@given(SEEDS, st.integers(2, 12))
def test_clusters_do_not_depend_on_the_order(seed: int, count: int) -> None:
    distances = scattered(seed, count)
    order = np.random.default_rng(seed).permutation(count)
    mixed = cluster(distances[np.ix_(order, order)])
    back = np.empty(count, dtype=np.int64)
    back[order] = mixed
    assert as_sets(back) == as_sets(cluster(distances))


@pytest.mark.parametrize("sizes", [(4, 3, 3), (2, 2), (5, 1, 4, 2)])
def test_the_number_of_heaps_is_found(sizes: tuple[int, ...]) -> None:
    labels = cluster(heaps(*sizes))
    assert sorted(np.bincount(labels).tolist()) == sorted(sizes)


def test_the_largest_cluster_comes_first_and_then_the_one_of_the_first_point() -> None:
    assert cluster(heaps(2, 4, 2)).tolist() == [1, 1, 0, 0, 0, 0, 2, 2]


@pytest.mark.parametrize("clusters", [1, 2, 5, 9])
def test_as_many_clusters_as_are_asked_for(clusters: int) -> None:
    assert set(cluster(heaps(4, 5), clusters).tolist()) == set(range(clusters))


@pytest.mark.parametrize(("count", "clusters"), [(1, None), (3, 4), (3, 0), (3, -1)])
def test_clusters_that_there_cannot_be_are_refused(count: int, clusters: int | None) -> None:
    with pytest.raises(ValueError, match="number of points"):
        cluster(np.zeros((count, count)), clusters)


def test_points_in_one_place_are_clustered_all_the_same() -> None:
    assert set(cluster(np.zeros((5, 5))).tolist()) == {0, 1}
    assert silhouettes(np.zeros((4, 4)), np.array([0, 0, 1, 1])).tolist() == [0.0] * 4


def test_no_more_clusters_are_looked_for_than_can_be_shown() -> None:
    pairs = heaps(*[2] * (MAX_CLUSTERS + 10))
    assert cluster(pairs).max() + 1 == MAX_CLUSTERS
