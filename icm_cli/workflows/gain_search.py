"""What was made of an adapter with what was measured of it, and the search for the smallest that keeps a gain.

    tolerance ladder:  0.95 ── 0.71 ── 0.5 ── 0.35 ── ... ── 0.004      coarse to fine
                                        └── halving: make, load by PEFT, measure ──▶ coarsest that keeps the gain

The gain is measured on the task's held-out text, and is therefore a little flattered by having been chosen; what
`icm eval --data` says on other text is not.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

from icm_cli.workflows.events import Event
from icm_cli.workflows.task_evaluation import RungResult, TaskEvaluation, result_of
from icmlora.adapter import Adapter
from icmlora.errors import DataError
from icmlora.generator.step_search import Encoded
from icmlora.peft_folder import save_adapter
from registry.records import NewEvaluation, Rung

LADDER = (0.95, *(2 ** (-rung / 2) for rung in range(1, 17)))
"""Weighted errors from 0.95 to 0.004, half an octave apart: each rung takes a tenth to a fifth more bytes.

On the coarsest, a task that the generator predicts well has a code without integers: the prediction, by itself.
"""


@dataclass(frozen=True)
class Candidate:
    """A code, or a residual beside one, with what was measured of it.

    Attributes:
        encoded: Its bytes.
        result: Its loss and gain; None where no gain is asked for.
    """

    encoded: Encoded
    result: RungResult | None

    @property
    def gain(self) -> float | None:
        """Its retained gain, if it was measured and there is one."""
        return None if self.result is None else self.result.retained_gain

    def keeps(self, min_gain: float) -> bool:
        """Say whether it keeps a gain.

        Raises:
            DataError: There is no gain to keep.
        """
        if self.gain is None:
            raise DataError("its original does not help on its held-out text, so there is no gain to keep")
        return self.gain >= min_gain


@dataclass(frozen=True)
class Found:
    """What a search along a ladder came to: the place, what is there, and whether it keeps the gain."""

    place: int
    candidate: Candidate
    keeps: bool


Attempt = Callable[[int], Generator[Event, None, Candidate | None]]
"""Makes and measures what is at one place of a ladder; None where the user stopped."""


def coarsest_kept(places: int, min_gain: float, attempt: Attempt) -> Generator[Event, None, Found | None]:
    """Halve a ladder for the coarsest place that keeps a gain; if none does, return the finest. None if stopped.

    Args:
        places: How many there are, coarse to fine; at least one.
        min_gain: The gain.
        attempt: Called with some of them.

    Raises:
        DataError: There is no gain to keep.
    """
    low, high, found = 0, places - 1, None
    while low <= high:
        middle = (low + high) // 2
        tried = yield from attempt(middle)
        if tried is None:
            return None
        if tried.keeps(min_gain):
            found, high = Found(middle, tried, True), middle - 1
        else:
            low = middle + 1
            if found is None:
                finest = Found(middle, tried, False)
    return finest if found is None else found


def nearest_kept(start: int, places: int, min_gain: float, attempt: Attempt) -> Generator[Event, None, Found | None]:
    """Go from one place of a ladder to coarser ones while the gain is kept, or to finer ones until it is.

    Where an attempt is dear and the place is nearly known, that is two of them; halving takes four.

    Args:
        start: Where to begin.
        places: How many there are, coarse to fine.
        min_gain: The gain.
        attempt: Called with some of them.

    Returns:
        The coarsest found that keeps the gain; if none does, the finest. None if the user stopped.

    Raises:
        DataError: There is no gain to keep.
    """
    first = yield from attempt(start)
    if first is None:
        return None
    found = Found(start, first, first.keeps(min_gain))
    for place in range(start - 1, -1, -1) if found.keeps else range(start + 1, places):
        tried = yield from attempt(place)
        if tried is None:
            return None
        if tried.keeps(min_gain) != found.keeps:
            return found if found.keeps else Found(place, tried, True)
        found = Found(place, tried, found.keeps)
    return found


def measure(evaluation: TaskEvaluation, rung: Rung, adapter: Adapter, error: float) -> RungResult:
    """Write an adapter as `icm materialize` does, load it by PEFT and measure it; nothing is recorded of it.

    Args:
        evaluation: Measures the task.
        rung: What the adapter will be, once it is stored.
        adapter: The adapter.
        error: Its relative dW error.
    """
    known = evaluation.run((), again=False)
    with tempfile.TemporaryDirectory(prefix="icm-") as folder:
        written = Path(folder) / "adapter"
        save_adapter(adapter, written, dtype="bfloat16", card="", metadata={})
        return result_of(rung, evaluation.loss_of(rung, written), error, known)


def evaluations_of(evaluation: TaskEvaluation | None, candidate: Candidate | None) -> Sequence[NewEvaluation]:
    """Return what is to be recorded of a candidate."""
    if evaluation is None or candidate is None or candidate.result is None:
        return ()
    return (evaluation.evaluation_of(candidate.result),)
