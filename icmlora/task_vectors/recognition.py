"""Recognise a task by its vectors: one probability per known task, and one for a new task.

    vectors ──whitened──▶ distance to each known task ──softmax──▶ probabilities
                          "new": one more task, at the border of the nearest one ──┘

Vectors are whitened with the differences between support sets of one task. The border of a task is the geometric mean
of two distances, from its own support sets and from the nearest other task, times a factor. So, as in the extreme value
machine (Rudd et al. 2018), a task with a near neighbour gets less room than an isolated one. The factor, and the rate
at which a probability falls with distance, are fitted leave-one-out on the stored support sets: each set in turn
represents the samples of a task known by its other sets, and the samples of an unknown task. The samples to recognise
are not used for fitting.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from icmlora.base_models.examples.examples import spread
from icmlora.task_vectors.distances import (
    MIN_TASKS,
    Floats,
    SupportSetVectors,
    VectorSpace,
    cosine_distances,
    mean_vectors,
    settled,
)

Places = NDArray[np.intp]  # numbers of tasks

_FOLDS = 8  # groups of tasks; a task's sets are whitened with the noise of the other groups
_POOLED = 0.7  # share of the support sets' covariance in the noise covariance; 0.5 to 0.9 give nearly equal results
_MAX_TASKS = 256  # for noise and calibration: more take time and change little
_RATES = np.geomspace(1.0, 300.0, 40)  # grid: decrease of the log probability over the distance of a typical new task
_FACTORS = np.geomspace(0.4, 2.5, 61)  # grid: factor of the borders
_MIN_DISTANCE = 1e-3  # shorter distances are raised to this: two equal vectors do not prove that all others are equal
_CHUNK = 1024  # tasks whose distances to all others are in memory at once


class TooFewVectors(ValueError):
    """There are too few tasks or support sets to recognise a task."""


@dataclass(frozen=True)
class TaskProbability:
    """A known task, its probability, and its cosine distance (0 to 2) in whitened channels."""

    task: str
    probability: float
    distance: float


@dataclass(frozen=True)
class Recognition:
    """Probabilities that samples belong to each known task or to a new one; they sum to 1."""

    candidates: tuple[TaskProbability, ...]  # all known tasks, most probable first
    new: float  # probability of a new task

    @property
    def task(self) -> str | None:
        """The recognised task; None if a new task is more probable than any known one."""
        best = self.candidates[0]
        return best.task if best.probability >= self.new else None

    @property
    def probability(self) -> float:
        return max(self.candidates[0].probability, self.new)


@dataclass(frozen=True)
class _Whitening:
    """Units and directions of the differences between support sets of one task."""

    unit: Floats  # size of one unit in each channel, (d,)
    directions: Floats  # orthonormal rows in these units, (k, d)
    factors: Floats  # relative change of a vector's length along each direction, -1 to 0, (k,)

    @classmethod
    def of(cls, tasks: SupportSetVectors) -> Self:
        """Measure the noise of some tasks.

        Its covariance is the support sets' covariance, pooled over tasks, shrunk towards the diagonal of the units:
        with fewer sets than channels, most directions have no data (as in Ledoit and Wolf 2004).
        """
        unit = VectorSpace.of(tasks).unit
        differences = [(vectors - vectors.mean(axis=0)) / unit for vectors in tasks.values() if len(vectors) > 1]
        freedom = sum(len(vectors) - 1 for vectors in differences)
        _, sizes, directions = np.linalg.svd(np.concatenate(differences).astype(np.float64), full_matrices=False)
        # With share p, the variance is 1 - p + p s^2 / f along a direction and 1 - p elsewhere; for an angle, only the
        # ratio matters.
        variances = 1.0 + _POOLED / (1.0 - _POOLED) * np.square(sizes) / freedom
        return cls(unit, directions, 1.0 / np.sqrt(variances) - 1.0)

    def __call__(self, vectors: NDArray[np.floating]) -> Floats:
        """Whiten vectors (n, d), a linear map."""
        scaled = vectors / self.unit
        whitened: Floats = scaled + (scaled @ self.directions.T * self.factors) @ self.directions
        return whitened


@dataclass(frozen=True)
class _Trials:
    """Leave-one-out distances of q support sets from n tasks."""

    tasks: Places  # number of the set's own task, (q,)
    own: Floats  # to its own task, represented by its other sets, (q,)
    others: Floats  # to the other tasks, (q, n - 1)
    as_new: Floats  # to the other tasks around their own mean, as if its task were unknown, (q, n - 1)

    def nearest(self, distances: Floats) -> Places:
        """Return the number of the nearest other task, (q,), by distances that omit each set's own task."""
        column = distances.argmin(axis=1)
        numbers: Places = column + (column >= self.tasks)
        return numbers


@dataclass(frozen=True)
class _Borders:
    """The border of each of n tasks, without the common factor."""

    radii: Floats  # log distance between its support sets, (n,)
    nearest: Floats  # log distance to the nearest and second nearest other task, (n, 2)
    which: Places  # number of the nearest task, (n,)

    @classmethod
    def of(cls, trials: _Trials, placed: Floats) -> Self:
        """Measure the borders.

        A radius is the mean of the task's own radius and the average over all tasks, because four sets are little
        evidence. A task without a trial gets the average.
        """
        sets = np.bincount(trials.tasks, minlength=len(placed))
        own = np.log(trials.own)
        sums = np.bincount(trials.tasks, own, minlength=len(placed))
        usual = own.mean()
        radii = (np.where(sets > 0, sums / np.maximum(sets, 1), usual) + usual) / 2
        nearest, which = [], []
        for first in range(0, len(placed), _CHUNK):
            distances = cosine_distances(placed[first : first + _CHUNK], placed)
            distances[np.arange(len(distances)), np.arange(first, first + len(distances))] = np.inf
            order = np.argpartition(distances, 1, axis=1)[:, :2]
            nearest.append(np.take_along_axis(distances, order, axis=1))
            which.append(order[:, 0])
        return cls(radii, np.log(_roots(np.concatenate(nearest))), np.concatenate(which))

    def __call__(self, tasks: Places, without: Places | None = None) -> Floats:
        """Return the borders of some tasks (q,), each as if the task in `without` (q,) were unknown."""
        near, second = self.nearest[tasks].T
        if without is not None:
            near = np.where(self.which[tasks] == without, second, near)
        borders: Floats = np.exp((self.radii[tasks] + near) / 2)
        return borders


class Recognizer:
    """Recognise tasks among known ones.

    Raises:
        TooFewVectors: There are fewer than three tasks, or fewer than two have several support sets.
    """

    def __init__(self, known: SupportSetVectors) -> None:
        several = {name: vectors for name, vectors in known.items() if len(vectors) > 1}
        if len(known) < MIN_TASKS or len(several) < 2:
            raise TooFewVectors(f"{MIN_TASKS} tasks, and two support sets for two of them")
        self._names = list(known)
        means = mean_vectors(known)  # (n, d)
        measured = {name: several[name] for name in spread(list(several), _MAX_TASKS)}
        self._centre, self._whitening = means.mean(axis=0), _Whitening.of(measured)
        self._placed = self._whitening(means - self._centre)
        trials = _trials(self._names, measured, means)
        self._borders = _Borders.of(trials, self._placed)
        self._rate, self._factor = _fit(trials, self._borders)

    def recognize(self, vectors: NDArray[np.floating]) -> Recognition:
        """Recognise the task of some samples by their vectors, one row per support set (sets, d)."""
        here = self._whitening(vectors.mean(axis=0, dtype=np.float64)[None] - self._centre)
        found = cosine_distances(here, self._placed)  # (1, n)
        border = self._borders(found.argmin(axis=1)) * self._factor
        logits = -self._rate * np.append(_roots(found[0]), border)
        weights = np.exp(logits - logits.max())
        *probabilities, new = (weights / weights.sum()).tolist()
        facts = zip(self._names, probabilities, found[0].tolist(), strict=True)
        candidates = [TaskProbability(*fact) for fact in facts]
        return Recognition(tuple(sorted(candidates, key=lambda one: (one.distance, one.task))), new)


def _roots(distances: Floats) -> Floats:
    """Return the roots of cosine distances: up to a constant, the Euclidean distance between two unit vectors."""
    roots: Floats = np.maximum(np.sqrt(distances), _MIN_DISTANCE)
    return roots


def _trials(names: list[str], measured: SupportSetVectors, means: Floats) -> _Trials:
    chosen, centre = list(measured), means.mean(axis=0)
    number = {name: at for at, name in enumerate(names)}
    folds = min(_FOLDS, len(chosen))
    rows: list[tuple[Places, Floats, Floats, Floats]] = []
    for fold in range(folds):
        whitening = _Whitening.of({name: measured[name] for at, name in enumerate(chosen) if at % folds != fold})
        placed = whitening(means - centre)
        for name in chosen[fold::folds]:
            sets, at = measured[name].astype(np.float64), number[name]
            rest = (sets.sum(axis=0) - sets) / (len(sets) - 1)  # [i] is the mean of all sets but i
            here, shift = whitening(sets - centre), placed[at] / (len(means) - 1)
            elsewhere = np.delete(placed, at, axis=0)
            own = np.diag(cosine_distances(here, whitening(rest - centre)))
            others = cosine_distances(here, elsewhere)
            # Removing this task shifts the mean by the task's share.
            as_new = cosine_distances(here + shift, elsewhere + shift)
            rows.append((np.full(len(sets), at), _roots(own), _roots(others), _roots(as_new)))
    tasks, own, others, as_new = (np.concatenate(column) for column in zip(*rows, strict=True))
    return _Trials(tasks, own, others, as_new)


def _fit(trials: _Trials, borders: _Borders) -> tuple[float, float]:
    """Fit rate and factor by maximum likelihood over the trials as known and as new tasks."""
    is_own = trials.own <= trials.others.min(axis=1)
    nearest_if_known = np.where(is_own, trials.tasks, trials.nearest(trials.others))
    if_known = borders(nearest_if_known)[:, None] * _FACTORS  # distances of "new", (q, factors)
    if_new = borders(trials.nearest(trials.as_new), trials.tasks)[:, None] * _FACTORS
    # Targets are one trial short of certainty, which successful trials do not prove (Platt 1999).
    doubt = 1.0 / (len(trials.own) + 2)
    best = -np.inf, 0.0, 0.0
    for rate in _RATES / trials.as_new.min(axis=1).mean():
        right, new = -rate * trials.own[:, None], -rate * if_known
        wrong = np.logaddexp.reduce(-rate * trials.others, axis=1)[:, None]
        total = np.logaddexp(np.logaddexp(right, wrong), new)
        known = (1 - doubt) * (right - total) + doubt * (new - total)
        nearest, new = np.logaddexp.reduce(-rate * trials.as_new, axis=1)[:, None], -rate * if_new
        total = np.logaddexp(nearest, new)
        unknown = (1 - doubt) * (new - total) + doubt * (nearest - total)
        likelihood = settled(known.mean(axis=0) + unknown.mean(axis=0))  # (factors,)
        at = int(likelihood.argmax())
        best = max(best, (float(likelihood[at]), float(rate), float(_FACTORS[at])))
    return best[1], best[2]
