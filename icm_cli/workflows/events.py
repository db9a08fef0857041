"""What a workflow says while it works.

A workflow that takes time is a generator: it yields events and returns its result.

    Generator[Event, None, Result]      Step events move the progress display (see `Session.follow`),
                                        any other event goes to the command that started the workflow
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """Base class of everything that a workflow yields."""


@dataclass(frozen=True)
class Step(Event):
    """How far a workflow is.

    Attributes:
        done: Finished units.
        total: All units, or None while nobody knows.
        note: What is worked on, as untrusted text.
    """

    done: float
    total: float | None
    note: str = ""


class StopFlag:
    """Says that the user asked to stop; workflows look at it between atomic steps."""

    def __init__(self) -> None:
        self.requested = False
