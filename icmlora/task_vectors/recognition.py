"""Recognise a task by its vectors: a probability for each known task, and one for a task that is none of them.

    vectors ──whitened──▶ distance to each known task ──softmax──▶ probabilities
                          "new": one more task, at a fixed distance ──┘

A vector is whitened by how the support sets of one task differ. How fast a probability falls with the distance, and
how far away "new" is, follows from the stored support sets: each set in turn is taken for the samples of a task that is
known by its other sets, and of one that is not known at all. It never sees the samples that are to be recognised.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from icmlora.base_models.examples import spread
from icmlora.task_vectors.distances import (
    FEWEST,
    Floats,
    SupportSetVectors,
    VectorSpace,
    cosine_distances,
    mean_vectors,
)

_FOLDS = 8  # groups of tasks; the noise that a task's sets are measured by comes from the other groups
_MOST = 256  # tasks that noise and calibration come from: more cost time and change little
_RATES = np.geomspace(1.0, 300.0, 40)  # tried values: decrease of the logarithm over the distance of a usual new task
_PLACES = np.linspace(0.05, 1.5, 59)  # tried values: distance of "new", relative to that of a usual new task


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

        Its covariance is the mean of that of the support sets, pooled over tasks, and of the units alone: with fewer
        sets than channels, the former knows nothing of most directions (as in Ledoit and Wolf 2004).
        """
        unit = VectorSpace.of(tasks).unit
        differences = [(vectors - vectors.mean(axis=0)) / unit for vectors in tasks.values() if len(vectors) > 1]
        freedom = sum(len(vectors) - 1 for vectors in differences)
        _, sizes, directions = np.linalg.svd(np.concatenate(differences).astype(np.float64), full_matrices=False)
        # Equal shares of the two make a variance of (1 + s^2 / f) / 2 along a direction and of 1/2 elsewhere; only the
        # ratio matters for an angle.
        return cls(unit, directions, 1.0 / np.sqrt(1.0 + np.square(sizes) / freedom) - 1.0)

    def __call__(self, vectors: NDArray[np.floating]) -> Floats:
        """Whiten vectors (n, d); it is linear."""
        scaled = vectors / self.unit
        whitened: Floats = scaled + (scaled @ self.directions.T * self.factors) @ self.directions
        return whitened


@dataclass(frozen=True)
class _Softmax:
    """Distances -> probabilities."""

    rate: float  # decrease of the logarithm per unit of distance
    place: float  # distance of "new"

    def __call__(self, distances: Floats) -> Floats:
        """Return the probabilities (n + 1,) of n tasks at some distances, and of "new"."""
        logits = -self.rate * np.append(distances, self.place)
        weights = np.exp(logits - logits.max())
        probabilities: Floats = weights / weights.sum()
        return probabilities


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
        self._means = mean_vectors(known)  # (n, d)
        measured = {name: several[name] for name in spread(list(several), _MOST)}
        self._whitening = _Whitening.of(measured)
        self._softmax = _fit(*_trials(known, measured, self._means))

    def recognize(self, vectors: NDArray[np.floating]) -> Recognition:
        """Recognise the task of some samples by their vectors, one row per support set (sets, d)."""
        centre = self._means.mean(axis=0)
        placed = self._whitening(self._means - centre)
        found = cosine_distances(self._whitening(vectors.mean(axis=0, dtype=np.float64)[None] - centre), placed)[0]
        *probabilities, new = self._softmax(np.sqrt(found)).tolist()
        candidates = [Candidate(*facts) for facts in zip(self._names, probabilities, found.tolist(), strict=True)]
        return Recognition(tuple(sorted(candidates, key=lambda one: (one.distance, one.task))), new)


def _trials(known: SupportSetVectors, measured: SupportSetVectors, means: Floats) -> tuple[Floats, Floats, Floats]:
    """Measure how far support sets are from the tasks, as if each were the samples of a task in question.

    Returns:
        Distance of each set to its own task, known by its other sets (q,); to the other tasks (q, n - 1); and to the
        others again, around their own mean, as if its task were not known (q, n - 1). A distance is the root of a
        cosine distance: that of the ends of two unit vectors, up to a constant.
    """
    names, all_names, centre = list(measured), list(known), means.mean(axis=0)
    folds = min(_FOLDS, len(names))
    own: list[Floats] = []
    others: list[Floats] = []
    as_new: list[Floats] = []
    for fold in range(folds):
        whitening = _Whitening.of({name: measured[name] for at, name in enumerate(names) if at % folds != fold})
        placed = whitening(means - centre)
        for name in names[fold::folds]:
            sets, at = measured[name].astype(np.float64), all_names.index(name)
            rest = (sets.sum(axis=0) - sets) / (len(sets) - 1)  # [i] is the mean of all sets but i
            here, shift = whitening(sets - centre), placed[at] / (len(means) - 1)
            elsewhere = np.delete(placed, at, axis=0)
            own.append(np.diag(cosine_distances(here, whitening(rest - centre))))
            others.append(cosine_distances(here, elsewhere))
            # Without this task, the mean of the others is elsewhere by its share.
            as_new.append(cosine_distances(here + shift, elsewhere + shift))
    return np.sqrt(np.concatenate(own)), np.sqrt(np.concatenate(others)), np.sqrt(np.concatenate(as_new))


def _fit(own: Floats, others: Floats, as_new: Floats) -> _Softmax:
    """Find rate and place under which the trials are most probable, those of known and of new tasks counting alike."""
    usual = float(as_new.min(axis=1).mean()) or 1.0
    # A trial that went well says less than certainty: targets are one trial short of it (Platt 1999).
    doubt = 1.0 / (len(own) + 2)
    best = -np.inf, 0.0, 0.0
    for rate in _RATES / usual:
        new = -rate * usual * _PLACES[None]  # logits, (1, places)
        right = -rate * own[:, None]
        wrong = np.logaddexp.reduce(-rate * others, axis=1)[:, None]
        total = np.logaddexp(np.logaddexp(right, wrong), new)
        known = (1 - doubt) * (right - total) + doubt * (new - total)
        nearest = np.logaddexp.reduce(-rate * as_new, axis=1)[:, None]
        total = np.logaddexp(nearest, new)
        unknown = (1 - doubt) * (new - total) + doubt * (nearest - total)
        likelihood = known.mean(axis=0) + unknown.mean(axis=0)  # (places,)
        at = int(likelihood.argmax())
        best = max(best, (float(likelihood[at]), float(rate), float(usual * _PLACES[at])))
    return _Softmax(*best[1:])
