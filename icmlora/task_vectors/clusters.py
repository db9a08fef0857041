"""Clusters of points of which only the distances are known, and how distinct they are.

    distances (n, n) ──average linkage──▶ partitions into n, n - 1, ..., 1 clusters ──silhouette──▶ the best of them

Everything is deterministic: there is no start to draw, and the order of the points matters for exact ties only.

A fleet's task vectors as a map: which tasks are near each other, which groups they form, how distinct those are.

    vectors a task ──vector_space──▶ distances (n, n) ──clustering──▶ clusters ──▶ silhouette over tasks, by cluster
          │                            `── classical scaling ──▶ points (n, 2)
          `──▶ distances between vectors ──▶ silhouette over vectors, by task: can tasks be told apart at all?

The picture's plane is the one that keeps the most of the squared distances between the tasks' directions (classical
scaling, Torgerson 1952, which for directions is principal component analysis). Clusters are made from the distances
themselves, not from the picture, so they may overlap in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from icmlora.task_vectors.distances import (
    FEWEST,
    Neighbour,
    SupportSetVectors,
    VectorSpace,
    cosine_distances,
    directions,
    mean_vectors,
)

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]

MAX_CLUSTERS = 50
"""More are not looked for: neither a table nor a picture can show them."""


def partitions(distances: Floats) -> Iterator[Labels]:
    """Yield cluster numbers for n, n - 1, ..., 1 clusters, by average linkage (UPGMA, Sokal and Michener 1958).

    The distance of two clusters is the mean of the distances between their points; the two nearest become one.

    Args:
        distances: Symmetric, shape (n, n).

    Returns:
        Shape (n,) each; equal numbers are one cluster, in no particular order.
    """
    count = len(distances)
    labels = np.arange(count)
    sizes = np.ones(count)
    between = distances.astype(np.float64)
    np.fill_diagonal(between, np.inf)
    yield labels.copy()
    for _ in range(count - 1):
        kept, gone = sorted(divmod(int(np.argmin(between)), count))
        # The mean over pairs of points follows from the two means. What is gone is infinitely far from everything.
        total = sizes[kept] + sizes[gone]
        between[kept] = (sizes[kept] * between[kept] + sizes[gone] * between[gone]) / total
        between[gone] = between[:, gone] = between[kept, kept] = np.inf
        between[:, kept] = between[kept]
        sizes[kept] = total
        labels[labels == gone] = kept
        yield labels.copy()


def silhouettes(distances: Floats, labels: Labels) -> Floats:
    """Return each point's silhouette (Rousseeuw 1987): (b - a) / max(a, b).

    a is its mean distance to the others of its cluster, b that to the nearest other cluster. 1 is deep inside, 0 on the
    border, below 0 nearer to another cluster. A point that is alone has 0, and so have all if there is one cluster.

    Args:
        distances: Symmetric with a diagonal of 0, shape (n, n).
        labels: Any numbers, shape (n,).

    Returns:
        Shape (n,), in [-1, 1].
    """
    names, own = np.unique(labels, return_inverse=True)
    if len(names) < 2:
        return np.zeros(len(labels))
    member = own[:, None] == np.arange(len(names))  # (n, clusters)
    sums, sizes = distances @ member.astype(np.float64), member.sum(axis=0)
    others = np.where(member, np.inf, sums / sizes).min(axis=1)
    within = sums[member] / np.maximum(sizes[own] - 1, 1)
    larger = np.maximum(within, others)
    values: Floats = (others - within) / np.where(larger > 0, larger, 1.0)
    values[sizes[own] == 1] = 0.0
    return np.clip(values, -1.0, 1.0)


def cluster(distances: Floats, clusters: int | None = None) -> Labels:
    """Return cluster numbers from 0, the largest cluster first; by the mean silhouette, or so many as are asked for.

    The number of clusters is that of the best mean silhouette, from 2 to half of the points; of equal ones the fewest.

    Args:
        distances: Symmetric with a diagonal of 0, shape (n, n), n at least 2.
        clusters: How many, 1 to n; None for the best number.

    Raises:
        ValueError: There are fewer points than clusters, or than two.
    """
    count = len(distances)
    if count < 2 or (clusters is not None and not 1 <= clusters <= count):
        raise ValueError("clusters are 1 to the number of points, and there are two points or more")
    if clusters is not None:
        return _by_size(next(found for found in partitions(distances) if len(np.unique(found)) == clusters))
    most = min(max(count // 2, 2), MAX_CLUSTERS)
    best, labels = -np.inf, np.zeros(count, dtype=np.int64)
    for found in partitions(distances):
        number = len(np.unique(found))
        if 2 <= number <= most:
            mean = float(silhouettes(distances, found).mean())
            # Rounded, so that equal partitions of another order of points stay equal.
            if round(mean, 9) >= round(best, 9):
                best, labels = mean, found
    return _by_size(labels)


def _by_size(labels: Labels) -> Labels:
    """Number clusters from 0 by size, those of one size by their first point."""
    names, first, sizes = np.unique(labels, return_index=True, return_counts=True)
    ranks = np.empty(len(names), dtype=np.int64)
    ranks[np.lexsort((first, -sizes))] = np.arange(len(names))
    return ranks[np.searchsorted(names, labels)]


PAIRS = 5
"""Nearest pairs that a map names, besides those that cannot be told apart."""
_SLACK = 1.1
"""How much farther from each other than vectors of one task those of two may be that are alike. Of 20 real tasks, the
halves of one task's vectors were within it nine times of ten, no two tasks ever were (1.19 at least)."""
_FENCE = 1.5


@dataclass(frozen=True)
class MappedTask:
    """One task on the map.

    Attributes:
        cluster: Number of its cluster, from 1; cluster 1 is the largest.
        silhouette: -1 to 1: above 0 it is nearer to its own cluster, below 0 to another; 0 where it is alone.
        point: Where it is in the picture, (x, y).
        support_sets: Where the vectors of its support sets are, (x, y) each; their mean is `point`.
        nearest: The nearest other task.
        is_outlier: Whether even that is much farther than others have theirs.
    """

    name: str
    cluster: int
    silhouette: float
    point: tuple[float, float]
    support_sets: tuple[tuple[float, float], ...]
    nearest: Neighbour
    is_outlier: bool


@dataclass(frozen=True)
class Pair:
    """Two tasks and their distance.

    Attributes:
        is_alike: Whether vectors of the two are hardly farther from each other than vectors of one of them: by their
            vectors they cannot be told apart.
    """

    tasks: tuple[str, str]
    distance: float
    is_alike: bool


@dataclass(frozen=True)
class TaskMap:
    """The map of a fleet.

    Attributes:
        tasks: In the order in which they were given.
        silhouette_by_cluster: Mean over the tasks, grouped by cluster; None with one cluster.
        silhouette_by_task: Mean over vectors, grouped by task; None where no task has two vectors.
        variation: Which share of the squared distances between directions each axis of the picture shows.
        pairs: Nearest pairs first; all that are alike, and the next ones up to `PAIRS`.
        typical: Median distance between two tasks.
    """

    tasks: tuple[MappedTask, ...]
    silhouette_by_cluster: float | None
    silhouette_by_task: float | None
    variation: tuple[float, float]
    pairs: tuple[Pair, ...]
    typical: float

    @property
    def clusters(self) -> tuple[tuple[MappedTask, ...], ...]:
        """The tasks of each cluster, cluster 1 first; the best silhouette first."""
        last = max(task.cluster for task in self.tasks)
        members = [[task for task in self.tasks if task.cluster == number] for number in range(1, last + 1)]
        return tuple(tuple(sorted(found, key=lambda task: (-task.silhouette, task.name))) for found in members)


def map_tasks(tasks: SupportSetVectors, clusters: int | None = None) -> TaskMap:
    """Make the map of some tasks. It does not depend on their order, apart from exact ties.

    Args:
        tasks: SupportSetVectors at each task, made by one extractor.
        clusters: How many; None for the number with the best silhouette.

    Raises:
        ValueError: Fewer than `FEWEST` tasks, or more clusters than tasks.
    """
    if len(tasks) < FEWEST:
        raise ValueError(f"a map has {FEWEST} tasks or more")
    names, means, space = list(tasks), mean_vectors(tasks), VectorSpace.of(tasks)
    placed = space.place(means)
    distances = cosine_distances(placed, placed)
    labels = cluster(distances, clusters)
    values = silhouettes(distances, labels)
    apart = distances + np.diag(np.full(len(names), np.inf))
    neighbours, gaps = apart.argmin(axis=1), apart.min(axis=1)
    fence = _upper_fence(gaps)
    owners = np.repeat(np.arange(len(names)), [len(vectors) for vectors in tasks.values()])
    vectors = space.place(np.concatenate(list(tasks.values())))
    between = cosine_distances(vectors, vectors)
    # Measured in the length of the task's own vector, the mean of its vectors is the task's direction.
    lengths = np.linalg.norm(placed, axis=1)
    points, spread, variation = _plane(directions(placed), vectors / np.where(lengths > 0, lengths, 1.0)[owners, None])
    mapped = [
        MappedTask(
            name=name,
            cluster=int(labels[number]) + 1,
            silhouette=float(values[number]),
            point=_xy(points[number]),
            support_sets=tuple(_xy(point) for point in spread[owners == number]),
            nearest=Neighbour(names[neighbours[number]], float(gaps[number])),
            is_outlier=bool(gaps[number] > fence),
        )
        for number, name in enumerate(names)
    ]
    return TaskMap(
        tasks=tuple(mapped),
        silhouette_by_cluster=float(values.mean()) if labels.any() else None,
        silhouette_by_task=_by_task(between, owners),
        variation=variation,
        pairs=_pairs(names, distances, between, owners),
        typical=float(np.median(distances[np.triu_indices(len(names), 1)])),
    )


def _plane(points: Floats, others: Floats) -> tuple[Floats, Floats, tuple[float, float]]:
    """Return points (n, 2) and others (m, 2) in the plane of most variation of the points, and each axis's share."""
    middle = points.mean(axis=0)
    _, strengths, axes = np.linalg.svd(points - middle, full_matrices=False)
    plane = axes[:2]
    flat = (points - middle) @ plane.T
    # A singular vector has no sign of its own: the farthest point lies at the positive side of each axis.
    signs = np.sign(flat[np.abs(flat).argmax(axis=0), [0, 1]])
    plane = plane * np.where(signs < 0, -1.0, 1.0)[:, None]
    shares = np.square(strengths) / max(float(np.square(strengths).sum()), np.finfo(np.float64).tiny)
    return (points - middle) @ plane.T, (others - middle) @ plane.T, (float(shares[0]), float(shares[1]))


def _by_task(between: Floats, owners: Labels) -> float | None:
    """Return the mean over the vectors of tasks that have several; a single vector says nothing of its own task."""
    several = np.bincount(owners)[owners] > 1
    return float(silhouettes(between, owners)[several].mean()) if several.any() else None


def _pairs(names: list[str], distances: Floats, between: Floats, owners: Labels) -> tuple[Pair, ...]:
    member = (owners[:, None] == np.arange(len(names))).astype(np.float64)  # (vectors, tasks)
    sizes = member.sum(axis=0)
    sums = member.T @ between @ member
    # Of a task's n vectors, n (n - 1) ordered pairs are not a vector with itself.
    within = sums.diagonal() / np.maximum(sizes * (sizes - 1), 1)
    alike = sums / np.outer(sizes, sizes) <= _SLACK * np.maximum(within[:, None], within[None, :])
    first, second = np.triu_indices(len(names), 1)
    order = np.argsort(distances[first, second], kind="stable")
    first, second = first[order], second[order]
    shown = alike[first, second]
    shown[:PAIRS] = True
    return tuple(
        Pair((names[one], names[other]), float(distances[one, other]), bool(alike[one, other]))
        for one, other in zip(first[shown].tolist(), second[shown].tolist(), strict=True)
    )


def _upper_fence(values: Floats) -> float:
    """Return above what a value is an outlier (Tukey 1977): 1.5 quartile ranges above the third quartile."""
    low, high = np.quantile(values, [0.25, 0.75])
    return float(high + _FENCE * (high - low))


def _xy(point: Floats) -> tuple[float, float]:
    return float(point[0]), float(point[1])
