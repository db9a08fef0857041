"""A map of a fleet by its task vectors: neighbouring tasks, clusters, and how distinct the clusters are.

    task vectors ──VectorSpace──▶ distances (n, n) ──cluster──▶ clusters ──▶ silhouette over tasks, by cluster
          │                            `── classical scaling ──▶ points (n, 2)
          `──▶ distances between vectors ──▶ silhouette over vectors, by task: are tasks distinguishable at all?

The plot's plane preserves as much as possible of the squared distances between the tasks' directions (classical
scaling, Torgerson 1952, which for directions is principal component analysis). Clusters are computed from the distances
themselves, not from the plot, so they may overlap in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from icmlora.task_vectors.clusters import Labels, cluster, silhouettes
from icmlora.task_vectors.distances import (
    MIN_TASKS,
    Floats,
    Neighbour,
    SupportSetVectors,
    VectorSpace,
    cosine_distances,
    directions,
    mean_vectors,
    settled,
)

PAIRS = 5  # nearest pairs to list; indistinguishable pairs are always listed
# Two tasks are alike if their vectors are at most this factor farther apart than vectors of one task. For 20 real
# tasks, the halves of one task's vectors were alike nine times out of ten, and two tasks never were (at least 1.19).
_SLACK = 1.1
# Weight of support sets relative to tasks for choosing the plot's axes: enough to decide between two that show the
# tasks equally well, or if all tasks are on a line and the second axis is free; too little to turn any other plot.
_HINT = 1e-4
_FENCE = 1.5  # interquartile ranges above the third quartile; values beyond are outliers (Tukey 1977)


@dataclass(frozen=True)
class MappedTask:
    """One task on the map."""

    name: str
    cluster: int  # number of its cluster, from 1; cluster 1 is the largest
    silhouette: float  # -1 to 1: above 0 it is nearer to its own cluster, below 0 to another; 0 if it is alone
    point: tuple[float, float]  # position in the plot, (x, y)
    # Positions of the vectors of its support sets, (x, y) each; their mean is `point`.
    support_sets: tuple[tuple[float, float], ...]
    nearest: Neighbour
    is_outlier: bool  # whether its nearest task is much farther away than for other tasks


@dataclass(frozen=True)
class Pair:
    """Two tasks and their distance."""

    tasks: tuple[str, str]
    distance: float
    # Whether vectors of the two are hardly farther apart than vectors of one of them, so that the tasks are
    # indistinguishable.
    is_alike: bool


@dataclass(frozen=True)
class TaskMap:
    """The map of a fleet."""

    tasks: tuple[MappedTask, ...]  # in input order
    silhouette_by_cluster: float | None  # mean over the tasks, grouped by cluster; None if there is one cluster
    silhouette_by_task: float | None  # mean over the vectors, grouped by task; None if no task has two vectors
    # Share of the squared distances between directions that each axis of the plot shows.
    variation: tuple[float, float]
    pairs: tuple[Pair, ...]  # nearest first: the `PAIRS` nearest, and all pairs that are alike
    typical: float  # median distance between two tasks

    @property
    def clusters(self) -> tuple[tuple[MappedTask, ...], ...]:
        """The tasks of each cluster, cluster 1 first; the best silhouette first."""
        last = max(task.cluster for task in self.tasks)
        members = [[task for task in self.tasks if task.cluster == number] for number in range(1, last + 1)]
        return tuple(tuple(sorted(found, key=lambda task: (-task.silhouette, task.name))) for found in members)


def map_tasks(tasks: SupportSetVectors, clusters: int | None = None) -> TaskMap:
    """Return the map of tasks with vectors (sets, d) each; raise `ValueError` for fewer than `MIN_TASKS` tasks."""
    if len(tasks) < MIN_TASKS:
        raise ValueError(f"a map has {MIN_TASKS} tasks or more")
    names, means, space = list(tasks), mean_vectors(tasks), VectorSpace.of(tasks)
    placed = space.place(means)
    distances = cosine_distances(placed, placed)  # (n, n)
    labels = cluster(distances, clusters)
    values = silhouettes(distances, labels)
    apart = distances + np.diag(np.full(len(names), np.inf))  # (n, n): exclude a task itself from its neighbours
    neighbours, gaps = apart.argmin(axis=1), apart.min(axis=1)
    low, high = np.quantile(gaps, [0.25, 0.75])
    fence = float(high + _FENCE * (high - low))  # outliers are above this
    owners = np.repeat(np.arange(len(names)), [len(vectors) for vectors in tasks.values()])
    vectors = space.place(np.concatenate(list(tasks.values())))
    between = cosine_distances(vectors, vectors)  # (m, m)
    several = np.bincount(owners)[owners] > 1  # tasks with a single vector have no silhouette over vectors
    # In units of the length of the task's mean vector, the mean of its vectors is the task's direction.
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
        silhouette_by_task=float(silhouettes(between, owners)[several].mean()) if several.any() else None,
        variation=variation,
        pairs=_pairs(names, distances, between, owners),
        typical=float(np.median(distances[np.triu_indices(len(names), 1)])),
    )


def _plane(points: Floats, others: Floats) -> tuple[Floats, Floats, tuple[float, float]]:
    """Project points (n, d) and others (m, d) onto the plane of the points' largest variation."""
    # Returns points (n, 2), others (m, 2), and the share of the points' variation on each axis.
    middle = points.mean(axis=0)
    points, others = settled(points - middle), settled(others - middle)
    _, _, axes = np.linalg.svd(np.concatenate([points, _HINT * others]), full_matrices=False)
    flat, spread = settled(points @ axes[:2].T), settled(others @ axes[:2].T)  # (n, 2), (m, 2)
    # The sign of a singular vector is arbitrary: make the farthest point positive on each axis.
    signs = np.where(flat[np.abs(flat).argmax(axis=0), [0, 1]] < 0, -1.0, 1.0)
    shares = settled(np.square(flat).sum(axis=0) / max(float(np.square(points).sum()), np.finfo(np.float64).tiny))
    return flat * signs + 0.0, spread * signs + 0.0, (float(shares[0]), float(shares[1]))


def _pairs(names: list[str], distances: Floats, between: Floats, owners: Labels) -> tuple[Pair, ...]:
    # distances: (n, n) between tasks. between: (m, m) between vectors. owners: (m,) task of each vector.
    member = (owners[:, None] == np.arange(len(names))).astype(np.float64)  # (vectors, tasks)
    sizes = member.sum(axis=0)
    sums = member.T @ between @ member  # (tasks, tasks), over all pairs of vectors
    # A task of s vectors has s (s - 1) ordered pairs of two different ones.
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


def _xy(point: Floats) -> tuple[float, float]:
    return float(point[0]), float(point[1])
