"""Findings of `verify`, and the result of a rebuild."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "database", "row", "unlisted", "uncommitted", "missing", "length", "digest", "code", "orphan", "leftover", "remark"
]

_HARMLESS = {"uncommitted", "orphan", "leftover", "remark"}
_OF_DATABASE = {"database", "row", "unlisted", "uncommitted"}
OF_FILES = {"length", "digest"}
"""What a repair of the file corrects or moves to quarantine."""


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it should be."""

    kind: Kind
    message: str
    path: str
    digest: str | None = None  # the file it is about
    tasks: tuple[str, ...] = ()  # that need it
    is_manifest: bool = False

    @property
    def is_problem(self) -> bool:
        """False for the leftovers of killed commands, and for remarks on adapters that are kept as they are."""
        return self.kind not in _HARMLESS

    @property
    def is_of_file(self) -> bool:
        """Whether a repair of the file corrects it or moves it to quarantine."""
        return self.kind in OF_FILES

    @property
    def is_of_database(self) -> bool:
        """Whether a rebuild of the database repairs it."""
        return self.kind in _OF_DATABASE or self.is_manifest


@dataclass(frozen=True)
class Rebuilt:
    """The tasks of a new database, compared with the old one."""

    tasks: int
    restored: tuple[str, ...] = ()  # the old database did not have them, or had another state
    removed: tuple[str, ...] = ()  # they stay removed, although some of their files are left
    lost: tuple[str, ...] = ()  # the old database had them, and no manifest of theirs can be read
