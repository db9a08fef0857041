"""Limits, results and reports of evictions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from icmlora.errors import DataError
from icmlora.fleet.context import Event
from icmlora.fleet.measure.metric_result import gain_text
from registry.manifests import WithRelativeError

if TYPE_CHECKING:
    from icmlora.fleet.evict.placeholders import FolderReplaced


NOT_MEASURED = "the relative error of its code was not measured here"
"""Why a code is not trusted: it came in a bundle, whose figures are claims."""


class CheckFailed(DataError):
    """A code misses a limit or cannot be measured; holds the measurements until then."""

    def __init__(
        self,
        reason: str,
        squared_error: float | None = None,
        retained_gain: float | None = None,
        precision: str | None = None,
    ) -> None:
        super().__init__(reason)
        self.squared_error, self.retained_gain, self.precision = squared_error, retained_gain, precision


@dataclass(frozen=True)
class EvictLimits:
    """What a code has to keep for its original to go; at least one is given."""

    max_error: float | None = None  # largest relative error
    min_gain: float | None = None  # smallest retained gain

    def check_error(self, squared: float | None) -> None:
        """Raise `CheckFailed` unless the square of a relative error is within the limit."""
        if self.max_error is None:
            return
        if squared is None:
            raise CheckFailed(NOT_MEASURED)
        if (found := math.sqrt(squared)) > self.max_error:
            raise CheckFailed(f"its relative error is {found:.4f}, above the limit of {self.max_error:g}", squared)

    def check_gain(self, gain: float | None, squared: float | None = None, precision: str | None = None) -> None:
        """Raise `CheckFailed` unless a retained gain, in a precision of the base model, is within the limit."""
        if self.min_gain is None:
            return
        if gain is None:
            raise CheckFailed("the retained gain of its code was not measured", squared)
        if not gain >= self.min_gain:
            fact = f"its retained gain is {gain_text(gain, precision, 4)}, below the limit of {self.min_gain:g}"
            raise CheckFailed(fact, squared, gain, precision)


EvictStatus = Literal[
    "evicted", "would_evict", "replaced", "would_replace", "kept", "original_only", "pinned", "known", "removed"
]


@dataclass(frozen=True)
class TaskEvicted(WithRelativeError, Event):
    """One task is done."""

    task: str
    # `evicted`; `would_evict` in a dry run; with `keep_originals` `replaced` or `would_replace`; `kept` (see `reason`);
    # `original_only` (there can be no code, see `reason`); `pinned`; `known` (nothing was left to evict); `removed` by
    # another process.
    status: EvictStatus
    adapters: int = 0
    freed: int = 0  # their bytes in the store; a file that another task or version needs frees nothing
    code_size: int | None = None  # bytes of the code that replaces them
    squared_error: float | None = None
    retained_gain: float | None = None
    reason: str | None = None  # also of an evicted task, where some of its checkpoints were kept
    folders: Sequence[FolderReplaced] = ()  # with `placeholder`: results in the folders of its adapters
    precision: str | None = None  # of the base model that the gain was measured on
    left: int = 0  # further bytes, which an interrupted eviction had left

    @property
    def freed_in_folders(self) -> int:
        """Bytes that placeholders freed in users' folders, or would free."""
        return sum(folder.freed for folder in self.folders)

    @property
    def is_partial(self) -> bool:
        """Whether something was kept that was meant to go."""
        held_back = self.status in ("evicted", "would_evict") and self.reason is not None
        return self.status == "kept" or held_back or any(folder.status == "left" for folder in self.folders)


@dataclass
class EvictReport:
    """The evictions of a call, or those that it would make."""

    tasks: list[TaskEvicted] = field(default_factory=list)
    # Whether an original was kept that was meant to go: it misses a limit, or its task is named, and pinned or
    # original only.
    partly: bool = False
    pending: int = 0  # bytes that a later `prune` frees
    is_in_use: bool = False  # whether they are pending because another process used the store

    @property
    def gone(self) -> list[TaskEvicted]:
        """The tasks whose originals were deleted, or would be."""
        return [task for task in self.tasks if task.status in ("evicted", "would_evict")]

    @property
    def kept(self) -> list[TaskEvicted]:
        """The tasks that miss a limit."""
        return [task for task in self.tasks if task.status == "kept"]

    @property
    def original_only(self) -> list[TaskEvicted]:
        """The tasks that cannot have a code."""
        return [task for task in self.tasks if task.status == "original_only"]

    @property
    def folders(self) -> list[FolderReplaced]:
        """The results in the folders of all adapters."""
        return [folder for task in self.tasks for folder in task.folders]

    @property
    def placeholders(self) -> list[FolderReplaced]:
        """The folders where a placeholder replaced an adapter, or would."""
        return [folder for folder in self.folders if folder.status in ("replaced", "would_replace")]

    @property
    def is_full(self) -> bool:
        """Whether a folder was left as it was because the disk is full."""
        return any(folder.is_full for folder in self.folders)

    @property
    def freed(self) -> int:
        """All bytes that were freed in the store, or would be."""
        return sum(task.freed + task.left for task in self.tasks) - self.pending

    @property
    def left(self) -> int:
        """All bytes that interrupted evictions had left."""
        return sum(task.left for task in self.tasks)

    @property
    def freed_in_folders(self) -> int:
        """All bytes that placeholders freed in users' folders, or would free."""
        return sum(task.freed_in_folders for task in self.tasks)
