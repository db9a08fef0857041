"""What an encoding is asked for and what it reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from icm_cli.workflows.events import Event
from registry.records import Asked

EncodeStatus = Literal["encoded", "enough", "below", "known", "evicted", "unmeasured"]


@dataclass(frozen=True)
class EncodeRequest:
    """What a code has to keep; at least one limit is given.

    Attributes:
        names: Tasks; all if empty.
        max_error: Largest relative dW error.
        min_gain: Smallest retained gain; measuring it needs the base model and held-out text.
        tolerance: Largest relative error of dW weighted by sensitivity, which is what `--quality` of a training sets.
        residual: Leave the codes as they are, and put beside each what it lacks.
        refine: Steps of functional refinement, 0 for none; it needs the base model and samples.
        base_model: Only tasks of this one.
        device: Where gains are measured and codes refined.
        again: Also tasks whose present code was made for the very same.
    """

    names: Sequence[str]
    max_error: float | None
    min_gain: float | None
    device: str
    tolerance: float | None = None
    refine: int = 0
    base_model: str | None = None
    residual: bool = False
    again: bool = False

    def asked(self, *, is_kept: bool) -> Asked:
        """Return what is recorded of the limits."""
        return Asked(self.min_gain, self.max_error, self.tolerance, is_kept, self.refine)


@dataclass(frozen=True)
class TaskEncoded(Event):
    """What became of one task.

    Attributes:
        task: Its name.
        status: `encoded`: its code, or the residual beside it, is the smallest found that keeps the limits; `known`: it
            was that already; `enough`: its code needs no residual for that; `below`: nothing does, so it should keep
            its original (it has its best code, and no residual); `evicted`: only what is left of it stays;
            `unmeasured`: see `reason`.
        size: Bytes of its code.
        residual_size: Bytes of the residual beside it, if it has one.
        before: Bytes of the code and residual that it had, if any.
        dw_error: Relative dW error of what they decode to.
        retained_gain: Retained gain of that, if it was measured.
        reason: Why its gain could not be measured; its code is as it was.
    """

    task: str
    status: EncodeStatus
    size: int | None = None
    residual_size: int | None = None
    before: int | None = None
    dw_error: float | None = None
    retained_gain: float | None = None
    reason: str | None = None


@dataclass
class EncodeReport:
    """What an encoding did."""

    tasks: list[TaskEncoded] = field(default_factory=list)
    stopped: bool = False

    @property
    def short(self) -> list[TaskEncoded]:
        """The tasks that have no code which is known to keep the limits."""
        return [task for task in self.tasks if task.status in ("below", "unmeasured")]
