"""What an eviction is asked for and what it reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from icm_cli.workflows.events import Event

EvictStatus = Literal["evicted", "would_evict", "kept", "pinned", "known", "removed"]


@dataclass(frozen=True)
class EvictRequest:
    """What `icm evict` was asked for; at least one limit is given.

    Attributes:
        names: Tasks; all if empty.
        max_error: Largest relative dW error that a code may have.
        min_gain: Smallest retained gain that a code may have; measuring it needs the base model.
        checkpoints_only: Leave the final adapters.
        dry_run: Check everything and delete nothing.
        device: Where the retained gain is measured.
    """

    names: Sequence[str]
    max_error: float | None
    min_gain: float | None
    checkpoints_only: bool
    dry_run: bool
    device: str


@dataclass(frozen=True)
class TaskEvicted(Event):
    """What became of one task.

    Attributes:
        task: Its name.
        status: `evicted`; `would_evict` in a dry run; `kept` (see `reason`); `pinned`; `known` (nothing was left to
            evict); `removed` (by another process, since the command began).
        adapters: Originals that went, checkpoints included.
        freed: Their bytes on disk; a file that another task needs frees nothing.
        code_size: The code that stands in.
        residual_size: The residual that stands in with it, if there is one.
        dw_error: Their relative dW error, as measured now, else as known.
        retained_gain: Their retained gain, likewise.
        reason: Why the original is kept.
    """

    task: str
    status: EvictStatus
    adapters: int = 0
    freed: int = 0
    code_size: int | None = None
    residual_size: int | None = None
    dw_error: float | None = None
    retained_gain: float | None = None
    reason: str | None = None


@dataclass
class EvictReport:
    """What an eviction did, or would do.

    Attributes:
        tasks: One entry per task.
        left: Bytes of files that a killed eviction had left.
        partly: Whether a task was kept that was meant to go: one below the limit, or a pinned one that was named.
        stopped: Whether the user stopped it before the end.
    """

    tasks: list[TaskEvicted] = field(default_factory=list)
    left: int = 0
    partly: bool = False
    stopped: bool = False

    @property
    def gone(self) -> list[TaskEvicted]:
        """The tasks whose originals went, or would go."""
        return [task for task in self.tasks if task.status in ("evicted", "would_evict")]

    @property
    def kept(self) -> list[TaskEvicted]:
        """The tasks that do not meet the limits."""
        return [task for task in self.tasks if task.status == "kept"]

    @property
    def freed(self) -> int:
        """All bytes that went, or would go."""
        return self.left + sum(task.freed for task in self.tasks)
