"""Distances between tasks by their vectors, and between a new task and all known ones.

    vectors (sets, d) per task ──minus the fleet mean──▶ channels in units of their noise ──cosine──▶ distance, 0 to 2

A task has one vector per support set. Hidden states share a large common part, and a few channels are larger than all
others together, so plain cosines are near 1 for any two tasks. With the mean subtracted, a distance compares how tasks
deviate from the mean: 0 is the same direction, 1 unrelated, 2 opposite. Each channel is divided by its noise, the
spread of the vectors of one task in that channel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
# Name of a task -> its vectors, one row per support set: shape (sets, d), d the same for all, 2 or more.
SupportSetVectors = Mapping[str, NDArray[np.floating]]

# The last bits of a sum depend on the CPU, the library and the number of threads. Comparisons must not depend on them:
# which of two tasks is nearer, whether two coincide, which way up a plot is. Distances and silhouettes are at most 2
# and are printed with three digits. Rounding errors are 1e-15 to 1e-13, so two CPUs that round differently get the same
# value in all but one of 10,000 cases.
_DECIMALS = 9
_CHUNK = 256  # tasks placed at once: for more, allocating memory pages takes longer than the computation
MIN_TASKS = 3  # minimum number of tasks: two are always opposite around their own mean
OUTSIDE = 0.95  # a task is outside the known ones if this share of them has a nearer neighbour than it has


def settled(values: Floats) -> Floats:
    """Round values of magnitude about 1, in any shape, to digits on which all CPUs agree; -0 becomes 0."""
    rounded: Floats = np.round(values, _DECIMALS) + 0.0
    return rounded


@dataclass(frozen=True)
class MeanVectors:
    """The statistics of task vectors for computing distances."""

    means: Floats  # mean vector of each task, shape (n, d)
    # Squared differences between vectors and the mean of their task, summed over all vectors, shape (d,), and their
    # degrees of freedom: one mean is estimated per task, so a task of s vectors has s - 1.
    squares: Floats
    freedom: int

    @classmethod
    def of(cls, tasks: SupportSetVectors) -> Self:
        """Compute the statistics of some tasks, in their order."""
        means = mean_vectors(tasks)
        several = [vectors - vectors.mean(axis=0) for vectors in _exact(tasks) if len(vectors) > 1]
        squares = sum((np.square(vectors).sum(axis=0) for vectors in several), np.zeros(means.shape[1]))
        return cls(means, squares, sum(len(vectors) - 1 for vectors in several))

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        squares, freedom = sum(part.squares for part in parts), sum(part.freedom for part in parts)
        return cls(np.concatenate([part.means for part in parts]), np.asarray(squares), freedom)

    def ordered(self, places: Sequence[int]) -> MeanVectors:
        return MeanVectors(self.means[list(places)], self.squares, self.freedom)


@dataclass(frozen=True)
class VectorSpace:
    """The origin and the units that vectors are measured in."""

    mean: Floats  # mean of the tasks, shape (d,)
    unit: Floats  # size of one unit in each channel, positive, shape (d,)

    @classmethod
    def of(cls, tasks: SupportSetVectors | MeanVectors) -> Self:
        """Build the space of some tasks.

        The unit is the channel's standard deviation between vectors of one task, plus the median of this deviation over
        all channels: without it, channels that hardly vary would dominate (as in SAM, Tusher et al. 2001). If no task
        has two vectors, the deviation between tasks is used instead.
        """
        known = tasks if isinstance(tasks, MeanVectors) else MeanVectors.of(tasks)
        noise = np.sqrt(known.squares / known.freedom) if known.freedom else known.means.std(axis=0)
        unit = noise + np.median(noise)
        return cls(known.means.mean(axis=0), np.where(unit > 0, unit, 1.0))

    def place(self, vectors: NDArray[np.floating]) -> Floats:
        """Return vectors (n, d) minus the mean, in units; a vector equal to the mean up to rounding becomes zero."""
        return settled((vectors - self.mean) / self.unit)


@dataclass(frozen=True)
class Neighbour:
    """A known task and its cosine distance (0 to 2) from the given task."""

    task: str
    distance: float


@dataclass(frozen=True)
class Familiarity:
    """The distance of a task from the known ones, compared with the distances among them."""

    neighbours: tuple[Neighbour, ...]  # all known tasks, nearest first
    # Leave-one-out distance of each known task to its nearest other one, ascending.
    usual: tuple[float, ...]

    @property
    def distance(self) -> float:
        return self.neighbours[0].distance

    @property
    def farther_than(self) -> float:
        return sum(distance < self.distance for distance in self.usual) / len(self.usual)

    @property
    def is_outside(self) -> bool:
        # The rank of a new task of the same kind among the n known ones is about uniform (as in conformal prediction,
        # Vovk et al. 2005). So it counts as outside once in about 1 / (1 - OUTSIDE) cases, or once in n + 1 if n is
        # small.
        return self.farther_than >= OUTSIDE


def nearest(vector: NDArray[np.floating], others: SupportSetVectors) -> tuple[Neighbour, ...]:
    """Rank known tasks by distance from a new task's mean vector (d,), nearest first, then by name."""
    space = VectorSpace.of(others)
    distances = cosine_distances(space.place(vector[None]), space.place(mean_vectors(others)))[0]
    pairs = sorted(zip(distances.tolist(), others, strict=True))
    return tuple(Neighbour(name, distance) for distance, name in pairs)


def familiarity(vector: NDArray[np.floating], others: SupportSetVectors) -> Familiarity:
    """Compare a vector (d,) with the known tasks; raise `ValueError` if there are fewer than `MIN_TASKS`."""
    if len(others) < MIN_TASKS:
        raise ValueError(f"familiarity needs {MIN_TASKS} tasks or more")
    placed = VectorSpace.of(others).place(mean_vectors(others))
    usual = sorted(float(distance) for distance in _left_out(placed).min(axis=1))
    return Familiarity(nearest(vector, others), tuple(usual))


def task_distances(tasks: SupportSetVectors) -> Floats:
    """Return the distances between all tasks around their common mean, symmetric, shape (n, n)."""
    placed = VectorSpace.of(tasks).place(mean_vectors(tasks))
    return cosine_distances(placed, placed)


def distances_from(place: int, known: MeanVectors) -> Floats:
    """Return one task's row of :func:`task_distances`, shape (n,), in time and memory linear in n."""
    space, own = VectorSpace.of(known), known.means[place][None]
    parts = [
        cosine_distances(space.place(own), space.place(known.means[start : start + _CHUNK]))[0]
        for start in range(0, len(known.means), _CHUNK)
    ]
    distances: Floats = np.concatenate(parts)
    distances[place] = 0.0
    return distances


def cosine_distances(one: Floats, other: Floats) -> Floats:
    """Return 1 - cosine for all pairs of rows of two arrays: (n, d), (m, d) -> (n, m), values 0 to 2.

    Zero rows have no direction: their distance is 1 from all other rows and 0 from each other. Rows of the same
    direction have distance 0, and equal distances are equal to the last bit (see `settled`).
    """
    first, second = directions(one), directions(other)
    both_zero = np.outer(~np.any(first, axis=1), ~np.any(second, axis=1))
    distances: Floats = np.clip(1.0 - first @ second.T, 0.0, 2.0)
    distances[both_zero] = 0.0
    if one is other:  # rounding must not separate a point from itself or make the distances asymmetric
        distances = (distances + distances.T) / 2
        np.fill_diagonal(distances, 0.0)
    return settled(distances)


def directions(vectors: Floats) -> Floats:
    """Scale the rows of (n, d) to length 1; zeros stay zeros."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths > 0, lengths, 1.0)


def mean_vectors(tasks: SupportSetVectors) -> Floats:
    """Return the vector of each task, the mean over its vectors: shape (n, d)."""
    return np.stack([vectors.mean(axis=0) for vectors in _exact(tasks)])


def _exact(tasks: SupportSetVectors) -> list[Floats]:
    return [vectors.astype(np.float64) for vectors in tasks.values()]


def _left_out(points: Floats) -> Floats:
    """Return leave-one-out distances (n, n): row i is centred on the mean of all points but i; infinite diagonal.

    With g the inner products, s their row sums and m the mean without point i, every inner product with m is
    (s - g_i) / (n - 1). So n means cost no more than one.
    """
    count = len(points)
    products = points @ points.T
    sums = products.sum(axis=1)  # (n,)
    with_mean = (sums[None, :] - products) / (count - 1)  # [i, j] = m_i . x_j
    mean_square = (sums.sum() - 2 * sums + products.diagonal()) / (count - 1) ** 2  # [i] = |m_i|^2
    own = with_mean.diagonal()[:, None]
    inner = products - with_mean - own + mean_square[:, None]  # [i, j] = (x_i - m_i) . (x_j - m_i)
    squares = products.diagonal()[None, :] - 2 * with_mean + mean_square[:, None]  # [i, j] = |x_j - m_i|^2
    lengths = np.sqrt(np.maximum(squares, 0.0))
    scale = lengths * lengths.diagonal()[:, None]
    distances = settled(np.clip(1.0 - inner / np.where(scale > 0, scale, np.inf), 0.0, 2.0))
    np.fill_diagonal(distances, np.inf)
    return distances
