"""Progress displays on stderr: a bar on a terminal, otherwise a line every few seconds, or nothing."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from icmlora.io.text import escape, human_duration

if TYPE_CHECKING:
    from rich.progress import Progress as RichBar, TaskID

_DEFAULT_INTERVAL = 10.0  # seconds between plain lines


class ProgressDisplay:
    """Base class of progress displays. Shows nothing."""

    def __enter__(self) -> Self:
        """Show the display."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the display."""

    def update(self, done: float, total: float | None, note: str = "") -> None:
        """Show that `done` of `total` steps are finished. A total of None is unknown."""


class PlainProgress(ProgressDisplay):
    """Writes a line every `ICM_PROGRESS_INTERVAL` seconds."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._interval = _interval()
        self._started = self._last = self._moved = time.monotonic()
        self._from = self._done = 0.0
        self._total: float | None = None

    def update(self, done: float, total: float | None, note: str = "") -> None:
        """Write a line, at most once per interval."""
        now = time.monotonic()
        if total != self._total:  # new phase: measure its pace from here
            self._started, self._from, self._total = now, done, total
        if done != self._done:
            self._moved, self._done = now, done
        if now - self._last < self._interval:
            return
        self._last = now
        parts = [self._label, f"{done:g}" if total is None else f"{done:g}/{total:g}", escape(note)]
        if total and self._from < done < total:
            left = (self._moved - self._started) * (total - done) / (done - self._from)
            # A long step counts down: its own time is part of the estimate.
            parts.append(f"eta {human_duration(max(0.0, left - (now - self._moved)))}")
        sys.stderr.write(" ".join(part for part in parts if part) + "\n")
        sys.stderr.flush()


class RichProgress(ProgressDisplay):
    """Draws a bar with Rich, which is imported only on a terminal."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._bar: RichBar | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        """Draw the bar."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress as RichBar, TextColumn, TimeRemainingColumn

        # Notes contain untrusted names, so no column may interpret markup.

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}", markup=False),
        )
        self._bar = RichBar(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task(self._label, total=None, note="")
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: float, total: float | None, note: str = "") -> None:
        """Move the bar."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total, note=escape(note))


def _interval() -> float:
    try:
        return max(0.0, float(os.environ.get("ICM_PROGRESS_INTERVAL", "")))
    except ValueError:
        return _DEFAULT_INTERVAL
