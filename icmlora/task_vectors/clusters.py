"""Cluster points by their distances alone, and measure how distinct the clusters are.

    distances (n, n) ──average linkage──▶ partitions into n, n - 1, ..., 1 clusters ──silhouette──▶ best partition

The result is deterministic: there is no random start, and the order of the points matters only for exact ties.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from icmlora.task_vectors.distances import Floats, settled

Labels = NDArray[np.int64]

MAX_CLUSTERS = 50  # largest number chosen automatically; neither a table nor a plot can show more


def partitions(distances: Floats) -> Iterator[Labels]:
    """Yield cluster numbers (n,) for n, n - 1, ..., 1 clusters, by average linkage (UPGMA, Sokal and Michener 1958).

    The distance of two clusters is the mean of the distances (n, n) between their points; the two nearest are merged.
    """
    count = len(distances)
    labels = np.arange(count)
    sizes = np.ones(count)
    between = distances.astype(np.float64)
    np.fill_diagonal(between, np.inf)
    yield labels.copy()
    for _ in range(count - 1):
        kept, gone = sorted(divmod(int(np.argmin(between)), count))
        # The mean over pairs of points follows from the two means. The absorbed cluster gets infinite distances.
        total = sizes[kept] + sizes[gone]
        between[kept] = (sizes[kept] * between[kept] + sizes[gone] * between[gone]) / total
        between[gone] = between[:, gone] = between[kept, kept] = np.inf
        between[:, kept] = between[kept]
        sizes[kept] = total
        labels[labels == gone] = kept
        yield labels.copy()


def silhouettes(distances: Floats, labels: Labels) -> Floats:
    """Return each point's silhouette (Rousseeuw 1987): (b - a) / max(a, b), shape (n,), in [-1, 1].

    a is the mean distance to the other points of its cluster, b the mean distance to the nearest other cluster. 1 means
    deep inside, 0 on the border, negative nearer to another cluster. A point that is alone in its cluster has 0. With
    only one cluster, every point has 0.
    """
    names, own = np.unique(labels, return_inverse=True)
    if len(names) < 2:
        return np.zeros(len(labels))
    member = own[:, None] == np.arange(len(names))  # (n, clusters)
    sums, sizes = distances @ member.astype(np.float64), member.sum(axis=0)
    others = np.where(member, np.inf, sums / sizes).min(axis=1)  # (n,), to the nearest other cluster
    within = sums[member] / np.maximum(sizes[own] - 1, 1)
    larger = np.maximum(within, others)
    values: Floats = (others - within) / np.where(larger > 0, larger, 1.0)
    values[sizes[own] == 1] = 0.0
    return settled(np.clip(values, -1.0, 1.0))


def cluster(distances: Floats, clusters: int | None = None) -> Labels:
    """Return cluster numbers (n,), the largest cluster first, by distances (n, n); `ValueError` if n is below 2."""
    # By default, choose the number of clusters with the best mean silhouette, from 2 to half of the points; on ties,
    # the smallest.
    count = len(distances)
    if count < 2 or (clusters is not None and not 1 <= clusters <= count):
        raise ValueError("clusters need two points or more, and number 1 to the number of points")
    if clusters is not None:
        return _by_size(next(found for found in partitions(distances) if len(np.unique(found)) == clusters))
    most = min(max(count // 2, 2), MAX_CLUSTERS)
    best, labels = -np.inf, np.zeros(count, dtype=np.int64)
    for found in partitions(distances):
        number = len(np.unique(found))
        if 2 <= number <= most:
            mean = float(silhouettes(distances, found).mean())
            # Rounded, so that the order of the points does not affect ties.
            if round(mean, 9) >= round(best, 9):
                best, labels = mean, found
    return _by_size(labels)


def _by_size(labels: Labels) -> Labels:
    """Number clusters from 0 by size, clusters of equal size by their first point."""
    names, first, sizes = np.unique(labels, return_index=True, return_counts=True)
    # The old numbers are point indices; the new ones follow the order (-size, first point).
    ranks = np.empty(len(names), dtype=np.int64)
    ranks[np.lexsort((first, -sizes))] = np.arange(len(names))
    return ranks[np.searchsorted(names, labels)]
