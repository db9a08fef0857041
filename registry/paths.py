"""Where things are in a store folder.

FORMAT            "icm store 2"; written last when a store is made, so it marks a whole one
registry.db       rows
blobs/3/3f9a..    bytes, named by their SHA-256; 16 folders: syncing 256 costs a first ingest a tenth of its time
tmp/              files being written; on the same file system, so that a rename is atomic
quarantine/       damaged blobs that were moved aside
lock              flock
reserve           bytes given back to a full disk so that rows can still be deleted
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

FORMAT_TEXT = "icm store 2\n"

_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class StorePaths:
    """The paths of one store.

    Attributes:
        root: the store folder.
    """

    root: Path

    @cached_property
    def format(self) -> Path:
        """The file that says what this folder is."""
        return self.root / "FORMAT"

    @cached_property
    def database(self) -> Path:
        """The SQLite file."""
        return self.root / "registry.db"

    @cached_property
    def blobs(self) -> Path:
        """The folder of content-addressed files."""
        return self.root / "blobs"

    @cached_property
    def tmp(self) -> Path:
        """The folder of files that are being written."""
        return self.root / "tmp"

    @cached_property
    def quarantine(self) -> Path:
        """The folder of damaged blobs."""
        return self.root / "quarantine"

    @cached_property
    def lock(self) -> Path:
        """The file that is flock'ed."""
        return self.root / "lock"

    @cached_property
    def reserve(self) -> Path:
        """The file that is given up on a full disk."""
        return self.root / "reserve"

    def blob(self, digest: str) -> Path:
        """Return the path of a blob.

        This is the one place where a digest becomes a path, so it is checked here.

        Raises:
            ValueError: `digest` is not 64 lower-case hexadecimal digits.
        """
        if not is_digest(digest):
            raise ValueError(f"not a digest: {digest[:80]!r}")
        return Path(f"{self.root}/blobs/{digest[0]}/{digest}")  # three times faster than joining, for each of many


def is_digest(text: str) -> bool:
    """Say whether `text` is a SHA-256 in the form the store uses."""
    return _DIGEST.fullmatch(text) is not None
