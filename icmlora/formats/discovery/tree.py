"""Walk an untrusted tree iteratively: follow no link out of it, and open no special file."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from icmlora.errors import AdapterRefused, UnsafeInput
from icmlora.formats.discovery.task_names import cached_repository
from icmlora.formats.discovery.unsupported import APPLE_DOUBLE
from icmlora.io.safetensors import PeekedHeader, peek_header
from registry.names import escape

MAX_ENTRIES = 1_000_000

Refuse = Callable[[AdapterRefused], None]

# A folder that `icmlora.io.staging` is building, or left behind when its process died.
_UNFINISHED = re.compile(r".+\.icm-[0-9a-f]{8}")


@dataclass(frozen=True)
class Folder:
    """One folder of the tree and the regular files in it."""

    path: Path  # the folder, without links
    files: Mapping[str, Path]  # name to real path; a link inside the tree is listed under its own name
    pickle: str | None = None  # the pickle that is listed as the weights
    _headers: dict[str, PeekedHeader | None] = field(default_factory=dict, compare=False, repr=False)

    def header(self, name: str) -> PeekedHeader | None:
        """Return the header of a safetensors file, or None if it cannot be read.

        Headers are cached, because several formats need the same file. The file may be truncated.
        """
        if name not in self._headers:
            self._headers[name] = peek_header(self.files[name])
        return self._headers[name]


def walk(root: Path, watched: Collection[str], refuse: Refuse) -> Iterator[Folder]:
    """Yield every folder of a tree, parents first, in order of names.

    Raises:
        UnsafeInput: It has more than a million entries.
    """
    # Skip hidden folders, and links to folders inside the tree, whose targets are visited anyway. Refuse links to
    # folders out of the tree. Refuse other unusable links and special files only if their names are `watched`.
    pending = [root]
    budget = MAX_ENTRIES
    while pending:
        path = pending.pop()
        try:
            with os.scandir(path) as scan:
                entries = []
                for entry in scan:
                    entries.append(entry)
                    budget -= 1
                    if budget < 0:
                        raise UnsafeInput(f"holds more than {MAX_ENTRIES:,} files", kind="limits", path=root)
        except OSError as error:
            refuse(AdapterRefused(f"cannot be read: {error.strerror}", kind="unreadable", path=path))
            continue
        entries.sort(key=lambda entry: entry.name)
        files, folders = _sort_entries(entries, root, watched, refuse)
        yield Folder(path, files)
        pending.extend(reversed(folders))


def _sort_entries(
    entries: list[os.DirEntry[str]], root: Path, watched: Collection[str], refuse: Refuse
) -> tuple[dict[str, Path], list[Path]]:
    files: dict[str, Path] = {}
    folders: list[Path] = []
    for entry in entries:
        if entry.name.startswith(APPLE_DOUBLE):
            continue
        if entry.is_symlink():
            target = _inside(entry, root, watched, refuse)
            if target is not None and target.is_file():
                files[entry.name] = target
        elif entry.is_dir(follow_symlinks=False):
            if not entry.name.startswith(".") and not _UNFINISHED.fullmatch(entry.name):
                folders.append(Path(entry.path))
        elif entry.is_file(follow_symlinks=False):
            files[entry.name] = Path(entry.path)
        elif entry.name in watched:
            refuse(UnsafeInput("not a regular file", kind="special-file", path=entry.path))
    return files, folders


def _inside(entry: os.DirEntry[str], root: Path, watched: Collection[str], refuse: Refuse) -> Path | None:
    """Return a link's target; None, with a refusal if relevant, if it leaves the tree, loops or is broken."""
    try:
        target = Path(os.path.realpath(entry.path, strict=True))
    except OSError:
        if entry.name in watched:
            refuse(UnsafeInput("a broken symbolic link", kind="symlink", path=entry.path))
        return None
    if target.is_relative_to(root):
        return target
    if entry.name in watched or target.is_dir():
        repository = cached_repository(Path(entry.path))
        hint = "specify its target folder, or a folder that contains both"
        if repository is not None:
            hint = f"specify {escape(str(repository), 4096)}, which contains both, or a copy made with `cp -rL`"
        refuse(
            UnsafeInput("a symbolic link that leaves the specified folder", kind="symlink", path=entry.path, hint=hint)
        )
    return None
