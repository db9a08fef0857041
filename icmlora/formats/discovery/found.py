"""Adapters on disk, and the tasks that they belong to."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from icmlora.formats.discovery.task_names import name_chain, names_above
from icmlora.formats.format import AdapterFormat, AdapterPaths
from registry.names import task_name_problem


@dataclass(frozen=True)
class FoundAdapter:
    """One adapter on disk; the paths lead to regular files."""

    format: AdapterFormat
    place: Path  # its folder, or for a single file the file without its suffix
    weights: Path  # the file with its tensors
    config: Path | None  # the file with its configuration; None for a format without one
    card: Path | None
    step: int | None = None  # the training step of a checkpoint, or None for an adapter that is not a checkpoint
    is_final: bool = False  # whether this is *the* adapter of its task; true for exactly one
    companions: Mapping[str, Path] = field(default_factory=dict)  # other files that belong to it, by name
    pickle: str | None = None  # the file name of the weights if they are, or were, a pickle
    initial: Path | None = None  # the file with its initial weights (see initial_weights.py)

    @classmethod
    def of(cls, known: AdapterFormat, paths: AdapterPaths, pickle: str | None = None) -> FoundAdapter:
        """Build it from a format's result; the caller sets `step` and `is_final` later."""
        files = paths.place, paths.weights, paths.config, paths.card
        return cls(known, *files, companions=paths.companions, pickle=pickle)

    @property
    def files(self) -> tuple[Path, ...]:
        """All files of the adapter."""
        return tuple(path for path in (self.weights, self.config, self.card, *self.companions.values()) if path)


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
