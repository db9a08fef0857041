"""Tasks on disk."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

from icmlora.formats.discovery.task_names import name_chain, names_above
from icmlora.formats.format import FoundAdapter
from registry.names import task_name_problem


@dataclass(frozen=True)
class FoundTask:
    """A task: its final adapter, its checkpoints, and its texts."""

    name: str  # a valid task name, or empty before it is named
    folder: Path  # the folder that it is named after
    adapters: tuple[FoundAdapter, ...]  # in order of steps; an adapter that is not a checkpoint comes last
    samples: Path | None  # `samples.jsonl`, or the same as JSON or Parquet
    eval_data: Path | None  # `eval.jsonl`, likewise
    part: str | None = None  # distinguishes it from other tasks of this folder, such as `last` from `best`
    root: Path = field(default=Path(), compare=False)  # the user's folder that contains it
    not_kept: tuple[Path, ...] = ()  # files next to its adapters that belong to neither an adapter nor a trainer

    @property
    def final(self) -> FoundAdapter:
        """The adapter that represents the task."""
        return next(adapter for adapter in self.adapters if adapter.is_final)

    @property
    def places(self) -> tuple[Path, ...]:
        """The places of its adapters, the final adapter first."""
        return (self.final.place, *(adapter.place for adapter in self.adapters if not adapter.is_final))

    @property
    def files(self) -> tuple[Path, Path | None]:
        """The weights and the configuration of its final adapter."""
        return self.final.weights, self.final.config

    def is_called_like_its_folder(self, name: str) -> bool:
        """Return whether a user would expect this name."""
        expected = name_chain(self.folder, self.part)[0]
        # Names cannot contain spaces; users expect another character instead.
        own = unicodedata.normalize("NFC", names_above(self.folder)[0]).replace(" ", "-")
        return name.lower() == expected.lower() and task_name_problem(own) is None
