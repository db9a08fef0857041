"""The result of `icm report`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from icmlora.fleet.results import Report

if TYPE_CHECKING:
    from icmlora.fleet.report.pictures import TaskPictures
    from icmlora.fleet.report.rate_picture import Quality


@dataclass
class ReportSummary(Report[object]):
    """The result of `write_report`: the outputs that the page shows, and chosen tasks without outputs."""

    file: Path = Path()  # the page
    size: int = 0  # its bytes
    tasks: int = 0  # how many tasks are in its table
    maps: list[str] = field(default_factory=list)  # the base models whose task maps are on it
    quality: Quality | None = None  # what the rate picture shows against bytes; None where no code was measured
    outputs: list[str] = field(default_factory=list)  # the tasks whose outputs it shows
    pictures: list[TaskPictures] = field(default_factory=list)  # pictures of image tasks

    @property
    def failures(self) -> dict[str, str]:
        """Why a chosen task has no outputs, by its name."""
        failed = {failure.task: failure.message for failure in self.failed}
        return failed | {task: entry.reason for entry in self.skipped for task in entry.tasks}
