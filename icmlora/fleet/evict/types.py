"""Limits, results and reports of evictions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from icmlora.errors import DataError
from icmlora.fleet.context import Event
from icmlora.fleet.measure.metric_result import gain_text
from icmlora.fleet.results import Report
from registry.manifests import WithRelativeError

NOT_MEASURED = "the relative error of its code was not measured here"
"""Why a code is not trusted: it came in a bundle, whose figures are claims."""


class CheckFailed(DataError):
    """A code misses a limit or cannot be measured."""


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
        if (error := math.sqrt(squared)) > self.max_error:
            raise CheckFailed(f"its relative error is {error:.4f}, above the limit of {self.max_error:g}")

    def check_gain(self, gain: float | None, precision: str | None) -> None:
        """Raise `CheckFailed` unless a retained gain, in a precision of the base model, is within the limit."""
        if self.min_gain is None:
            return
        if gain is None:
            raise CheckFailed("the retained gain of its code was not measured")
        if not gain >= self.min_gain:
            raise CheckFailed(
                f"its retained gain is {gain_text(gain, precision, 4)}, below the limit of {self.min_gain:g}"
            )


@dataclass(frozen=True)
class FolderReplaced:
    """The result for the folder that an adapter was ingested from."""

    path: str
    # `replaced`, `would_replace` in a dry run, `there` (it has the placeholder already), `missing` (the adapter is not
    # there any more), `left` (see `reason`).
    status: Literal["replaced", "would_replace", "there", "missing", "left"]
    freed: int = 0  # bytes; a file that has another name elsewhere frees nothing
    reason: str | None = None
    is_full: bool = False  # whether the reason is that the disk is full


@dataclass(frozen=True)
class TaskEvicted(WithRelativeError, Event):
    """One task is done."""

    TYPE = "task"

    task: str
    # `evicted`; `would_evict` in a dry run; with `keep_originals` `replaced` or `would_replace`; `kept` (see `reason`);
    # `original_only` (there can be no code, see `reason`); `pinned`; `known` (nothing was left to evict); `removed` by
    # another process.
    status: Literal[
        "evicted", "would_evict", "replaced", "would_replace", "kept", "original_only", "pinned", "known", "removed"
    ]
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
class EvictReport(Report[TaskEvicted]):
    """The evictions of a call, or those that it would make."""

    are_named: bool = False  # whether the caller named the tasks
    pending: int = 0  # bytes that a later `prune` frees
    is_in_use: bool = False  # whether they are pending because another process used the store

    @property
    def is_partial(self) -> bool:
        """Whether an original was kept: it misses a limit, or its task is named, and pinned or original only."""
        kept = ("pinned", "original_only") if self.are_named else ()
        return super().is_partial or any(task.is_partial or task.status in kept for task in self.done)

    @property
    def gone(self) -> list[TaskEvicted]:
        """The tasks whose originals were deleted, or would be."""
        return [task for task in self.done if task.status in ("evicted", "would_evict")]

    @property
    def kept(self) -> list[TaskEvicted]:
        """The tasks that miss a limit."""
        return [task for task in self.done if task.status == "kept"]

    @property
    def folders(self) -> list[FolderReplaced]:
        """The results in the folders of all adapters."""
        return [folder for task in self.done for folder in task.folders]

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
        return sum(task.freed + task.left for task in self.done) - self.pending

    @property
    def freed_in_folders(self) -> int:
        """All bytes that placeholders freed in users' folders, or would free."""
        return sum(task.freed_in_folders for task in self.done)
