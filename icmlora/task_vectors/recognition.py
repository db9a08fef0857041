"""Recognise a task by its vectors: a probability for each known task, and one for a task that is none of them.

    vectors ──whitened──▶ distance to each known task ──softmax──▶ probabilities
                          "new": one more task, at the border of the nearest one ──┘

A vector is whitened by how the support sets of one task differ. The border of a task lies between how far its own
support sets are from it and how far the nearest other task is: the geometric mean of the two, times a factor. So, as in
the extreme value machine (Rudd et al. 2018), a task that has a near neighbour is given less room than one that stands
alone. That factor, and how fast a probability falls with the distance, follow from the stored support sets: each set in
turn is taken for the samples of a task that is known by its other sets, and of one that is not known at all. The
samples that are to be recognised are never seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from icmlora.base_models.examples.examples import spread
from icmlora.task_vectors.distances import (
    FEWEST,
    Floats,
    SupportSetVectors,
    VectorSpace,
    cosine_distances,
    mean_vectors,
    settled,
)

Places = NDArray[np.intp]  # numbers of tasks

_FOLDS = 8  # groups of tasks; the noise that a task's sets are measured by comes from the other groups
_POOLED = 0.7  # share of the support sets' covariance in that of the noise; 0.5 to 0.9 give nearly the same answers
_MOST = 256  # tasks that noise and calibration come from: more cost time and change little
_RATES = np.geomspace(1.0, 300.0, 40)  # tried values: decrease of the logarithm over the distance of a usual new task
_FACTORS = np.geomspace(0.4, 2.5, 61)  # tried values: factor of the borders
_LEAST = 1e-3  # shorter distances count as this one: two equal vectors are no proof that all others are equal too
_CHUNK = 1024  # tasks whose distances to all others are held at once


class TooFewVectors(ValueError):
    """There are too few tasks or support sets to say what is near."""


@dataclass(frozen=True)
class Candidate:
    """A known task, how probable it is, and its cosine distance (0 to 2) in whitened channels."""

    task: str
    probability: float
    distance: float


@dataclass(frozen=True)
class Recognition:
    """How probable it is that some samples belong to each known task, or to none of them; all sums to 1."""

    candidates: tuple[Candidate, ...]  # all known tasks, the most probable first
    new: float  # probability that the samples belong to none of them

    @property
    def task(self) -> str | None:
        """The recognised task; None if "none of them" is more probable than any."""
        best = self.candidates[0]
        return best.task if best.probability >= self.new else None

    @property
    def probability(self) -> float:
        """The probability of that answer."""
        return max(self.candidates[0].probability, self.new)


@dataclass(frozen=True)
class _Whitening:
    """Units and directions in which the support sets of one task differ."""

    unit: Floats  # size of one unit in each channel, (d,)
    directions: Floats  # orthonormal rows in these units, (k, d)
    factors: Floats  # by how much a vector is lengthened along each, -1 to 0, (k,)

    @classmethod
    def of(cls, tasks: SupportSetVectors) -> Self:
        """Measure the noise of some tasks.

        Its covariance is a mixture of that of the support sets, pooled over tasks, and of the units alone: with fewer
        sets than channels, the former knows nothing of most directions (as in Ledoit and Wolf 2004).
        """
        unit = VectorSpace.of(tasks).unit
        differences = [(vectors - vectors.mean(axis=0)) / unit for vectors in tasks.values() if len(vectors) > 1]
        freedom = sum(len(vectors) - 1 for vectors in differences)
        _, sizes, directions = np.linalg.svd(np.concatenate(differences).astype(np.float64), full_matrices=False)
        # A share p makes a variance of 1 - p + p s^2 / f along a direction and of 1 - p elsewhere; only the ratio
        # matters for an angle.
        variances = 1.0 + _POOLED / (1.0 - _POOLED) * np.square(sizes) / freedom
        return cls(unit, directions, 1.0 / np.sqrt(variances) - 1.0)

    def __call__(self, vectors: NDArray[np.floating]) -> Floats:
        """Whiten vectors (n, d); it is linear."""
        scaled = vectors / self.unit
        whitened: Floats = scaled + (scaled @ self.directions.T * self.factors) @ self.directions
        return whitened


@dataclass(frozen=True)
class _Trials:
    """Distances of q support sets, as if each were the samples of a task in question, among n tasks."""

    tasks: Places  # number of the set's own task, (q,)
    own: Floats  # to its own task, known by its other sets, (q,)
    others: Floats  # to the other tasks, (q, n - 1)
    as_new: Floats  # to the others around their own mean, as if its task were not known, (q, n - 1)

    @property
    def nearest_if_known(self) -> Places:
        """Which task is nearest, (q,)."""
        found: Places = np.where(self.own <= self.others.min(axis=1), self.tasks, self._number(self.others))
        return found

    @property
    def nearest_if_new(self) -> Places:
        """Which task is nearest if the set's own one is not known, (q,)."""
        return self._number(self.as_new)

    def _number(self, distances: Floats) -> Places:
        column = distances.argmin(axis=1)
        numbers: Places = column + (column >= self.tasks)  # the columns leave out the own task
        return numbers


@dataclass(frozen=True)
class _Borders:
    """How far from each of n tasks samples of it may be, but for the common factor."""

    radii: Floats  # logarithm of the distance of its support sets to its other ones, (n,)
    nearest: Floats  # the same to the nearest and to the second nearest other task, (n, 2)
    which: Places  # the nearest one, (n,)

    @classmethod
    def of(cls, trials: _Trials, placed: Floats) -> Self:
        """Measure them.

        A radius is the mean of the task's own and of that of all tasks: four sets do not say much. A task that is in
        no trial has that of all tasks.
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
        """Return the borders of some tasks (q,), each as if another one (q,) were not known."""
        near, second = self.nearest[tasks].T
        if without is not None:
            near = np.where(self.which[tasks] == without, second, near)
        borders: Floats = np.exp((self.radii[tasks] + near) / 2)
        return borders


class Recognizer:
    """Recognises tasks among some known ones.

    Raises:
        TooFewVectors: There are fewer than three tasks, or fewer than two have several support sets.
    """

    def __init__(self, known: SupportSetVectors) -> None:
        several = {name: vectors for name, vectors in known.items() if len(vectors) > 1}
        if len(known) < FEWEST or len(several) < 2:
            raise TooFewVectors(f"{FEWEST} tasks, and two support sets for two of them")
        self._names = list(known)
        means = mean_vectors(known)  # (n, d)
        measured = {name: several[name] for name in spread(list(several), _MOST)}
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
        candidates = [Candidate(*facts) for facts in zip(self._names, probabilities, found[0].tolist(), strict=True)]
        return Recognition(tuple(sorted(candidates, key=lambda one: (one.distance, one.task))), new)


def _roots(distances: Floats) -> Floats:
    """Return the roots of cosine distances: up to a constant, the way between the ends of two unit vectors."""
    roots: Floats = np.maximum(np.sqrt(distances), _LEAST)
    return roots


def _trials(names: list[str], measured: SupportSetVectors, means: Floats) -> _Trials:
    """Measure the support sets of some of the tasks; noise comes from other tasks than theirs."""
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
            # Without this task, the mean of the others is elsewhere by its share.
            as_new = cosine_distances(here + shift, elsewhere + shift)
            rows.append((np.full(len(sets), at), _roots(own), _roots(others), _roots(as_new)))
    tasks, own, others, as_new = (np.concatenate(column) for column in zip(*rows, strict=True))
    return _Trials(tasks, own, others, as_new)


def _fit(trials: _Trials, borders: _Borders) -> tuple[float, float]:
    """Find rate and factor under which the trials are most probable, those of known and of new tasks alike."""
    if_known = borders(trials.nearest_if_known)[:, None] * _FACTORS  # distances of "new", (q, factors)
    if_new = borders(trials.nearest_if_new, trials.tasks)[:, None] * _FACTORS
    # A trial that went well says less than certainty: targets are one trial short of it (Platt 1999).
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
